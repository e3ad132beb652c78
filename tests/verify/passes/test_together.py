"""Trees and prompts of other rows in one pass: the values of separate passes, with the weights read once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from torch import Tensor

from specdec.kv import KVCache, SharedKVCache
from specdec.kv.paged import PagedKVCache
from specdec.kv.support import num_cache_layers
from specdec.verify import DraftTree, Topology
from specdec.verify.passes.base import Part, Text
from specdec.verify.passes.forward import Forward, observing

PREFIXES = (6, 3, 5)
"""Committed tokens of the rows whose trees are run."""
PROMPTS: tuple[tuple[int, int], ...] = ((0, 9), (4, 2), (0, 5))
"""First slot and number of tokens of the prompts read besides, of which the last has a pass part of its own."""


def trees(kind: str, tokens: Tensor) -> DraftTree:
    if kind == "chain":
        return DraftTree.build(Topology.chain(2), tokens[:, :3])
    return DraftTree.build(Topology.widths((2, 2)), tokens[:, :7])


def caches(paged: bool, layers: int) -> list[KVCache]:
    """Rows of the trees, then those of the prompts in two groups."""
    if not paged:
        return [SharedKVCache({"target": layers}, rows, capacity=4) for rows in (3, 2, 1)]
    whole = PagedKVCache.fresh({"target": layers}, 6, page_size=4)
    return [PagedKVCache(whole.pool, whole.sequences[i:j]) for i, j in ((0, 3), (3, 5), (5, 6))]


def results(model: Any, kind: str, paged: bool, jointly: bool) -> list[Tensor]:
    """Logits of the trees, then the K/V of everybody, after one `together` or separate passes."""
    text = models.prompts((16,) * 6, models.VOCAB - 9, 1)[0]
    rows, *others = caches(paged, num_cache_layers(model))
    forward = Forward(model, "target")
    with torch.no_grad(), forward.prepared():
        forward.prefill(rows, text[:3], [0] * 3, list(PREFIXES), chunk=16)
        for row, length in enumerate(PREFIXES):
            rows.set_length(row, length)
        texts = []
        for cache, places in zip(others, (slice(0, 2), slice(2, 3)), strict=True):
            starts, counts = (list(column) for column in zip(*PROMPTS[places], strict=True))
            own, width = text[3:][places], max(counts)
            forward.prefill(cache, own, [0] * len(starts), starts, chunk=16)
            padded = torch.stack([row[start : start + width] for row, start in zip(own, starts, strict=True)])
            texts.append(Text(cache, padded, starts, counts))
        tree = trees(kind, text[:3].flip(1))
        passes: list[float] = []
        with observing(lambda _, seconds: passes.append(seconds)):
            if jointly:
                out = [forward.together(rows, tree, texts)[0].logits]
            else:
                out = [forward.tree(rows, tree).logits]
                for one in texts:
                    forward.causal(*one, keep=1)
        plain: Any = SimpleNamespace(quantised=None)
        short = Part(tree.tokens, plain)
        one_pass = any(runner.joint and runner.refusal(short) is None for runner in forward.runners)
        assert len(passes) == (1 if jointly and one_pass else 3)
    return [*out, *stored(rows, others)]


def stored(rows: KVCache, others: list[KVCache]) -> list[Tensor]:
    for place, cache in zip((slice(0, 2), slice(2, 3)), others, strict=True):
        for row, (start, count) in enumerate(PROMPTS[place]):
            assert cache.filled("target")[row] == start + count
            cache.set_length(row, start + count)
    assert min(rows.filled("target")) > min(PREFIXES)
    held = [states for cache in others for row in range(cache.num_rows) for states in cache.layers("target", row)]
    return [tensor for states in held for tensor in states]


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("kind", ["chain", "tree"])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-rope-dynamic", "llama-rope-yarn", "qwen3", "gemma3", "gpt2"])
def test_one_pass_computes_what_several_do(family: str, kind: str, paged: bool) -> None:
    model = models.target(family, "fp64")
    ours, theirs = results(model, kind, paged, True), results(model, kind, paged, False)
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_rows_of_one_pass_do_not_see_each_other() -> None:
    """The control: with another prompt beside them the trees' logits are the same, the prompt's K/V is not."""
    model = models.target("llama-gqa", "fp64")
    text = models.prompts((9,) * 2, models.VOCAB - 9, 3)[0]
    out = []
    for shift in (0, 1):
        cache = PagedKVCache.fresh({"target": num_cache_layers(model)}, 2, page_size=4)
        rows, other = (PagedKVCache(cache.pool, [sequence]) for sequence in cache.sequences)
        forward = Forward(model, "target")
        with torch.no_grad(), forward.prepared():
            forward.prefill(rows, text[:1], [0], [5], chunk=16)
            rows.set_length(0, 5)
            told = Text(other, text[1:] + shift, [0], [9])
            logits = forward.together(rows, DraftTree.build(Topology.chain(2), text[:1, 5:8]), [told])[0].logits
        other.set_length(0, 9)
        out.append((logits, next(iter(other.layers("target", 0)))[0]))
    assert torch.equal(out[0][0], out[1][0])
    assert not torch.equal(out[0][1], out[1][1])


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_native_passes_write_everybodys_cache(paged: bool) -> None:
    """Each contiguous cache is a storage of its own; one call of the native pass knows a single one."""
    model = models.target("llama-gqa", "fp32")
    ours, theirs = (results(model, "chain", paged, jointly) for jointly in (True, False))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
