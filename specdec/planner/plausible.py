"""Can a cost table that was found be one that was measured? If not, it is measured again."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from specdec.planner.costs import Costs

MOST_MS = 3.6e6
"""An hour for one step."""
LEAST_MS = 1e-4
"""A tenth of a microsecond."""
LEAST_SHARE = 0.2
"""A step with a draft does all that a plain one does: measured on a busy machine it may seem faster, not by far."""
MOST_SHARE = 1e5
"""Nor does drafting take so many times what a plain step takes."""


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
