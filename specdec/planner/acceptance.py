"""Acceptance in one call, by depth and number of siblings, for every row; earlier steps weigh ever less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

from specdec.planner.decayed_counts import DecayedCounts, Widths
from specdec.trace import StepTrace

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


def would_be_kept(chain: Sequence[int], run: Sequence[int]) -> tuple[int, int]:
    """Decisions and acceptances of a deterministic chain that was not drafted, where the step emitted `run`.

    An emitted token is the target's own whatever was drafted, so the same token would have been accepted, another one
    rejected; of what would have come after the run nothing is known. E.g. chain 5 6 7 and run 5 9: two, one.
    """
    known = min(len(chain), len(run))
    same = 0
    while same < known and chain[same] == run[same]:
        same += 1
    return min(known, same + 1), same


class Outcomes(NamedTuple):
    """Rows that had a chain, decisions about it and acceptances: what `AcceptanceHistory.add` takes."""

    rows: list[int]
    tried: list[int]
    kept: list[int]


def counterfactual_outcomes(chains: Sequence[Sequence[int]], trace: StepTrace) -> Outcomes:
    """What would have become of chains that were not drafted, one for each row of a step."""
    heard = Outcomes([], [], [])
    for row, chain, run in zip(trace.rows, chains, trace.emitted, strict=True):
        tried, kept = would_be_kept(chain, run)
        if tried:
            heard.rows.append(row)
            heard.tried.append(tried)
            heard.kept.append(kept)
    return heard


class AcceptanceHistory:
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
        self._begun = dict(belief or {})
        tried, kept = (sum(sum(seen[i]) for seen in self._begun.values()) for i in (0, 1))
        self._prior = (PRIOR_WEIGHT * PRIOR_ACCEPTANCE + kept) / (PRIOR_WEIGHT + tried)
        self._batch = DecayedCounts(depths)
        for width, (decided, accepted) in self._begun.items():
            self._batch.begin(width, decided, accepted, _BELIEF)
        self.believes = self._batch.num_tried >= 1
        self._rows = [DecayedCounts(depths) for _ in range(rows)] if rows > 1 else []
        self._tried = self._kept = 0.0
        self._fates: dict[tuple[Widths, int, int], int] = {}
        self._chances: dict[tuple[int, int], Sequence[float]] = {}
        self._reaches: dict[tuple[Widths, int], list[float]] = {}

    @property
    def num_decisions(self) -> float:
        """Decisions of this call that are remembered, forgotten ones partly counted."""
        return self._tried

    @property
    def acceptance(self) -> float:
        """Share of the remembered decisions that accepted, of the belief where this call took none; 0 without any."""
        if self._tried > 0:
            return self._kept / self._tried
        return self._batch.num_kept / self._batch.num_tried if self._batch.num_tried > 0 else 0.0

    @property
    def belief(self) -> Belief:
        """What the next call may begin with: all of this one, and of those before it ever less."""
        out = {1: self._earlier(1)}
        for (widths, reached, accepted), count in self._fates.items():
            for depth, width in enumerate(widths[:reached]):
                tried, kept = out.setdefault(width, self._earlier(width))
                tried[depth] += count
                kept[depth] += count * (depth < accepted)
        return {**self._begun, **out}

    def _earlier(self, width: int) -> tuple[list[float], list[float]]:
        none = [0.0] * self.depths
        tried, kept = ([_EARLIER_CALLS * old for old in seen] for seen in self._begun.get(width, (none, none)))
        return tried, kept

    def add(self, widths: Widths, rows: Sequence[int], tried: Sequence[int], kept: Sequence[int]) -> None:
        """One step's drafts.

        Args:
            widths: their shape. rows: batch indices of the rows that drafted.
            tried, kept: per such row, levels a decision was taken at, and how many of them accepted a token.
        """
        self._forget_estimates()
        self._batch.fade(MEMORY)
        self._tried, self._kept = MEMORY * self._tried + sum(tried), MEMORY * self._kept + sum(kept)
        counterfactual_outcomes: dict[tuple[int, int], int] = {}
        for fate in zip(tried, kept, strict=True):
            counterfactual_outcomes[fate] = counterfactual_outcomes.get(fate, 0) + 1
        for (t, k), times in counterfactual_outcomes.items():
            self._batch.add(widths, t, k, times)
            self._fates[widths, t, k] = self._fates.get((widths, t, k), 0) + times
        if self._rows:
            for row, t, k in zip(rows, tried, kept, strict=True):
                self._rows[row].fade(MEMORY)
                self._rows[row].add_later(widths, t, k)

    def fade(self, factor: float) -> None:
        """Trust what was seen less: the text has moved on since."""
        self._forget_estimates()
        self._tried, self._kept = factor * self._tried, factor * self._kept
        for place in (self._batch, *self._rows):
            place.fade(factor)

    def _forget_estimates(self) -> None:
        self._chances.clear()
        self._reaches.clear()

    def chances(self, width: int, row: int = -1) -> Sequence[float]:
        """By depth: chance that one of `width` siblings is accepted once everything above was.

        Args:
            row: of the batch; -1: over all rows.
        """
        found = self._chances.get((width, row))
        if found is None:
            found = self._chances[width, row] = self._estimate(width, row if self._rows else -1)
        return found

    def _estimate(self, width: int, row: int) -> Sequence[float]:
        if row >= 0:
            own = self._rows[row]
            if not self._stands_out(row):
                return self.chances(width)
            # A row that is worse than the batch where it was seen is worse at depths it has not reached, too.
            batch = self._batch.level(self._prior, PRIOR_WEIGHT)
            ratio = own.level(batch, _ROW_WEIGHT) / batch
            believed = [min(1.0, ratio * chance) for chance in self.chances(width)]
            return own.estimate(width, believed, _ROW_WEIGHT)
        if width == 1:
            believed = [self._batch.level(self._prior, PRIOR_WEIGHT, 1)] * self.depths
        else:
            believed = [1 - (1 - chance) * SIBLING_MISS for chance in self.chances(width - 1)]
        return self._batch.estimate(width, believed, _DEPTH_WEIGHT)

    def _stands_out(self, row: int) -> bool:
        """Is this row's acceptance too low to be the batch's by chance?

        The slowest of several equal rows always looks slow; only what cannot be luck is believed.
        """
        if not self._rows or row < 0:
            return False
        own = self._rows[row]
        tried, batch = own.num_tried, self._batch.level(self._prior, PRIOR_WEIGHT)
        return own.num_kept < tried * batch - _UNLIKELY * sqrt(tried * batch * (1 - batch))

    def reach(self, widths: Widths, row: int = -1) -> Sequence[float]:
        """Accepted tokens expected of one row's draft, by the levels drafted, 0 .. len(widths)."""
        row = row if self._stands_out(row) else -1
        out = self._reaches.get((widths, row))
        if out is not None:
            return out
        reach, gain, out, last = 1.0, 0.0, [0.0], 0
        chances: Sequence[float] = ()
        for depth, width in enumerate(widths):
            if width != last:
                chances, last = self.chances(width, row), width
            reach *= chances[depth]
            gain += reach
            out.append(gain)
        self._reaches[widths, row] = out
        return out

    def gains(self, widths: Widths, limits: Sequence[tuple[int, int]]) -> Sequence[float]:
        """Accepted draft tokens expected of one step, all rows together, by the levels drafted.

        Args:
            limits: (row, deepest useful draft) of every live row.

        Returns:
            `gains[d]` for the leading d levels of that shape, d = 0 .. len(widths).
        """
        deepest = len(widths)
        rows = [(self.reach(widths, row), limit) for row, limit in limits]
        if len(rows) == 1 and rows[0][1] >= deepest:
            return rows[0][0]
        whole = [own if limit >= deepest else [own[min(d, limit)] for d in range(deepest + 1)] for own, limit in rows]
        return [sum(gains) for gains in zip(*whole, strict=True)]
