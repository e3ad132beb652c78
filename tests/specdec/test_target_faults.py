"""A target's fault is a typed error: nothing emitted is lost, the cache is consistent, the Speculator usable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fault_cases import DRAFT, GREEDY, MODEL, PROMPT, SAMPLED, plain_greedy
from torch import Tensor

from specdec import Speculator, TargetFaultError
from specdec.kv.versions import cache_of
from specdec.loop import DecodeLoop
from specdec.target import TARGET


@contextmanager
def target_hook(call: int, act: Callable[[Any], Any], times: int = 99) -> Iterator[None]:
    """`act` on the output of the target's forward number `call` (0 = the prefill) and the next ones, `times` in all."""
    seen = 0

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        nonlocal seen
        seen += 1
        return act(output) if call < seen <= call + times else None

    handle = MODEL.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def nan_logits(output: Any) -> Any:
    output.logits = output.logits * float("nan")
    return output


def raise_error(output: Any) -> Any:
    raise ValueError("device lost")


def raise_oom(output: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[DecodeLoop]:
    """The decode loops of the calls made in a test."""
    made: list[DecodeLoop] = []

    class Kept(DecodeLoop):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("specdec.speculator.DecodeLoop", Kept)
    return made


@pytest.mark.parametrize("shape", [{"k": 3}, {"tree": (2, 2)}, {}], ids=["chain", "tree", "plain"])
@pytest.mark.parametrize(("act", "text"), [(nan_logits, "NaN"), (raise_error, "device lost")], ids=["NaN", "raises"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_target_fault_is_typed_and_loses_nothing(
    shape: dict[str, Any], act: Callable[[Any], Any], text: str, sampled: bool, loops: list[DecodeLoop]
) -> None:
    spec = Speculator(MODEL, DRAFT if shape else None, **shape)
    arguments = SAMPLED if sampled else GREEDY
    healthy = spec.generate(PROMPT, **arguments)
    assert isinstance(healthy, Tensor)
    with target_hook(3, act), pytest.raises(TargetFaultError, match=text) as fault:
        spec.generate(PROMPT, **arguments)
    assert fault.value.step == 2
    for row, emitted in enumerate(fault.value.emitted):
        assert len(emitted) >= 2
        assert emitted == healthy[row, PROMPT.shape[1] :].tolist()[: len(emitted)]
    loop = loops[-1]
    assert loop.cache.lengths == [count - 1 for count in loop.rows.lengths()]
    assert loop.cache.filled(TARGET) == loop.cache.lengths
    for row, length in enumerate(loop.cache.lengths):
        fresh = cache_of(MODEL(loop.rows.text[row : row + 1, :length]))
        for (keys, values), layer in zip(loop.cache.layers(TARGET, row), fresh.layers, strict=True):
            torch.testing.assert_close(keys, layer.keys[0], rtol=0, atol=1e-10)
            torch.testing.assert_close(values, layer.values[0], rtol=0, atol=1e-10)
    again: Any = spec.generate(PROMPT, **arguments)
    assert torch.equal(again, healthy)


@pytest.mark.parametrize("shape", [{"k": 3}, {"tree": (2, 2)}, {}], ids=["chain", "tree", "plain"])
@pytest.mark.parametrize("arguments", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_nan_that_goes_away_costs_a_pass(shape: dict[str, Any], arguments: dict[str, Any]) -> None:
    spec = Speculator(MODEL, DRAFT if shape else None, **shape)
    healthy: Any = spec.generate(PROMPT, **arguments)
    with target_hook(3, nan_logits, times=1):
        again: Any = spec.generate(PROMPT, **arguments)
    assert torch.equal(again, healthy)
    assert spec.report is not None
    assert any("NaN" in note for note in spec.report.notes)


def test_a_fault_in_the_prefill() -> None:
    spec = Speculator(MODEL, DRAFT)
    with target_hook(0, raise_error), pytest.raises(TargetFaultError, match="prefill") as fault:
        spec.generate(PROMPT, **GREEDY)
    assert fault.value.step == 0
    assert fault.value.emitted == [[], []]
    again: Any = spec.generate(PROMPT, **GREEDY)
    assert torch.equal(again, plain_greedy())


@pytest.mark.parametrize("shape", [{"k": 3}, {"tree": (2, 2)}], ids=["chain", "tree"])
def test_out_of_memory_on_the_tree_is_retried_plainly(shape: dict[str, Any]) -> None:
    spec = Speculator(MODEL, DRAFT, **shape)
    with target_hook(2, raise_oom, times=1):
        out: Any = spec.generate(PROMPT, **GREEDY)
    assert torch.equal(out, plain_greedy())
    assert spec.report is not None
    assert [note for note in spec.report.notes if "out of memory" in note and "step 1" in note]


def test_out_of_memory_without_a_draft_is_a_target_fault() -> None:
    with target_hook(2, raise_oom), pytest.raises(TargetFaultError, match="memory"):
        Speculator(MODEL).generate(PROMPT, **GREEDY)
