"""What the sampling-law tests and their negative controls share: draw through the real generate(), then judge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from exact_law import joint_law, next_laws
from stats import LawMismatch, g_test, g_test_strata, judge, judge_mean, samples_for
from torch import Tensor

from specdec import Speculator, StepTrace
from specdec.verify import DraftTree, Noise, Verdict
from specdec.verify.rules import RULES

CHUNK = 8000
"""Rows of one generate call."""
NEW = 3
"""Tokens of the judged joint law."""


def draw(spec: Speculator, prompts: Tensor, mask: Tensor, samples: int, seed: int, **sampling: Any) -> Tensor:
    """Continuations `[prompts, >= samples, NEW]` from as few calls as possible, every row with its own noise."""
    columns = prompts.shape[1]
    repeats = min(samples, CHUNK // prompts.shape[0])
    parts = []
    for call in range(-(-samples // repeats)):
        out = spec.generate(
            prompts, attention_mask=mask, do_sample=True, max_new_tokens=NEW, num_return_sequences=repeats,
            seed=1000 * seed + call, **sampling,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        if out.shape[1] < columns + NEW:  # every row met its end earlier
            out = torch.nn.functional.pad(out, (0, columns + NEW - out.shape[1]))
        parts.append(out.view(prompts.shape[0], repeats, -1)[:, :, columns:])
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0, spec.report.last_drafter_fault
    return torch.cat(parts, dim=1)


def counts_of(tokens: Tensor, vocab: int) -> np.ndarray:
    """How often each continuation `[samples, NEW]` occurs, `[vocab ** NEW]`."""
    weights = vocab ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return torch.bincount((tokens * weights).sum(1), minlength=vocab ** tokens.shape[1]).numpy()


def check_joint_law(
    spec: Speculator,
    prompts: Tensor,
    mask: Tensor | None = None,
    seed: int = 1,
    samples: int | None = None,
    **sampling: Any,
) -> None:
    """Judge the joint law of the first NEW tokens of every prompt against its enumeration.

    Args:
        samples: per prompt; by default what the test's promised power asks for (negative controls may use fewer: a
            bug that is seen with fewer is seen with more).
    """
    mask = torch.ones_like(prompts) if mask is None else mask
    laws = [
        joint_law(spec.target, prompts[row : row + 1], mask[row : row + 1], NEW, **sampling).numpy().ravel()
        for row in range(prompts.shape[0])
    ]
    if samples is None:
        samples = max(samples_for(law) for law in laws)
    drawn = draw(spec, prompts, mask, samples, seed, **sampling)
    for row, law in enumerate(laws):
        result = g_test(counts_of(drawn[row], spec.target.config.vocab_size), law)
        judge(result, f"joint law of tokens 1-{NEW} after prompt {row}")


def check_second_step(spec: Speculator, prompt: Tensor, samples: int, seed: int = 1, **sampling: Any) -> None:
    """Judge the first token of step 2 given everything step 1 emitted (hence also given how many it accepted).

    Noise that two steps share leaves each step's own law intact and shows only here.
    """
    runs: dict[int, list[list[int]]] = {0: [], 1: []}
    order: dict[int, list[int]] = {}

    def keep(trace: StepTrace) -> None:
        if trace.step in runs:
            runs[trace.step], order[trace.step] = trace.emitted, trace.rows

    mask = torch.ones_like(prompt)
    spec.generate(
        prompt, attention_mask=mask, do_sample=True, max_new_tokens=8, num_return_sequences=samples, seed=seed,
        on_step=keep, **sampling,
    )  # fmt: skip
    assert order[0] == order[1] == list(range(samples)), "a row finished before its second step"
    seen: dict[tuple[int, ...], list[int]] = {}
    for first, second in zip(runs[0], runs[1], strict=True):
        seen.setdefault(tuple(first), []).append(second[0])
    vocab = spec.target.config.vocab_size
    counts, laws = [], []
    for run, tokens in seen.items():
        laws.append(next_laws(spec.target, prompt, mask, torch.tensor([run]), **sampling)[0].numpy())
        counts.append(np.bincount(tokens, minlength=vocab))
    judge(g_test_strata(counts, laws), "law of the first token of step 2 given step 1")


def check_acceptance(spec: Speculator, prompt: Tensor, samples: int, seed: int = 1, **sampling: Any) -> None:
    """Judge how many tokens each step really accepts against what the theory says of the very same draft."""
    kind = RULES[spec.rule]
    differences: list[Tensor] = []
    accepted: list[float] = []

    class Recording(kind):  # type: ignore[misc, valid-type]
        def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
            verdict: Verdict = super().__call__(tree, p, noise)
            excess = self.excess(tree, p, verdict)
            assert excess is not None
            differences.append(excess.mean)
            accepted.append(float(verdict.num_accepted.double().mean()))
            return verdict

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RULES, spec.rule, Recording)
        draw(spec, prompt, torch.ones_like(prompt), samples, seed, **sampling)
    assert sum(accepted) > 0.1, "nothing is accepted: the test would say nothing"
    judge_mean(torch.cat(differences).numpy(), f"accepted tokens per step under rule {spec.rule!r}")


@contextmanager
def must_be_caught() -> Iterator[None]:
    """A planted bug: the judged law must be refused, and by nothing else than the judgement."""
    with pytest.raises(LawMismatch):
        yield
