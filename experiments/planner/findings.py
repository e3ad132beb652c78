"""What calls say of the planner: is it ever slower, does it choose well, does it foretell its speed?"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from specdec.experiments.planner.calls import Call, ratio, ratio_by_steps, ratio_to_others_best

CLOSE = 0.15
"""A forecast is right when the realised speed is within this share of it."""


def sweep(calls: Sequence[Call]) -> dict[str, Any]:
    """Each planned drafter against the fixed settings it may choose from (and plain decoding)."""
    ways = list(dict.fromkeys(call.way for call in calls))
    names = [name for name in ways if not name.startswith("planned")]
    found: dict[str, Any] = {
        "speed_up_over_none": {name: ratio(calls, name, "none") for name in ways},
        "tokens_per_step": {
            name: round(mean(one.tokens_per_step for one in calls if one.way == name), 3) for name in ways
        },
    }
    for way in sorted(set(ways) - set(names)):
        drafters = way.removeprefix("planned ").split("+")
        rivals = [name for name in names if name == "none" or name.split()[0] in drafters]
        best = max(rivals, key=lambda name: found["speed_up_over_none"][name]["total"])
        found[way] = {
            "best_fixed": best,
            "against_best_fixed": ratio(calls, way, best),
            "against_best_fixed_on_other_prompts": ratio_to_others_best(calls, way, rivals),
            **forecasts(calls, way),
        }
    return found


def never_slower(calls: Sequence[Call]) -> dict[str, Any]:
    """One adversarial workload, planned, against plain generation and against no drafter; and no drafter against
    itself, which is what the clock can tell apart."""
    ways = {call.way for call in calls}
    rivals = (("hf_plain", "hf plain"), ("none", "none"))
    return {
        **{f"against_{name}": ratio(calls, "planned", way) for name, way in rivals if way in ways},
        "none_against_itself": ratio(calls, "none again", "none"),
        "against_none_by_steps": ratio_by_steps(calls, "planned", "none"),
        **forecasts(calls, "planned"),
    }


def forecasts(calls: Sequence[Call], way: str) -> dict[str, Any]:
    """Foretold / realised tokens per second of every call, and the share of them that is close."""
    plans = [call.plan for call in calls if call.way == way and call.plan is not None]
    ratios = [plan["predicted_tokens_per_second"] / plan["realised_tokens_per_second"] for plan in plans]
    share = sum(map(close, ratios)) / len(ratios)
    return {"forecast_over_realised": [round(r, 3) for r in ratios], "share_within_15_percent": round(share, 3)}


def close(times: float) -> bool:
    """Is a forecast right that is so many times what came?"""
    return 1 / (1 + CLOSE) <= times <= 1 + CLOSE


def right_forecasts(found: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """How many forecasts of some findings were right, and how many there are."""
    every = [times for one in found for times in one.get("forecast_over_realised", [])]
    return sum(map(close, every)), len(every)
