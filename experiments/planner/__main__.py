"""Does the planner keep its promises on this machine? `python -m specdec.experiments.planner sweep|never-slower`.

sweep: the planned drafters against every fixed setting; foretold against realised speed. never-slower: workloads that
make drafts useless, against plain `generate` and `draft=None`. Each writes one JSON file with its provenance.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from specdec.experiments.planner.cases import WORKLOADS, Models, fixed, planned, prompts
from specdec.experiments.planner.clock import Call, ratio, ratio_by_steps, time_calls
from specdec.experiments.provenance import provenance

RESULTS = Path(__file__).parent.parent / "results"
CLOSE = 0.15
"""A forecast is right when the realised speed is within this share of it."""


def sweep(models: Models, temperature: float, rows: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each planned drafter against the fixed settings it may choose from (and plain decoding); what is found so far."""
    rule = args.rule if temperature > 0 else "auto"
    ways = {
        **fixed(models, temperature, args.tokens, rule),
        **planned(models, temperature, args.tokens, rule, args.seeded),
    }
    texts = prompts(models, "held-out", rows, args.prompts, args.prompt_tokens)
    names = [name for name in ways if not name.startswith("planned")]
    for calls in time_calls(ways, texts, f"sweep T={temperature} batch {rows}", args.repeats):
        found: dict[str, Any] = {
            "speed_up_over_none": {name: ratio(calls, name, "none") for name in ways},
            "tokens_per_step": {
                name: _mean([one.tokens_per_step for one in calls if one.way == name]) for name in ways
            },
        }
        for way in ways:
            if way in names:
                continue
            drafters = way.removeprefix("planned ").split("+")
            rivals = [name for name in names if name == "none" or name.split()[0] in drafters]
            best = max(rivals, key=lambda name: found["speed_up_over_none"][name]["total"])
            found[way] = {"best_fixed": best, "against_best_fixed": ratio(calls, way, best), **forecasts(calls, way)}
        yield {"found": found, "calls": [asdict(replace(call, steps=())) for call in calls]}
    for way in ways:
        if way not in names:
            print(f"T={temperature} batch {rows} {way}:", json.dumps(found[way]), flush=True)


def never_slower(models: Models, temperature: float, rows: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every adversarial workload, planned, against plain generation and against no drafter; what is found so far."""
    found: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for workload in (one for one in WORKLOADS if one.name in args.workloads):
        ways = workload.ways(models, temperature, args.seeded)
        if args.no_hf:
            del ways["hf plain"]
        texts = prompts(models, workload.prompts, rows, args.prompts, args.prompt_tokens)
        for calls in time_calls(ways, texts, f"{workload.name} T={temperature} batch {rows}", args.repeats):
            rivals = (("hf_plain", "hf plain"), ("none", "none"))
            found[workload.name] = {
                **{f"against_{name}": ratio(calls, "planned", way) for name, way in rivals if way in ways},
                "against_none_by_steps": ratio_by_steps(calls, "planned", "none"),
                **forecasts(calls, "planned"),
            }
            kept[workload.name] = [asdict(replace(call, steps=())) for call in calls]
            yield {"found": found, "calls": kept}
        print(f"T={temperature} batch {rows} {workload.name}:", json.dumps(found[workload.name]), flush=True)


def forecasts(calls: Sequence[Call], way: str) -> dict[str, Any]:
    """Foretold / realised tokens per second of every call, and the share of them that is close."""
    plans = [call.plan for call in calls if call.way == way and call.plan is not None]
    ratios = [plan["predicted_tokens_per_second"] / plan["realised_tokens_per_second"] for plan in plans]
    share = sum(map(close, ratios)) / len(ratios)
    return {"forecast_over_realised": [round(r, 3) for r in ratios], "share_within_15_percent": round(share, 3)}


def close(times: float) -> bool:
    """Is a forecast right that is so many times what came?"""
    return 1 / (1 + CLOSE) <= times <= 1 + CLOSE


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 3)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m specdec.experiments.planner", description=__doc__)
    parser.add_argument("what", choices=("sweep", "never-slower"))
    parser.add_argument("--prompts", type=int, default=8, help="batches of prompts")
    parser.add_argument("--repeats", type=int, default=1, help="times each way meets each prompt; the median counts")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per row (sweep)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rule", default="auto",
                        help="of a sampling sweep; with coupled every way writes the same text, so few prompts tell "
                        "settings apart")  # fmt: skip
    parser.add_argument("--workloads", nargs="+", default=[one.name for one in WORKLOADS])
    parser.add_argument(
        "--no-hf", action="store_true", help="never-slower: against no drafter only, which is the closer race"
    )
    parser.add_argument("--seeded", action="store_true", help="planned calls get seed=: each row is planned by itself")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    options = {name: value for name, value in vars(args).items() if name != "out"}
    result: dict[str, Any] = {"provenance": provenance(seed=0, threads=args.threads, options=options), "runs": {}}
    models = Models.load()
    run = sweep if args.what == "sweep" else never_slower
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"planner-{args.what}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    for rows in args.batches:
        for temperature in args.temperatures:
            for done in run(models, temperature, rows, args):
                result["runs"][f"T={temperature} batch {rows}"] = done
                # After every part: an interrupted run keeps what it has found.
                path.write_text(json.dumps(result, indent=1) + "\n")
    right, told = 0, 0
    for done in result["runs"].values():
        for part in done["found"].values():
            for times in part.get("forecast_over_realised", []):
                right, told = right + close(times), told + 1
    result["forecasts"] = {"within_15_percent": right, "of": told}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"forecasts within {CLOSE:.0%} of what came: {right} of {told}")
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
