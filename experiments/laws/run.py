"""One run: every cell (a rule, a drafter, a batch size) judged, then every planted bug."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from specdec.experiments.laws.controls import controls
from specdec.experiments.laws.judge import ALPHA, Counts
from specdec.experiments.laws.options import Budget
from specdec.experiments.laws.texts import Texts, uncollected, write
from specdec.experiments.laws.world import DRAFTERS, SETTINGS, Pair, target
from specdec.speculator import Speculator


def judge_pairs(chosen: Sequence[Pair], budget: Budget, deadline: float = math.inf) -> Iterator[dict[str, Any]]:
    """Every pair in turn; what is left until `deadline` (of `perf_counter`) is shared evenly by those to come."""
    for number, pair in enumerate(chosen):
        left = deadline - time.perf_counter()
        yield from judge_pair(pair, budget.within(left / (len(chosen) - number)) if left < math.inf else budget)


def judge_pair(pair: Pair, budget: Budget) -> Iterator[dict[str, Any]]:
    """The wide cell of a pair, then its small batches, one result each.

    Small batches write the very texts of the wide one: so their law is the one that was judged with the wide batch's
    power, up to the probability that a text depends on its batch. That probability is bounded by counting. A race's
    texts are also compared with those of the same seeds without a drafter.
    """
    spec = Speculator(target(), DRAFTERS[pair.drafter](), rule=pair.rule)
    start = time.perf_counter()
    counts = Counts()
    wide: list[Texts] = []
    call = 0
    while counts.samples < budget.samples and (call < len(SETTINGS) or time.perf_counter() - start < budget.seconds):
        rows = min(budget.chunk, max(1, budget.samples - counts.samples))
        with uncollected():
            texts = write(spec, call % len(SETTINGS), call // len(SETTINGS) * budget.chunk, rows)
        counts.add(texts)
        if call < len(SETTINGS):
            wide.append(texts)
        call += 1
    yield {**_result(pair, budget.chunk, counts, start), **(_without_drafter(pair, wide) if pair.races else {})}
    for size in budget.batches:
        yield _small(pair, spec, size, wide, budget)


def _without_drafter(pair: Pair, wide: Sequence[Texts]) -> dict[str, Any]:
    plain = Speculator(target(), None, rule=pair.rule)
    differing = 0
    for known in wide:
        texts = write(plain, known.setting, 0, len(known.tokens))
        differing += int((texts.tokens != known.tokens).any(1).sum())
    compared = sum(len(known.tokens) for known in wide)
    return {"same texts as without a drafter": {"compared": compared, "differing": differing, "passed": not differing}}


def _small(pair: Pair, spec: Speculator, size: int, wide: Sequence[Texts], budget: Budget) -> dict[str, Any]:
    start = time.perf_counter()
    counts = Counts()
    differing = call = 0
    while counts.samples < budget.small_samples or time.perf_counter() - start < budget.small_seconds:
        if call >= len(wide) and time.perf_counter() - start > budget.small_limit:
            break
        known = wide[call % len(wide)]
        first = call // len(wide) * size
        if first + size > len(known.tokens):
            break
        texts = write(spec, known.setting, first, size)
        counts.add(texts)
        differing += int((texts.tokens != known.tokens[first : first + size]).any(1).sum())
        call += 1
    same = {
        "differing": differing,
        # With no difference among n texts, a probability above this would have shown with probability 1 - ALPHA.
        "tv_to_wide_batch": round(1 - ALPHA ** (1 / max(1, counts.samples)), 4) if not differing else None,
        "passed": differing == 0,
    }
    return {**_result(pair, size, counts, start), "same texts as the wide batch": same}


def _result(pair: Pair, batch: int, counts: Counts, start: float) -> dict[str, Any]:
    judged = counts.judge()
    if not pair.has_step_law:
        judged["step 2"]["passed"] = None
    return {**pair._asdict(), "batch": batch, **judged, "seconds": round(time.perf_counter() - start, 1)}


def judge_controls(budget: Budget) -> Iterator[dict[str, Any]]:
    """Every planted bug, judged as the library is."""
    for control in controls() if budget.control_samples else ():
        yield control.run(budget.control_samples, budget.chunk)


def passed(result: dict[str, Any]) -> bool:
    """Did every test of a cell pass (None: nothing is promised), or was the planted bug seen?"""
    if "control" in result:
        return bool(result["caught"])
    return all(part["passed"] is not False for part in result.values() if isinstance(part, dict))


def _ends(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)] if values else []


def summary(cells: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], budget: Budget) -> dict[str, Any]:
    """The run in a few numbers: how many cells, the best and the least power of any, the worst p."""
    wide = [cell for cell in cells if cell["batch"] == budget.chunk]
    small = [cell for cell in cells if cell["batch"] != budget.chunk]
    silent = [cell for cell in cells if cell["step 2"]["passed"] is None]
    bounds = [cell["same texts as the wide batch"]["tv_to_wide_batch"] for cell in small]
    tests = [cell[name] for cell in cells for name in ("joint", "step 2") if cell[name]["passed"] is not None]
    return {
        "pairs": len(wide),
        "cells": len(cells),
        "failed_cells": [[c["rule"], c["drafter"], c["batch"]] for c in cells if not passed(c)],
        "samples": sum(cell["samples"] for cell in cells),
        "wide_samples": _ends([cell["samples"] for cell in wide]),
        "detectable_tv_joint_wide": _ends([cell["joint"]["detectable_tv"] for cell in wide]),
        "detectable_tv_step2_wide": _ends([c["step 2"]["detectable_tv"] for c in wide if c not in silent]),
        "tv_small_to_wide": _ends([1.0 if bound is None else bound for bound in bounds]),
        "tests": len(tests),
        "smallest_p": min((test["p"] for test in tests), default=1.0),
        "not_promised": sorted({f"{c['rule']}, {c['drafter']}: step 2" for c in silent}),
        "controls": len(found),
        "controls_missed": [[c["control"], c["rule"]] for c in found if not passed(c)],
    }
