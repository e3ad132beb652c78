"""`python -m specdec.experiments.laws`: do the texts of the real `generate` follow the target's law?"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from typing import Any

from specdec.experiments.frame import Command, ResultFile, started
from specdec.experiments.laws.options import Budget, LawsOptions


def run(options: LawsOptions) -> int:
    """Do the texts of the real `generate` follow the target's law?

    Every lossless sampling rule with every drafter it takes, in wide batches and in batches of 1, 3 and 17 ragged rows:
    the joint law of tokens 1-4 and that of the first token of step 2 against the enumerated law of a tiny Llama, under
    an unfiltered and a filtered setting. Every planted bug must be refused by the same judgement. Writes one JSON file
    with its provenance; exit code 1: a law is wrong, or a bug was missed.
    """
    from specdec.experiments.display import tracked
    from specdec.experiments.laws.judge import ALPHA
    from specdec.experiments.laws.run import judge_controls, judge_pairs, passed, summary
    from specdec.experiments.laws.world import JOINT, PROMPTS, SETTINGS, VOCAB, pairs

    chosen = pairs(options.rules, options.drafters)
    home = [pair for pair in chosen if pair.is_home and options.only != "others"]
    others = [pair for pair in chosen if not pair.is_home and options.only != "home"]
    budget = {one.name: getattr(options, one.name) for one in dataclasses.fields(Budget)}
    source = started(
        options, vocab=VOCAB, joint_tokens=JOINT, prompts=PROMPTS, settings=SETTINGS,
        alpha=ALPHA, minutes=options.minutes,
        budget={name: value for name, value in budget.items() if value != math.inf},
    )  # fmt: skip
    result = ResultFile(options.out, "laws", source, summary={}, cells=[], controls=[])
    start = time.perf_counter()

    def keep(kind: str, one: dict[str, Any]) -> None:  # an interrupted run has still found something
        found = result.content
        found[kind].append(one)
        seconds = round(time.perf_counter() - start)
        found["summary"] = {**summary(found["cells"], found["controls"], options), "seconds": seconds}
        result.write()
        if not passed(one):
            print(f"FAILED: {json.dumps(one)}")

    for one in tracked(judge_pairs(home, options), "made for each other"):
        keep("cells", one)
    for one in tracked(judge_controls(options), "planted bugs"):
        keep("controls", one)
    deadline = math.inf if options.minutes is None else start + 60 * options.minutes
    for one in tracked(judge_pairs(others, options, deadline), "other pairs"):
        keep("cells", one)
    print(json.dumps(result.content["summary"], indent=1))
    result.finish()
    return 0 if all(passed(one) for kind in ("cells", "controls") for one in result.content[kind]) else 1


main = Command(LawsOptions, run)

if __name__ == "__main__":
    sys.exit(main())
