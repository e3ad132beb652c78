"""A row's text does not depend on the rows around it, and equal prompts are prefilled once."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from checker import Case, Drafting
from hypothesis import given, settings
from hypothesis import strategies as st

import specdec

DRAFTINGS = [
    Drafting("none"),
    Drafting("chain", "near", k=4),
    Drafting("chain", "far", k=7),
    Drafting("tree", "near", widths=(3, 2, 1)),
    Drafting("ngram", k=5, branches=3),
]
NEW_TOKENS = 14


def texts(case: Case, rows: list[int], seeds: list[int], **options: Any) -> list[list[int]]:
    """The emitted tokens of `rows` of the case's prompts, decoded as one batch; trailing pads cut."""
    ids, mask = models.prompts(case.lengths, case.vocab, case.prompt_seed, case.period)
    width = max(case.lengths[row] for row in rows)
    inputs = dict(input_ids=ids[rows, -width:], attention_mask=mask[rows, -width:])
    eos = [2, 9, 17]
    out = case.speculator().generate(
        **inputs, seed=[seeds[row] for row in rows], max_new_tokens=NEW_TOKENS, eos_token_id=eos, pad_token_id=0,
        **options,
    )  # fmt: skip
    found = []
    for row in out[:, width:].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        assert set(row[stop:]) <= {0}
        found.append(row[:stop])
    return found


@pytest.mark.parametrize("drafting", DRAFTINGS, ids=lambda drafting: f"{drafting.kind}-{drafting.model}")
@settings(max_examples=14)
@given(data=st.data())
def test_same_row_same_seed_any_companions(drafting: Drafting, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=6).map(tuple))
    case = Case(
        data.draw(st.sampled_from(["llama-gqa", "mistral-window", "gpt2"])),
        "fp64", lengths, drafting, NEW_TOKENS, prompt_seed=data.draw(st.integers(0, 10**6)),
        period=data.draw(st.sampled_from([0, 2])),
    )  # fmt: skip
    sampling: dict[str, Any] = data.draw(
        st.sampled_from(
            [{"do_sample": False}, {"do_sample": True}, {"do_sample": True, "top_p": 0.9, "temperature": 1.3}]
        )
    )
    seeds = data.draw(st.tuples(*(st.integers(0, 2**63) for _ in lengths)).map(list))
    everyone = list(range(len(lengths)))
    alone = [texts(case, [row], seeds, **sampling)[0] for row in everyone]
    company = data.draw(st.permutations(everyone))[: data.draw(st.integers(2, len(lengths)))]
    together = texts(case, list(company), seeds, **sampling)
    assert together == [alone[row] for row in company]


def test_the_length_limit_of_a_longer_companion_does_not_reach_a_row() -> None:
    """max_length counts columns, so rows of one batch have the same limit; drafts near it are cut per row."""
    case = Case("llama-gqa", "fp64", (9, 2), Drafting("chain", "near", k=8), NEW_TOKENS)
    seeds = [3, 4]
    alone = [texts(case, [row], seeds, do_sample=True)[0] for row in (0, 1)]
    assert texts(case, [0, 1], seeds, do_sample=True) == alone


def test_a_batch_that_shares_noise_is_caught() -> None:
    """Negative control: with one int seed the noise is keyed by a row's place, so moving a row changes its text."""
    case = Case("llama-gqa", "fp64", (5, 5), Drafting("chain", "near", k=4), NEW_TOKENS)
    ids = case.inputs()["input_ids"]
    speculator = case.speculator()
    options: dict[str, Any] = dict(do_sample=True, seed=3, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0)
    there = speculator.generate(ids, **options)
    back = speculator.generate(ids.flip(0), **options).flip(0)
    assert not torch.equal(there, back)


class Passes:
    """Shapes of the target's forward passes."""

    def __init__(self, model: Any):
        self.shapes: list[tuple[int, ...]] = []
        self._handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: object, args: object, kwargs: Any) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()


@pytest.mark.parametrize("drafting", DRAFTINGS, ids=lambda drafting: f"{drafting.kind}-{drafting.model}")
def test_return_sequences_share_the_prefill(drafting: Drafting) -> None:
    case = Case("llama-gqa", "fp64", (7, 4), drafting, 8)
    inputs = {**case.inputs(), "do_sample": True, "eos_token_id": None}
    speculator = case.speculator()
    with Passes(case.target) as passes:
        shared = speculator.generate(**inputs, num_return_sequences=3, seed=5)
    # Two prompts without their last tokens, once; then every step serves at most the six rows.
    assert passes.shapes[:2] == [(2, 6), (6, passes.shapes[1][1])]
    assert len(passes.shapes) == 1 + speculator.report.num_steps
    assert max(shape[0] for shape in passes.shapes) == 6
    repeated = {name: inputs[name].repeat_interleave(3, 0) for name in ("input_ids", "attention_mask")}
    assert torch.equal(shared, speculator.generate(**{**inputs, **repeated}, seed=5))
    assert len({tuple(row) for row in shared.tolist()}) == 6


def test_finished_rows_leave_the_forward_passes() -> None:
    case = Case("llama-gqa", "fp64", (5, 5, 5), Drafting("none"), 30, prompt_seed=4)
    inputs = {**case.inputs(), "eos_token_id": [5, 9, 17, 23, 30]}
    with Passes(case.target) as passes:
        out = specdec.Speculator(case.target).generate(**inputs)
    counts = [shape[0] for shape in passes.shapes]
    assert counts == sorted(counts, reverse=True)
    stops = {
        next((i for i, token in enumerate(row) if token in inputs["eos_token_id"]), -1) for row in out[:, 5:].tolist()
    }
    assert len(set(counts)) >= min(len(stops), 2)
