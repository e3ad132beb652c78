"""What steps cost on this machine: a table of milliseconds, read where it was measured and interpolated between."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from specdec.kv import UnsupportedArgumentError
from specdec.planner.acceptance import Belief

_MOST_DECISIONS = 1e9
"""More of them nobody has seen while measuring, and a belief in so many would never change again."""
MOST_MS = 3.6e6
"""An hour for one step."""
LEAST_MS = 1e-4
"""A tenth of a microsecond."""
LEAST_SHARE = 0.2
"""A step with a draft does all that a plain one does: measured on a busy machine it may seem faster, not by far."""
MOST_SHARE = 1e5
"""Plain steps that one step with a draft may take at most."""


@dataclass(frozen=True)
class Costs:
    """Milliseconds of whole steps (draft, verify, law, rule, bookkeeping) at one number of rows.

    plain: a step without a draft. steps: per option, depth drafted -> a step with it.
    draft_token: catching up one token of every row with the draft model (it has missed plain steps, or the prompt).
    prompt_token: the target's prefill, per token of every row.
    """

    rows: int
    plain: float
    steps: Mapping[str, Mapping[int, float]]
    draft_token: float = 0.0
    prompt_token: float = 0.0
    beliefs: Mapping[str, Belief] = field(default_factory=dict)
    """By family, how the drafts fared that were made while measuring, or would have."""
    found: Mapping[str, float] = field(default_factory=dict)
    """By option that may be empty, the share of rows it had a proposal for meanwhile."""
    seconds: float = field(default=0.0, compare=False)
    """What measuring took; 0 for a table that was found."""

    def step(self, option: str, depth: int) -> float:
        """A step that drafts `depth` levels with `option`; linear between measured depths and beyond the last."""
        if depth < 1:
            return self.plain
        known = self.steps[option]
        if depth in known:
            return known[depth]
        depths = [0, *sorted(known)]
        right = min(bisect_left(depths, depth), len(depths) - 1)
        left = right - 1
        low, high = (self.plain if depths[i] == 0 else known[depths[i]] for i in (left, right))
        return low + (high - low) * (depth - depths[left]) / (depths[right] - depths[left])

    def to_json(self) -> dict[str, Any]:
        steps = {name: {str(depth): ms for depth, ms in table.items()} for name, table in self.steps.items()}
        beliefs = {name: {str(width): [list(counts) for counts in seen] for width, seen in belief.items()}
                   for name, belief in self.beliefs.items()}  # fmt: skip
        return {"rows": self.rows, "plain": self.plain, "steps": steps, "draft_token": self.draft_token,
                "prompt_token": self.prompt_token, "beliefs": beliefs, "found": dict(self.found)}  # fmt: skip

    @staticmethod
    def from_json(data: Any) -> Costs:
        """The inverse of `to_json`.

        Raises:
            UnsupportedArgumentError: anything that is not such a table, with what is wrong.
        """
        try:
            steps = {str(name): {int(depth): float(ms) for depth, ms in table.items()}
                     for name, table in data["steps"].items()}  # fmt: skip
            beliefs = {str(name): {int(width): _counts(*seen) for width, seen in belief.items()}
                       for name, belief in data.get("beliefs", {}).items()}  # fmt: skip
            found = {str(name): float(share) for name, share in data.get("found", {}).items()}
            costs = Costs(int(data["rows"]), float(data["plain"]), steps, float(data["draft_token"]),
                          float(data["prompt_token"]), beliefs, found)  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UnsupportedArgumentError(f"expected a cost table, got {type(error).__name__}: {error}") from None
        numbers = [costs.plain, *(ms for table in steps.values() for ms in table.values())]
        depths = [depth for table in steps.values() for depth in table]
        if not all(0 < ms < float("inf") for ms in numbers) or min(depths, default=1) < 1 or not all(steps.values()):
            raise UnsupportedArgumentError("expected a cost table of positive milliseconds at depths >= 1")
        if not all(0 <= ms < float("inf") for ms in (costs.draft_token, costs.prompt_token)):
            raise UnsupportedArgumentError("expected a cost table of milliseconds per token >= 0")
        if not all(0 <= share <= 1 for share in found.values()):
            raise UnsupportedArgumentError("expected a cost table of shares found between 0 and 1")
        return costs


class StepTimes(NamedTuple):
    """A table as a planner reads it, thousands of times: milliseconds by option and depth, nothing left to work out.

    by_depth: per option, steps that draft 0, 1, ... levels with it.
    """

    plain: float
    by_depth: Sequence[Sequence[float]]
    draft_token: float

    @staticmethod
    def of(costs: Costs, deepest: Mapping[str, int]) -> StepTimes:
        """The table for options, by name, of so many levels."""
        steps = [[costs.step(name, depth) for depth in range(levels + 1)] for name, levels in deepest.items()]
        return StepTimes(costs.plain, steps, costs.draft_token)


def _counts(tried: Any, kept: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Decisions and acceptances by depth, checked."""
    seen = tuple(map(float, tried)), tuple(map(float, kept))
    if len(seen[0]) != len(seen[1]) or not all(0 <= k <= t < _MOST_DECISIONS for t, k in zip(*seen, strict=True)):
        raise ValueError("acceptances that do not fit the decisions")
    return seen


def implausible(costs: Costs, rows: int, depths: Mapping[str, Collection[int]]) -> str | None:
    """What is wrong with a table for these options, None where nothing is.

    Args:
        rows: of the steps it should be about. depths: by option, those it can draft.
    """
    if costs.rows != rows:
        return f"it is about {costs.rows} rows, not {rows}"
    if not set(depths) <= set(costs.steps):
        return f"it is about {sorted(costs.steps)[:4]}, not {sorted(depths)}"
    if not LEAST_MS <= costs.plain <= MOST_MS:
        return f"a plain step of {costs.plain:g} ms"
    for name, table in costs.steps.items():
        if name in depths and not set(table) <= set(depths[name]):
            return f"{name} at depths {sorted(set(table) - set(depths[name]))[:4]}, where it does not draft"
        for depth, ms in table.items():
            if not LEAST_SHARE * costs.plain <= ms <= MOST_SHARE * costs.plain:
                return f"a step of {ms:g} ms with {name} at depth {depth}, where a plain one takes {costs.plain:g}"
    for what, ms in (("catching up", costs.draft_token), ("reading", costs.prompt_token)):
        if ms > MOST_SHARE * costs.plain:
            return f"{ms:g} ms for {what} a token, where a plain step takes {costs.plain:g}"
    return None
