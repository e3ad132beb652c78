"""What became of the drafts of one call: acceptance by depth and siblings, for every row, slowly forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

PRIOR_ACCEPTANCE = 0.7
"""Acceptance believed of a drafter nothing is known of: most people's drafters are useful."""
PRIOR_WEIGHT = 2.5
"""Decisions that belief is worth."""
MEMORY = 0.98
"""What a decision still weighs one step of its row later: about the last 50 steps count."""
SIBLING_MISS = 0.65
"""Believed chance that a further sibling misses, too, where all before it have missed."""
_DEPTH_WEIGHT = 6.0
"""Decisions that the acceptance of all depths is worth where one depth is estimated."""
_ROW_WEIGHT = 3.0
"""Decisions that the acceptance of the whole batch is worth where a row that stands out is estimated."""
_UNLIKELY = 2.0
"""Standard deviations below the batch's acceptance from which a row stands out."""

_BELIEF = 4.0
"""Decisions that what was seen before this call may weigh at one depth when the call begins."""

_EARLIER_CALLS = 0.8
"""What a decision still weighs one call later."""

Belief = Mapping[int, tuple[Sequence[float], Sequence[float]]]
"""What is known of a family before a call: number of siblings -> decisions and acceptances by depth."""


@dataclass(frozen=True)
class Known:
    """What a call may begin with.

    beliefs: by family. found: by option that may be empty, the share of rows it had a proposal for.
    """

    beliefs: Mapping[str, Belief] = field(default_factory=dict)
    found: Mapping[str, float] = field(default_factory=dict)


Widths = tuple[int, ...]
"""Children per node, level by level; a chain is all ones."""


class Counts:
    """Decisions and acceptances by depth, for one number of siblings. Index 0 is the first drafted level."""

    __slots__ = ("kept", "tried")

    def __init__(self, depths: int):
        self.tried = [0.0] * depths
        self.kept = [0.0] * depths

    def fade(self, factor: float) -> None:
        """Weigh everything seen so far less."""
        self.tried = [count * factor for count in self.tried]
        self.kept = [count * factor for count in self.kept]

    def estimate(self, believed: Sequence[float], weight: float) -> list[float]:
        """Chances by depth: what was seen, shrunk towards what is believed as if that had been seen `weight` times."""
        pairs = zip(believed, self.kept, self.tried, strict=True)
        return [(weight * belief + kept) / (weight + tried) for belief, kept, tried in pairs]


def _level(counts: Mapping[int, Counts], believed: float, weight: float = PRIOR_WEIGHT) -> float:
    """Acceptance at all depths together, shrunk towards what is believed."""
    tried = sum(sum(own.tried) for own in counts.values())
    kept = sum(sum(own.kept) for own in counts.values())
    return (weight * believed + kept) / (weight + tried)


def _scaled(depths: int, tried: Sequence[float], kept: Sequence[float]) -> Counts:
    """Earlier counts, so many of them as a belief may weigh."""
    counts = Counts(depths)
    factor = min(1.0, _BELIEF / max(max(tried, default=0.0), 1e-9))
    for depth, (t, k) in enumerate(zip(tried[:depths], kept[:depths], strict=True)):
        counts.tried[depth], counts.kept[depth] = factor * t, factor * k
    return counts


def would_be_kept(chain: Sequence[int], run: Sequence[int]) -> tuple[int, int]:
    """Decisions and acceptances of a deterministic chain that was not drafted, where the step emitted `run`.

    An emitted token is the target's own whatever was drafted, so the same token would have been accepted, another one
    rejected; of what would have come after the run nothing is known. E.g. chain 5 6 7 and run 5 9: two, one.
    """
    known = min(len(chain), len(run))
    same = next((i for i in range(known) if chain[i] != run[i]), known)
    return min(known, same + 1), same


