"""`python -m specdec.experiments.planner sweep|never-slower`: does the planner keep its promises on this machine?"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from specdec.experiments.frame import Command, ResultFile, started
from specdec.experiments.planner.options import SWEEP, PlannerOptions

if TYPE_CHECKING:
    from specdec.experiments.planner.calls import Call


def run(options: PlannerOptions) -> None:
    """Does the planner keep its promises on this machine?

    sweep: the planned drafters against every fixed setting; foretold against realised speed. never-slower: workloads
    that make drafts useless, against plain `generate` and `draft=None`. Each writes one JSON file with its provenance.
    """
    from specdec.experiments.planner import findings
    from specdec.experiments.planner.processes import measured

    source = started(options, options=options.to_dict("out"))
    result = ResultFile(options.out, f"planner-{options.what}", source, runs={})
    find = findings.sweep if options.what == SWEEP else findings.never_slower
    calls: dict[tuple[str, str], list[Call]] = {}
    runs: dict[str, dict[str, Any]] = result.content["runs"]
    for batch in measured(options):
        known = calls.setdefault((batch.run, batch.part), [])
        known += batch.calls
        run = runs.setdefault(batch.run, {"found": {}, "calls": {}})
        run["found"][batch.part] = find(known)
        run["calls"][batch.part] = [asdict(replace(call, steps=())) for call in known]
        result.write()  # after every prompt
    told = []
    for name, run in runs.items():
        for part, found in run["found"].items():
            # The findings that judge the planner: a sweep has one for each planned drafter.
            judged = {way: found[way] for way in found if "planned" in way} if part == SWEEP else {part: found}
            for way, one in judged.items():
                told.append(one)
                print(f"{name} {way}:", json.dumps(one))
    right, of = findings.right_forecasts(told)
    result.content["forecasts"] = {"within_15_percent": right, "of": of}
    print(f"forecasts within {findings.CLOSE:.0%} of what came: {right} of {of}")
    result.finish()


main = Command(PlannerOptions, run)

if __name__ == "__main__":
    sys.exit(main())
