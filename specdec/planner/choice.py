"""Candidates for the next step, and which of them is fastest. Pure functions of costs and acceptance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from operator import itemgetter
from typing import NamedTuple

from specdec.drafters.base import depth_limits, levels_within
from specdec.planner.acceptance import AcceptanceHistory
from specdec.planner.costs import StepTimes
from specdec.planner.options import Option

HORIZON = 256
"""Tokens per row that are counted on when the call's own limit is further away, or when there is none."""
SWITCH = 1.03
"""Another candidate must promise this much more than the present one to replace it."""
MARGIN = 1.01
"""Drafting must promise this much more than decoding plainly."""

_LATER = 1.02
"""The slowest row is an extreme of several uncertain estimates: foreseen delays below this are not believed."""


class Situation:
    """What the next step starts from.

    live: batch index of every live row. left: tokens each may still emit, at most HORIZON. longest: tokens of the row
    that may get the most, None for no end.
    limits: (row, deepest useful draft) of every live row; limits_of: the same for an option, whose drafter may not be
    able to read rows so long. times_of: live rows -> their table. lengths: tokens every live row holds.
    """

    def __init__(
        self,
        live: Sequence[int],
        left: Sequence[int | None],
        deepest: int,
        times_of: Callable[[int], StepTimes],
        lengths: Sequence[int] = (),
    ):
        self.live = list(live)
        self.left = [HORIZON if tokens is None else min(HORIZON, tokens) for tokens in left]
        limits = [tokens for tokens in left if tokens is not None]
        self.longest = max(limits) if len(limits) == len(left) else None
        self.limits = list(zip(live, depth_limits(deepest, left), strict=True))
        self.rows, self._lengths = len(self.live), lengths
        self.times_of, self.times = times_of, times_of(self.rows)
        self.plain_ms = self.times.plain
        self.plain_rate = self.rows / self.plain_ms

    def limits_of(self, option: Option) -> Sequence[tuple[int, int]]:
        if option.positions is None:
            return self.limits
        pairs = zip(self.limits, self._lengths, strict=True)
        return [(row, levels_within(option.positions, limit, tokens)) for (row, limit), tokens in pairs]

    @cached_property
    def plain_total(self) -> float:
        """Milliseconds until the last row is done without drafts."""
        total, before = 0.0, 0
        for finished, tokens in enumerate(sorted(self.left)):
            total += (tokens - before) * self.times_of(self.rows - finished).plain
            before = tokens
        return total


class Candidate(NamedTuple):
    """An option at one depth and what it promises: tokens of all rows per millisecond, tokens and ms per step."""

    rate: float
    option: int
    depth: int
    tokens: float
    ms: float


def candidates(
    index: int, option: Option, history: AcceptanceHistory, now: Situation, found: int | None = None, least: float = 0.0
) -> list[Candidate]:
    """Every depth of one option that promises more than `least`.

    Args:
        found: rows that have a proposal; None for all.
    """
    gains, times, rows = history.gains(option.widths, now.limits_of(option)), now.times.by_depth[index], now.rows
    share = 1.0 if found is None else found / rows
    depths = range(1, len(gains)) if option.any_depth else range(len(gains) - 1, len(gains))
    out = []
    for depth in depths:
        tokens, ms = rows + share * gains[depth], times[depth]
        if tokens > least * ms:
            out.append(Candidate(tokens / ms, index, depth, tokens, ms))
    return out


def fastest(
    good: Sequence[Candidate], current: tuple[int, int] | None, allowed: Callable[[Candidate], bool]
) -> Candidate | None:
    """The allowed candidate with the best rate; `current` (option, depth) unless another is clearly faster."""
    same = next((one for one in good if (one.option, one.depth) == current), None)
    for best in sorted(good, key=itemgetter(0), reverse=True):
        if same is not None and best.rate < SWITCH * same.rate and allowed(same):
            return same
        if allowed(best):
            return best
    return None


def ends_sooner(candidate: Candidate, option: Option, history: AcceptanceHistory, now: Situation) -> bool:
    """Will the whole batch be finished sooner than plainly?

    More tokens per second are no gain for who waits for the slowest row: rows whose drafts are rejected pay for
    the drafts of the others, and go on alone when those have finished.
    """
    if now.rows == 1:
        return candidate.rate > now.plain_rate
    limits = now.limits_of(option)
    paces = [1.0 + history.reach(option.widths, row)[min(candidate.depth, limit)] for row, limit in limits]
    return _drafted_total(candidate, paces, now) < _LATER * now.plain_total


def _drafted_total(candidate: Candidate, paces: Sequence[float], now: Situation) -> float:
    """Milliseconds until the last row is done: drafting while that pays for the rows still running, else plainly."""
    remaining = [(float(tokens), pace) for tokens, pace in zip(now.left, paces, strict=True)]
    total = 0.0
    while remaining:
        count = len(remaining)
        times = now.times_of(count)
        ms, plain = times.by_depth[candidate.option][candidate.depth], times.plain
        drafting = sum(pace for _, pace in remaining) * plain >= count * ms
        emitted = [pace if drafting else 1.0 for _, pace in remaining]
        steps = min(tokens / each for (tokens, _), each in zip(remaining, emitted, strict=True))
        total += steps * (ms if drafting else plain)
        after = [(tokens - steps * each, pace) for (tokens, pace), each in zip(remaining, emitted, strict=True)]
        remaining = [row for row in after if row[0] > 1e-6]
    return total
