"""Every rule on the real logits of a pair: tokens per step measured and worked out from logged texts, tokens/s."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from specdec.experiments.accept.counterfactual import reach_law
from specdec.experiments.accept.logbook import laws
from specdec.experiments.accept.options import AcceptOptions
from specdec.experiments.accept.setting import Setting
from specdec.experiments.accept.steps import expected_steps
from specdec.experiments.accept.summary import Summary, summarise
from specdec.experiments.clock import timed
from specdec.experiments.intervals import Mean, ratio
from specdec.experiments.pair import Models
from specdec.experiments.ways import Generate, speculating
from specdec.speculator import Speculator
from specdec.trace import StepTrace

DRAWN = 4
"""Stored drafts per position that expected figures are averaged over."""
TREES = ("2,1,1,1,1,1", "2,2,2")
CHAINS = (3, 6, 12)
"""The depths of the trees, and the node count of the first (the second drafts 14 tokens)."""
ON_MODE = {
    "mixed": ("budget_flow", "traversal", "recursive_rejection"),
    "sampled": ("traversal", "recursive_rejection"),
    "top": ("naive", "coupled"),
}


def rivals() -> list[tuple[Setting, str]]:
    """Settings and rules of the table. The children of `coupled` are the first to arrive, whatever the mode says."""
    found = [(f"model:k={k}", rule) for k in CHAINS for rule in ("rejection", "block", "coupled")]
    found += [
        (f"model:tree={tree}:children={mode}", rule)
        for tree in TREES
        for mode, rules in ON_MODE.items()
        for rule in rules
    ]
    return [(Setting.parse(setting), rule) for setting, rule in found]


@dataclass(frozen=True)
class Size:
    """How much is run. prompts: texts per setting and rule, one batch; tokens: of each; timed: prompts timed alone."""

    prompts: int = 12
    prompt_tokens: int = 64
    tokens: int = 48
    timed: int = 2
    seed: int = 0


def table(
    models: Models, temperature: float, size: Size, advance: Callable[[str], None] = lambda name: None
) -> list[dict[str, Any]]:
    """One entry per setting and rule: `measured` and `expected` tokens per step, z between them,
    `tokens_per_cpu_second` and its ratio to plain decoding of the same prompts (batch 1).

    Every setting runs on the same prompts with seeds of its own, so that what is measured is independent of the logged
    texts and of one another; what is expected comes from the same texts for all, so that differences are sharp.
    """
    (prompts,) = models.prompts(size.prompts, size.prompt_tokens, size.seed, rows=size.prompts)
    advance("logged texts")
    texts = logged(models, prompts, temperature, AcceptOptions(new_tokens=size.tokens, seed=size.seed))
    plain = _speeds(Speculator(models.target), prompts[: size.timed], temperature, size.tokens)
    found = []
    for number, (setting, rule) in enumerate(rivals()):
        advance(f"{setting} {rule}")
        spec = Speculator(models.target, setting.build(models.draft), rule=rule)
        generate = speculating(spec, size.tokens, temperature)
        measured = run_batch(generate, prompts, seed=1_000_003 * (number + 1) + size.seed)
        expected, accepted = score(texts, setting, rule, temperature, size.tokens)
        speeds = _speeds(spec, prompts[: size.timed], temperature, size.tokens)
        ratios = [ours / base for ours, base in zip(speeds, plain, strict=True)]
        z = (measured.value - expected.value) / math.hypot(measured.error, expected.error)
        found.append({
            "temperature": temperature, "setting": str(setting), "rule": rule, "nodes": setting.num_nodes,
            "depth": len(setting.widths or ()), "measured": measured._asdict(), "expected": expected._asdict(),
            "accepted_per_step": accepted, "z": z, "vs_plain": statistics.median(ratios) if ratios else None,
            "tokens_per_cpu_second": statistics.median(speeds) if speeds else None,
        })  # fmt: skip
    return found


def logged(models: Models, prompts: Tensor, temperature: float, options: AcceptOptions) -> list[Summary]:
    """One text of the target per prompt, summarised."""
    writer = speculating(Speculator(models.target, models.draft, k=4), options.new_tokens, temperature)
    columns = prompts.shape[1]
    found = []
    for row, text in enumerate(writer(prompts, options.seed).ids):
        p, q = laws(models, text[None], columns, temperature, options)
        found.append(summarise(p, q, text[columns:], text[:columns], options.seed + row))
    return found


def score(
    texts: list[Summary], setting: Setting, rule: str, temperature: float, limit: int
) -> tuple[Mean, list[float]]:
    """Expected tokens per step on logged texts, and accepted tokens per step by depth."""
    found = [
        expected_steps(reach_law(text, setting, rule, temperature, seed, DRAWN), limit)
        for seed, text in enumerate(texts)
    ]
    steps = sum(one.steps for one in found)
    kept = [sum(one.kept[i] for one in found) / steps for i in range(len(found[0].kept))]
    return ratio([one.tokens for one in found], [one.steps for one in found]), [float(x) for x in kept]


def run_batch(generate: Generate, prompts: Tensor, seed: int) -> Mean:
    """Tokens per step of one batch, with the standard error over rows. No row ends early (no end token)."""
    steps = [0] * len(prompts)
    tokens = [0] * len(prompts)

    def count(trace: StepTrace) -> None:
        for row, emitted in zip(trace.rows, trace.emitted, strict=True):
            steps[row] += 1
            tokens[row] += len(emitted)

    report = generate(prompts, seed, count).report
    assert report is not None
    assert report.num_drafter_faults == 0, report.last_drafter_fault
    return ratio(tokens, steps)


def _speeds(spec: Speculator, prompts: Tensor, temperature: float, tokens: int) -> list[float]:
    """Tokens per second of processor time of each prompt alone, after one call that is not counted."""
    generate = speculating(spec, tokens, temperature)
    found = []
    for number, ids in enumerate([prompts[:1], *prompts.split(1)] if len(prompts) else []):
        output, spent = timed(partial(generate, ids, number))
        assert output.report is not None
        found.append(output.report.num_emitted_tokens / spent.cpu)
    return found[1:]
