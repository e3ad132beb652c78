"""Does the planner keep its promises on this machine? `python -m specdec.experiments.planner sweep|never-slower`.

sweep: the planned drafters against every fixed setting; foretold against realised speed. never-slower: workloads that
make drafts useless, against plain `generate` and `draft=None`. Each writes one JSON file with its provenance.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from specdec.experiments.planner.cases import WORKLOADS
from specdec.experiments.planner.clock import Call
from specdec.experiments.planner.findings import CLOSE, never_slower, right_forecasts, sweep
from specdec.experiments.planner.processes import SWEEP, measured
from specdec.experiments.provenance import provenance

RESULTS = Path(__file__).parent.parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m specdec.experiments.planner", description=__doc__)
    parser.add_argument("what", choices=(SWEEP, "never-slower"))
    parser.add_argument("--prompts", type=int, default=8, help="batches of prompts")
    parser.add_argument("--repeats", type=int, default=1, help="times each way meets each prompt; the median counts")
    parser.add_argument(
        "--processes", type=int, default=1,
        help="do all of it so many times, each in a process of its own: where memory lies decides on a few percent",
    )  # fmt: skip
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
    for name in ("prompts", "repeats", "processes", "prompt_tokens", "tokens", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(args, name)}")
    options = {name: value for name, value in vars(args).items() if name != "out"}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"planner-{args.what}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    find = sweep if args.what == SWEEP else never_slower
    calls: dict[tuple[str, str], list[Call]] = {}
    result: dict[str, Any] = {"provenance": provenance(seed=0, threads=args.threads, options=options), "runs": {}}
    for batch in measured(args):
        known = calls.setdefault((batch.run, batch.part), [])
        known += batch.calls
        run = result["runs"].setdefault(batch.run, {"found": {}, "calls": {}})
        run["found"][batch.part] = find(known)
        run["calls"][batch.part] = [asdict(replace(call, steps=())) for call in known]
        # After every prompt: an interrupted run keeps what it has found.
        path.write_text(json.dumps(result, indent=1) + "\n")
    told = []
    for name, run in result["runs"].items():
        for part, found in run["found"].items():
            for way, one in _judged(part, found).items():
                told.append(one)
                print(f"{name} {way}:", json.dumps(one))
    right, of = right_forecasts(told)
    result["forecasts"] = {"within_15_percent": right, "of": of}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"forecasts within {CLOSE:.0%} of what came: {right} of {of}")
    print(f"written: {path.name}")


def _judged(part: str, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The findings that judge the planner, by name: a sweep has one for each planned drafter."""
    return {way: found[way] for way in found if way.startswith("planned")} if part == SWEEP else {part: found}


if __name__ == "__main__":
    main()
