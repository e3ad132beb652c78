"""Long texts take the way that is faster here, whatever their drafts take; promises of bits do not ask."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch

from specdec.kv import SharedKVCache
from specdec.kv.support import num_cache_layers
from specdec.verify import DraftTree, Topology
from specdec.verify.native.library import why_not
from specdec.verify.passes import pace
from specdec.verify.passes.base import FIRST_CHUNK, PREFILL_CHUNK
from specdec.verify.passes.choose import strict_runners_for
from specdec.verify.passes.direct import Direct
from specdec.verify.passes.forward import Forward
from specdec.verify.passes.native import Native
from specdec.verify.passes.parameters import Parameters

pytestmark = pytest.mark.skipif(why_not() is not None, reason="no native pass")


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Tokens of every pass by the runner that ran it."""
    seen: dict[str, list[int]] = {"native": [], "direct": []}
    for kind in (Native, Direct):
        own: Any = kind.__call__

        def noting(self: Any, parts: Any, own: Any = own) -> Any:
            seen[self.name] += [part.tokens.shape[1] for part in parts]
            return own(self, parts)

        monkeypatch.setattr(kind, "__call__", noting)
    return seen


def read(forward: Forward, count: int, chunk: int | None = None) -> tuple[Any, torch.Tensor]:
    """A text of so many tokens, then a draft of two."""
    layers = num_cache_layers(forward.model)
    text = models.prompts((count + 3,), models.VOCAB, 1)[0]
    cache = SharedKVCache({"target": layers}, 1)
    with torch.no_grad(), forward.prepared():
        forward.prefill(cache, text, [0], [count], chunk)
        cache.set_length(0, count)
        logits = forward.tree(cache, DraftTree.build(Topology.chain(2), text[:, count:])).logits
    return cache, logits


@pytest.mark.parametrize("slower", [True, False])
def test_the_measurement_decides(slower: bool, widths: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def seconds(own: Parameters, width: int, slots: int, runners: Any) -> list[float]:
        asked.append(slots)
        return [2.0, 1.0] if slower else [1.0, 1.04]

    monkeypatch.setattr(pace, "_seconds", seconds)
    monkeypatch.setattr(pace, "_slower", {})
    model: Any = models.target("llama-gqa", "fp32")
    _, logits = read(Forward(model, "target"), 700)
    if slower:
        assert widths == {"native": [3], "direct": [700]}
        assert asked == [512]  # of the text's beginning
    else:
        assert widths == {"native": [512, 188, 3], "direct": []}
        assert asked == [512, 1024]
    before = list(asked)
    read(Forward(model, "target"), 700)
    assert asked == before  # once a process
    read(Forward(model, "target"), 100)
    assert widths["native"][-2:] == [100, 3]
    with torch.no_grad():
        wanted = model(models.prompts((703,), models.VOCAB, 1)[0]).logits[:, -3:]
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-4)


def test_a_text_is_measured_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its beginning without a mask, as it is read; what follows by what the token in its middle sees."""
    asked: list[tuple[int, int]] = []

    def seconds(own: Parameters, width: int, slots: int, runners: Any) -> list[float]:
        asked.append((width, slots))
        return [1.0, 1.0]

    monkeypatch.setattr(pace, "_seconds", seconds)
    monkeypatch.setattr(pace, "_slower", {})
    own = Parameters.of(models.target("llama-gqa", "fp32"))
    assert own is not None
    for tokens, read in ((127, 127), (600, 600), (4096, 4096), (512, 1024), (2048, 4096), (512, 4096)):
        pace.native_is_slower(own, tokens, read, lambda _: [])
    assert asked == [(512, 512), (1024, 1024), (512, 1024), (512, 4096)]


@pytest.mark.parametrize("fault", [RuntimeError("[enforce fail] can't allocate memory"), torch.OutOfMemoryError()])
def test_a_trial_that_fails_ends_no_call(
    fault: Exception, widths: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def seconds(*_: Any) -> list[float]:
        tried.append(1)
        raise fault

    monkeypatch.setattr(pace, "_seconds", seconds)
    monkeypatch.setattr(pace, "_slower", {})
    model: Any = models.target("llama-gqa", "fp32")
    read(Forward(model, "target"), 300)
    assert widths == {"native": [300, 3], "direct": []}
    assert tried == [1]  # not tried again


def test_both_ways_are_really_timed() -> None:
    own = Parameters.of(models.target("llama-gqa", "fp32"))
    assert own is not None
    direct = Direct(models.target("llama-gqa", "fp32"), None)  # type: ignore[arg-type]
    ran: list[tuple[str, int, int]] = []

    class Timed(Direct):
        def __init__(self, name: str):
            self.name = name

        def __call__(self, parts: Any) -> Any:
            (part,) = parts
            ran.append((self.name, part.tokens.shape[1], part.write.read))
            return direct

    times = pace._seconds(own, 512, 2048, lambda first: [Timed("a"), Timed("b")] if len(first.layers) == 1 else [])
    assert ran == [("a", 512, 2048), ("b", 512, 2048)] * 2
    assert all(time > 0 for time in times)
    assert len(own.layers) > 1


def test_a_promise_of_bits_does_not_ask(widths: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_seconds", lambda *_: [2.0, 1.0])
    monkeypatch.setattr(pace, "_slower", {})
    model: Any = models.target("llama-gqa", "fp32")
    read(Forward(model, "target", strict_runners_for(model, 8)), 700)
    assert widths == {"native": [512, 188, 3], "direct": []}


@pytest.mark.parametrize(
    ("chunk", "wanted"), [(None, [4096, 2048, 256]), (3000, [3000, 2048, 1352]), (300, [300] * 21 + [100])]
)
def test_texts_are_read_in_chunks(chunk: int | None, wanted: list[int], widths: dict[str, list[int]]) -> None:
    assert (FIRST_CHUNK, PREFILL_CHUNK) == (4096, 2048)
    model: Any = models.target("llama-gqa", "fp64")
    read(Forward(model, "target"), 6400, chunk)
    assert widths["direct"] == [*wanted, 3]


def test_a_hook_put_on_the_model_in_the_middle_of_a_call(widths: dict[str, list[int]]) -> None:
    """What is read after it goes through the modules, and nobody is asked how fast the others were."""
    model: Any = copy.deepcopy(models.target("llama-gqa", "fp32"))
    text = models.prompts((400,), models.VOCAB, 1)[0]
    cache, forward = SharedKVCache({"target": num_cache_layers(model)}, 1), Forward(model, "target")
    with torch.no_grad(), forward.prepared():
        forward.prefill(cache, text, [0], [100])
        seen: list[int] = []
        model.model.norm.register_forward_hook(lambda *args: seen.append(1))
        forward.prefill(cache, text, [100], [399])
        cache.set_length(0, 399)
        logits = forward.causal(cache, text[:, 399:], [399], None, 1).logits
        wanted = model(text).logits[:, -1:]
    assert widths == {"native": [100], "direct": []}
    assert len(seen) == 3
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-4)
