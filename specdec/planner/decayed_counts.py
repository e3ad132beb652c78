"""Counts in which earlier steps weigh ever less: decisions by depth, and hits of drafters that may come back empty."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from specdec.planner.options import Option

Widths = tuple[int, ...]
"""Children per node, level by level; a chain is all ones."""
_RESCALE = 1e12
_LATEST = 256
"""Drafts whose depths are looked up when they are asked for; what is older weighs next to nothing."""
_BEFORE, _MEMORY = 4.0, 0.95
"""Steps that what is believed before a call is worth, and what a step still weighs one step later."""


class DecayedCounts:
    """Decisions and acceptances of one row or batch, by depth and number of siblings.

    Forgetting multiplies everything seen so far by a factor. Instead of that, what comes next is counted in a unit
    that is larger by as much: a step then costs what it brings, however much is remembered.
    """

    __slots__ = ("_all_kept", "_all_tried", "_depths", "_kept", "_later", "_tried", "_unit")

    def __init__(self, depths: int):
        self._depths = depths
        self._unit = 1.0
        self._tried: dict[int, list[float]] = {}
        self._kept: dict[int, list[float]] = {}
        self._all_tried = self._all_kept = 0.0
        self._later: deque[tuple[float, Widths, int, int]] = deque(maxlen=_LATEST)

    def begin(self, width: int, tried: Sequence[float], kept: Sequence[float], most: float) -> None:
        """Start from counts seen elsewhere, each depth's weighing no more than `most` decisions."""
        empty = [0.0] * self._depths
        factors = [min(1.0, most / count) if count > 0 else 0.0 for count in tried]
        for counts, seen in ((self._tried, tried), (self._kept, kept)):
            scaled = [factor * count for factor, count in zip(factors, seen, strict=True)]
            counts[width] = [*scaled, *empty][: self._depths]
        self._all_tried += sum(self._tried[width])
        self._all_kept += sum(self._kept[width])

    def fade(self, factor: float) -> None:
        """Weigh everything seen so far less."""
        self._unit /= factor
        if self._unit > _RESCALE:
            self._catch_up()
            for counts in (self._tried, self._kept):
                for width, values in counts.items():
                    counts[width] = [value / self._unit for value in values]
            self._all_tried /= self._unit
            self._all_kept /= self._unit
            self._unit = 1.0

    def add(self, widths: Widths, tried: int, kept: int, times: int = 1) -> None:
        """Equal drafts of one step: `tried` levels were decided, of which the first `kept` accepted a token."""
        weight = self._unit * times
        self._all_tried += tried * weight
        self._all_kept += kept * weight
        self._count(weight, widths, tried, kept)

    def add_later(self, widths: Widths, tried: int, kept: int) -> None:
        """The same as `add`, by depth only once somebody asks: of most rows nothing but the totals is looked at."""
        self._all_tried += tried * self._unit
        self._all_kept += kept * self._unit
        self._later.append((self._unit, widths, tried, kept))

    def _catch_up(self) -> None:
        for draft in self._later:
            self._count(*draft)
        self._later.clear()

    def _count(self, weight: float, widths: Widths, tried: int, kept: int) -> None:
        for depth in range(tried):
            width = widths[depth]
            counts = self._tried.get(width)
            if counts is None:
                counts = self._tried[width] = [0.0] * self._depths
                self._kept[width] = [0.0] * self._depths
            counts[depth] += weight
            if depth < kept:
                self._kept[width][depth] += weight

    @property
    def num_tried(self) -> float:
        """Decisions that are remembered, forgotten ones partly counted."""
        return self._all_tried / self._unit

    @property
    def num_kept(self) -> float:
        return self._all_kept / self._unit

    def level(self, believed: float, weight: float, width: int | None = None) -> float:
        """Acceptance at all depths together, shrunk towards what is believed as if that had been seen `weight` times.

        Args:
            width: only of so many siblings; None for all.
        """
        weight *= self._unit
        tried, kept = self._all_tried, self._all_kept
        if width is not None:
            self._catch_up()
            tried, kept = sum(self._tried.get(width, ())), sum(self._kept.get(width, ()))
        return (weight * believed + kept) / (weight + tried)

    def estimate(self, width: int, believed: Sequence[float], weight: float) -> Sequence[float]:
        """Chances by depth, each shrunk towards what is believed of it."""
        self._catch_up()
        if width not in self._tried:
            return believed
        weight *= self._unit
        pairs = zip(believed, self._kept[width], self._tried[width], strict=True)
        return [(weight * belief + kept) / (weight + tried) for belief, kept, tried in pairs]


class HitRates:
    """Per option, the share of rows it had a proposal for, slowly forgotten.

    Args:
        believed: by option's name; half where nothing is known.
    """

    def __init__(self, options: Sequence[Option], believed: Mapping[str, float]):
        self._options = options
        self._found = [_BEFORE * believed.get(option.name, 0.5) for option in options]
        self._asked = [_BEFORE] * len(options)

    def share(self, index: int) -> float:
        return self._found[index] / self._asked[index]

    def add(self, index: int, share: float) -> None:
        """It was asked in one step, and found something for this share of the rows."""
        self._found[index] = _MEMORY * self._found[index] + share
        self._asked[index] = _MEMORY * self._asked[index] + 1

    @property
    def known(self) -> dict[str, float]:
        """What the next call may begin with."""
        return {option.name: self.share(i) for i, option in enumerate(self._options) if option.may_be_empty}
