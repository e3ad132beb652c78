"""Every rule on the real logits of a pair: tokens per step measured and worked out from logged texts, tokens/s."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import process_time
from typing import Any

import torch
from torch import Tensor

from specdec.experiments.accept.counterfactual import reach_law
from specdec.experiments.accept.interval import Mean, ratio
from specdec.experiments.accept.logbook import laws
from specdec.experiments.accept.models import Models
from specdec.experiments.accept.options import AcceptOptions
from specdec.experiments.accept.setting import Setting
from specdec.experiments.accept.steps import expected_steps
from specdec.experiments.accept.summary import Summary, summarise
from specdec.experiments.corpus import held_out_prompts
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
    options = AcceptOptions(new_tokens=size.tokens, seed=size.seed)
    prompts = torch.tensor(
        held_out_prompts(models.tokenizer, size.prompts, size.prompt_tokens, seed=size.seed), device=models.device
    )
    sampling = {**options.sampling(temperature), "max_new_tokens": size.tokens}
    advance("logged texts")
    texts = logged(models, prompts, temperature, options)
    plain = _speeds(Speculator(models.target), prompts[: size.timed], sampling)
    found = []
    for number, (setting, rule) in enumerate(rivals()):
        advance(f"{setting} {rule}")
        spec = Speculator(models.target, setting.build(models.draft), rule=rule)
        measured = run_batch(spec, prompts, sampling, seed=1_000_003 * (number + 1) + size.seed)
        expected, accepted = score(texts, setting, rule, temperature, size.tokens)
        speeds = _speeds(spec, prompts[: size.timed], sampling)
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
    writer = Speculator(models.target, models.draft, k=4)
    out = writer.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=options.new_tokens, seed=options.seed,
        **options.sampling(temperature),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    columns = prompts.shape[1]
    found = []
    for row, text in enumerate(out):
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


def run_batch(spec: Speculator, prompts: Tensor, sampling: dict[str, Any], seed: int) -> Mean:
    """Tokens per step of one batch, with the standard error over rows. No row ends early (no end token)."""
    steps = [0] * len(prompts)
    tokens = [0] * len(prompts)

    def count(trace: StepTrace) -> None:
        for row, emitted in zip(trace.rows, trace.emitted, strict=True):
            steps[row] += 1
            tokens[row] += len(emitted)

    spec.generate(prompts, attention_mask=torch.ones_like(prompts), seed=seed, on_step=count, **sampling)
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0, spec.report.last_drafter_fault
    return ratio(tokens, steps)


def _speeds(spec: Speculator, prompts: Tensor, sampling: dict[str, Any]) -> list[float]:
    """Tokens per second of processor time of each prompt alone, after one call that is not counted.

    Processor time, not the clock's: on one thread both agree when nothing else runs, and other processes change it
    little.
    """
    found = []
    for number, ids in enumerate([prompts[:1], *prompts.split(1)] if len(prompts) else []):
        start = process_time()
        spec.generate(ids, attention_mask=torch.ones_like(ids), seed=number, **sampling)
        assert spec.report is not None
        found.append(spec.report.num_emitted_tokens / (process_time() - start))
    return found[1:]