class History:
    """Acceptance of one family of drafts in one call: per row, and of all rows together.

    Estimates are shrunk: a depth towards all depths, several siblings towards what one would suggest, and a row that
    is clearly worse than the batch towards the batch.

    Args:
        depths: deepest draft there can be. rows: of the batch.
        belief: what was seen before the call; it counts like `_BELIEF` decisions of the call itself, and fades like
            them.
    """

    def __init__(self, depths: int, rows: int, belief: Belief | None = None):
        self.depths = depths
        self._batch: dict[int, Counts] = {1: Counts(depths)}
        self._tried = self._kept = 0.0
        self._begun, self._own = dict(belief or {}), {1: Counts(depths)}
        tried, kept = (sum(sum(seen[i]) for seen in self._begun.values()) for i in (0, 1))
        self._prior = (PRIOR_WEIGHT * PRIOR_ACCEPTANCE + kept) / (PRIOR_WEIGHT + tried)
        for width, seen in self._begun.items():
            self._batch[width] = _scaled(depths, *seen)
        self.believes = any(sum(counts.tried) >= 1 for counts in self._batch.values())
        self._rows: list[dict[int, Counts]] = [{} for _ in range(rows)] if rows > 1 else []
        self._chances: dict[tuple[int, int], list[float]] = {}

    @property
    def num_decisions(self) -> float:
        """Decisions of this call that are remembered, forgotten ones partly counted."""
        return self._tried

    @property
    def acceptance(self) -> float:
        """Share of the remembered decisions that accepted, of the belief where this call took none; 0 without any."""
        if self._tried > 0:
            return self._kept / self._tried
        tried, kept = (sum(sum(getattr(counts, what)) for counts in self._batch.values()) for what in ("tried", "kept"))
        return kept / tried if tried else 0.0

    @property
    def belief(self) -> Belief:
        """What the next call may begin with: all of this one, and of those before it ever less."""
        out: dict[int, tuple[Sequence[float], Sequence[float]]] = dict(self._begun)
        for width, own in self._own.items():
            tried, kept = out.get(width, ([0.0] * self.depths,) * 2)
            out[width] = (
                [_EARLIER_CALLS * old + new for old, new in zip(tried, own.tried, strict=False)],
                [_EARLIER_CALLS * old + new for old, new in zip(kept, own.kept, strict=False)],
            )
        return out

    def add(self, widths: Widths, rows: Sequence[int], tried: Sequence[int], kept: Sequence[int]) -> None:
        """One step's drafts.

        Args:
            widths: their shape. rows: batch indices of the rows that drafted.
            tried, kept: per such row, levels a decision was taken at, and how many of them accepted a token.
        """
        self._chances.clear()
        self._tried = MEMORY * self._tried + sum(tried)
        self._kept = MEMORY * self._kept + sum(kept)
        for counts in self._batch.values():
            counts.fade(MEMORY)
        for row, t, k in zip(rows, tried, kept, strict=True):
            if self._rows:
                for counts in self._rows[row].values():
                    counts.fade(MEMORY)
            for depth, width in enumerate(widths[:t]):
                places = [self._batch, self._own, self._rows[row]] if self._rows else [self._batch, self._own]
                for place in places:
                    counts = place.setdefault(width, Counts(self.depths))
                    counts.tried[depth] += 1
                    counts.kept[depth] += depth < k

    def fade(self, factor: float) -> None:
        """Trust what was seen less: the text has moved on since."""
        self._chances.clear()
        self._tried, self._kept = factor * self._tried, factor * self._kept
        for place in (self._batch, *self._rows):
            for counts in place.values():
                counts.fade(factor)

    def chances(self, width: int, row: int = -1) -> list[float]:
        """By depth: chance that one of `width` siblings is accepted once everything above was.

        Args:
            row: of the batch; -1: over all rows.
        """
        found = self._chances.get((width, row))
        if found is None:
            found = self._chances[width, row] = self._estimate(width, row if self._rows else -1)
        return found

    def _estimate(self, width: int, row: int) -> list[float]:
        if row >= 0:
            own = self._rows[row]
            if not self._stands_out(own):
                return self.chances(width)
            # A row that is worse than the batch where it was seen is worse at depths it has not reached, too.
            batch = _level(self._batch, self._prior)
            ratio = _level(own, batch, _ROW_WEIGHT) / batch
            believed = [min(1.0, ratio * chance) for chance in self.chances(width)]
            counts = own.get(width)
            return believed if counts is None else counts.estimate(believed, _ROW_WEIGHT)
        shared = self._batch.get(width)
        if width == 1:
            assert shared is not None
            return shared.estimate([_level({1: shared}, self._prior)] * self.depths, _DEPTH_WEIGHT)
        believed = [1 - (1 - chance) * SIBLING_MISS for chance in self.chances(width - 1)]
        return believed if shared is None else shared.estimate(believed, _DEPTH_WEIGHT)

    def _stands_out(self, own: Mapping[int, Counts]) -> bool:
        """Is this row's acceptance too low to be the batch's by chance?

        The slowest of several equal rows always looks slow; only what cannot be luck is believed.
        """
        tried = sum(sum(counts.tried) for counts in own.values())
        kept = sum(sum(counts.kept) for counts in own.values())
        batch = _level(self._batch, self._prior)
        return kept < tried * batch - _UNLIKELY * sqrt(tried * batch * (1 - batch))

    def gains(self, widths: Widths, limits: Sequence[tuple[int, int]]) -> list[float]:
        """Accepted draft tokens expected of one step, all rows together, by the levels drafted.

        Args:
            limits: (row, deepest useful draft) of every live row.

        Returns:
            `gains[d]` for the leading d levels of that shape, d = 0 .. len(widths).
        """
        total = [0.0] * (len(widths) + 1)
        for row, limit in limits:
            reach, gain = 1.0, 0.0
            for depth, width in enumerate(widths, 1):
                if depth <= limit:
                    reach *= self.chances(width, row)[depth - 1]
                    gain += reach
                total[depth] += gain
        return total
