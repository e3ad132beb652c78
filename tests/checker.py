"""The one comparison all equality tests use: speculative `generate` against `transformers`' plain greedy `generate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import models
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.drafters import NgramDrafter

NEAR_TIE = 1e-5
"""Below this gap of the two best processed scores float32 rounding decides, and either token is a correct argmax."""


@dataclass(frozen=True)
class Drafting:
    """How a case drafts: `kind` is "none", "chain" (`k`), "tree" (`widths`) or "ngram" (`k`, `branches`)."""

    kind: str
    model: str = "near"
    k: int = 4
    widths: tuple[int, ...] = ()
    branches: int = 1

    def speculator(self, target: PreTrainedModel, family: str, dtype: str, seed: int, **options: Any) -> Any:
        if self.kind == "none":
            return specdec.Speculator(target, **options)
        if self.kind == "ngram":
            return specdec.Speculator(target, NgramDrafter(k=self.k, branches=self.branches), **options)
        draft = models.draft(self.model, family, dtype, seed)
        if self.kind == "tree":
            return specdec.Speculator(target, draft, tree=self.widths, **options)
        return specdec.Speculator(target, draft, k=self.k, **options)


TREES = ((2,), (2, 2), (3, 2, 1), (1, 2, 2), (4, 1, 1, 1), (2, 1, 2, 1))


def draftings(
    models_from: tuple[str, ...] = models.DRAFTS, kinds: tuple[str, ...] = ("chain", "tree", "ngram", "none")
) -> st.SearchStrategy[Drafting]:
    names = st.sampled_from(models_from)
    by_kind = {
        "chain": st.builds(Drafting, st.just("chain"), names, st.integers(1, 16)),
        "tree": st.builds(Drafting, st.just("tree"), names, st.just(0), st.sampled_from(TREES)),
        "ngram": st.builds(Drafting, st.just("ngram"), k=st.integers(1, 16), branches=st.integers(1, 3)),
        "none": st.just(Drafting("none")),
    }
    return st.one_of(*(by_kind[kind] for kind in kinds))


@dataclass(frozen=True)
class Case:
    """One comparison; plain data, so that a failing case prints as something one can paste."""

    family: str
    dtype: str
    lengths: tuple[int, ...]
    drafting: Drafting
    new_tokens: int
    seed: int = 0
    prompt_seed: int = 0
    period: int = 0
    eos: int | tuple[int, ...] | None = None
    attention: str = "sdpa"
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> PreTrainedModel:
        return models.target(self.family, self.dtype, self.seed, self.attention)

    @property
    def vocab(self) -> int:
        return int(self.target.config.get_text_config().vocab_size)

    @property
    def exact(self) -> bool:
        """Whether both sides compute in float64 throughout: eager attention takes its softmax in float32."""
        return self.dtype == "fp64" and self.target.config.get_text_config()._attn_implementation != "eager"

    def inputs(self) -> dict[str, Any]:
        """Arguments for both sides. Plain eager attention yields NaN on float64 pads: such prompts are not padded."""
        lengths = self.lengths
        if self.dtype == "fp64" and not self.exact:
            lengths = (max(lengths),) * len(lengths)
        ids, mask = models.prompts(lengths, self.vocab, self.prompt_seed, self.period)
        eos = list(self.eos) if isinstance(self.eos, tuple) else self.eos
        return dict(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=self.new_tokens, eos_token_id=eos,
            pad_token_id=models.PAD,
        )  # fmt: skip

    def speculator(self, **options: Any) -> Any:
        return self.drafting.speculator(self.target, self.family, self.dtype, self.seed, **options)


class NearTies:
    """Counts float32 cases whose first difference lies on a near-tie of the target's own scores."""

    def __init__(self) -> None:
        self.cases = 0
        self.ties = 0

    def check(self, case: Case, plain: Callable[..., Any], fast: Callable[..., Any]) -> None:
        """Assert that `fast(...)` returns the tokens of `plain(...)`; both take `generate`'s output options.

        Raises:
            AssertionError: a difference, in float64 or where the two best scores of plain decoding are apart.
        """
        self.cases += 1
        expected, got = plain(), fast()
        if expected.shape == got.shape and torch.equal(expected, got):
            return
        where = first_difference(expected, got)
        message = f"{case}\nfirst difference at {where}\nplain: {expected.tolist()}\nours:  {got.tolist()}"
        assert not case.exact, message
        scores = plain(output_scores=True, return_dict_in_generate=True).scores
        for row, column in where.items():
            best = scores[column - (expected.shape[1] - len(scores))][row].topk(2).values
            assert best[0] - best[1] < NEAR_TIE, f"{message}\nrow {row}: not a near-tie, best scores {best.tolist()}"
        self.ties += 1

    def assert_rare(self) -> None:
        """Fewer than one case in a hundred may lean on the near-tie allowance."""
        assert self.ties * 100 < max(self.cases, 1), f"{self.ties} near-ties in {self.cases} cases"


def first_difference(expected: Tensor, got: Tensor) -> dict[int, int]:
    """Per differing row, the first column where the two differ (a missing column differs)."""
    if expected.shape[0] != got.shape[0]:
        raise AssertionError(f"expected {expected.shape[0]} rows, got {got.shape[0]}")
    width = min(expected.shape[1], got.shape[1])
    out = {}
    for row in range(expected.shape[0]):
        apart = (expected[row, :width] != got[row, :width]).nonzero()
        if len(apart):
            out[row] = int(apart[0])
    if not out and expected.shape != got.shape:
        raise AssertionError(f"same tokens but lengths differ: plain {expected.shape[1]}, ours {got.shape[1]}")
    return out


def compare(case: Case, ties: NearTies, **arguments: Any) -> Any:
    """Run one case on both sides and compare. `arguments` are given to both; returns the Speculator's report."""
    target: Any = case.target
    speculator = case.speculator()
    inputs = {**case.inputs(), **case.arguments, **arguments}
    ties.check(case, lambda **more: target.generate(**inputs, **more), lambda: speculator.generate(**inputs))
    return speculator.report
