"""On a GPU: whole texts equal plain generation's, eagerly and with CUDA graphs, whatever computes the attention."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from ways import graphed_forward

import specdec
from specdec.drafters import BestFirst, NgramDrafter
from specdec.experiments.gpu.models import Oracle, counting_llama, successor
from specdec.experiments.gpu.options import Shape
from specdec.kv import SharedKVCache
from specdec.kv.support import num_cache_layers
from specdec.verify import DraftTree, Forward, Topology
from specdec.verify.attention.choose import VARIABLE as BACKEND
from specdec.verify.passes.choose import GRAPHS
from specdec.verify.passes.graphed import cuda_capture

pytestmark = pytest.mark.gpu

FAMILIES = ["llama-gqa", "llama-mqa", "qwen2-mixed-window", "mistral-window", "gpt2", "qwen3"]


def on_gpu(model: Any) -> Any:
    return copy.deepcopy(model).to("cuda")


def texts(model: Any, spec: specdec.Speculator, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    ids, mask = (tensor.to("cuda") for tensor in models.prompts(lengths, models.VOCAB, 0))
    arguments: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, **arguments)
    ours = spec.generate(ids, **arguments)
    assert isinstance(ours, Tensor)
    return plain, ours


@pytest.mark.parametrize("graphs", ["0", "1"], ids=["eager", "graphs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_plain_generations(family: str, graphs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where near-ties do not fall differently."""
    monkeypatch.setenv(GRAPHS, graphs)
    target, draft = on_gpu(models.target(family)), on_gpu(models.draft("near", family))
    for drafting in ({"k": 3}, {"tree": (2, 2, 1)}, {"tree": BestFirst(3, 2, 5)}):
        for lengths in ((7,), (7, 3, 5)):
            plain, ours = texts(target, specdec.Speculator(target, draft, **drafting), lengths)
            assert torch.equal(plain, ours), (drafting, lengths)


@pytest.mark.parametrize("backend", ["auto", "fold", "split", "triton"])
def test_every_backend_in_float32(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND, backend)
    target = on_gpu(models.target("llama-gqa", "fp32"))
    plain, ours = texts(target, specdec.Speculator(target, NgramDrafter(k=4, branches=2)), (9, 4))
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("graphs", ["0", "1"], ids=["eager", "graphs"])
@pytest.mark.parametrize("backend", ["auto", "fold", "flash", "triton"])
def test_bfloat16_with_a_margin(backend: str, graphs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose greedy text is known and far from ties; half the drafts are wrong."""
    monkeypatch.setenv(BACKEND, backend)
    monkeypatch.setenv(GRAPHS, graphs)
    target = counting_llama(Shape(4, 512, 1024, 8, 2, 4096), "cuda", torch.bfloat16, 0)
    ids = torch.arange(3, 60, device="cuda")[None]
    spec = specdec.Speculator(target, Oracle(4096, 5, 0.5))
    out = spec.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
    assert isinstance(out, Tensor)
    new = out[:, ids.shape[1] :]
    assert torch.equal(new[:, 1:], successor(new[:, :-1], 4096))
    assert spec.report is not None
    assert 1.3 < spec.report.mean_acceptance_length < 3


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-mixed-window"])
def test_replays_are_eager_passes(family: str) -> None:
    """Several steps with moved K/V, other lengths and other tokens, from one captured graph."""
    model = on_gpu(models.target(family))
    caches = [SharedKVCache({"t": num_cache_layers(model)}, 2, 64) for _ in range(2)]
    graphed = graphed_forward(model, "t", cuda_capture, 1)
    text = torch.randint(3, models.VOCAB, (2, 30)).cuda()
    tree = Topology((-1, 0, 0, 1, 1, 2))
    for cache, forward in zip(caches, (Forward(model, "t"), graphed), strict=True):
        with forward.prepared():
            forward.prefill(cache, text, [0, 0], [9, 4], 2048)
        cache.set_length(0, 9)
        cache.set_length(1, 4)
    for path in ([0, 2, 5], [0], [0, 1, 4]):
        tokens = torch.randint(3, models.VOCAB, (2, 6)).cuda()
        found = []
        for cache, forward in zip(caches, (Forward(model, "t"), graphed), strict=True):
            with forward.prepared():
                found.append(forward.tree(cache, DraftTree.build(tree, tokens)).logits)
            cache.commit([path, [0]])
        torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-11)
    assert graphed.runners[0].num_replays == 3  # type: ignore[attr-defined]
