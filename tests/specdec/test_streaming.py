"""Streamers see what plain decoding shows them; sampling is reproducible by seed, generator and manual_seed."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import arguments
import pytest
import torch
from checker import Case, Drafting
from transformers import StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer


class Recorder(BaseStreamer):
    """Every call with its payload, shape and dtype."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(("put", tuple(value.shape), value.dtype, value.device.type, value.tolist()))

    def end(self) -> None:
        self.calls.append("end")


DRAFTINGS = [
    Drafting("none"),
    Drafting("chain", "near", k=4),
    Drafting("chain", "self", k=6),
    Drafting("tree", "near", widths=(3, 2, 1)),
    Drafting("ngram", k=4, branches=2),
]


def recorded(generate: Any, **inputs: Any) -> list[Any]:
    streamer = Recorder()
    generate(**inputs, streamer=streamer)
    return streamer.calls


@pytest.mark.parametrize("drafting", DRAFTINGS, ids=lambda drafting: f"{drafting.kind}-{drafting.model}")
@pytest.mark.parametrize("lengths", [(5,), (6, 3, 4)], ids=["one-row", "three-rows"])
def test_the_call_sequence_is_plains(drafting: Drafting, lengths: tuple[int, ...]) -> None:
    case = Case("llama-gqa", "fp64", lengths, drafting, 12, prompt_seed=11)
    target: Any = case.target
    for eos in (None, [5, 9, 17, 23]):
        inputs = {**case.inputs(), "eos_token_id": eos}
        plain = recorded(target.generate, **inputs)
        assert recorded(case.speculator().generate, **inputs) == plain
        assert plain[-1] == "end"
        assert all(call[1] == (len(lengths),) for call in plain[1:-1])


def test_the_call_sequence_under_a_users_criterion() -> None:
    """No end-of-sequence token, three rows: plain decoding streams the extension of finished rows too."""
    case = Case("llama-gqa", "fp64", (6, 3, 4), Drafting("chain", "near", k=5), 16, prompt_seed=2)
    target: Any = case.target
    inputs = {**case.inputs(), "eos_token_id": None}
    inputs["stopping_criteria"] = StoppingCriteriaList([arguments.TokenRule(5)])
    assert recorded(case.speculator().generate, **inputs) == recorded(target.generate, **inputs)


def test_text_streamer_prints_the_same_text() -> None:
    case = Case("llama-gqa", "fp64", (5,), Drafting("chain", "near", k=4), 14)
    target: Any = case.target
    texts = []
    for generate in (target.generate, case.speculator().generate):
        with redirect_stdout(io.StringIO()) as shown:
            generate(**case.inputs(), streamer=TextStreamer(arguments.tokenizer(), skip_prompt=True))
        texts.append(shown.getvalue())
    assert texts[0] == texts[1]
    assert len(texts[0]) > 5


SAMPLED = [Drafting("none"), Drafting("chain", "near", k=3), Drafting("tree", "near", widths=(2, 2)), Drafting("ngram")]


@pytest.mark.parametrize("drafting", SAMPLED, ids=lambda drafting: drafting.kind)
def test_seeds_generators_and_manual_seed_reproduce_sampling(drafting: Drafting) -> None:
    case = Case("llama-gqa", "fp64", (5, 3), drafting, 16)
    inputs = {**case.inputs(), "do_sample": True, "eos_token_id": None}
    speculator = case.speculator()

    def sample(**options: Any) -> list[list[int]]:
        return speculator.generate(**inputs, **options).tolist()

    by_seed = sample(seed=5)
    assert sample(seed=5) == by_seed
    assert sample(seed=6) != by_seed
    by_generator = sample(generator=torch.Generator().manual_seed(1))
    assert sample(generator=torch.Generator().manual_seed(1)) == by_generator
    assert sample(generator=torch.Generator().manual_seed(2)) != by_generator
    torch.manual_seed(3)
    first, second = sample(), sample()
    torch.manual_seed(3)
    assert [sample(), sample()] == [first, second]
    assert first != second


def test_a_seed_leaves_the_global_generator_alone() -> None:
    case = Case("llama-gqa", "fp64", (5,), Drafting("chain", "near", k=3), 6)
    inputs = {**case.inputs(), "do_sample": True}
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    case.speculator().generate(**inputs, seed=4)
    case.speculator().generate(**{**inputs, "do_sample": False})
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_seed_per_row_follows_the_row() -> None:
    case = Case("llama-gqa", "fp64", (5, 5, 5), Drafting("chain", "near", k=3), 12)
    inputs = {**case.inputs(), "do_sample": True, "eos_token_id": None}
    inputs["input_ids"] = inputs["input_ids"][:1].expand(3, -1)
    out = case.speculator().generate(**inputs, seed=[8, 9, 8])
    assert torch.equal(out[0], out[2])
    assert not torch.equal(out[0], out[1])
