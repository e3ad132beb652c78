"""K/V in 8 bits: what is read of a slot is a function of its token's own states, and what it costs in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_calls import OfAPass
from torch import Tensor
from ways import forward_by

from specdec.kv import KVPool, PagedKVCache
from specdec.kv.quantised import QUANTISED, Quantised
from specdec.kv.support import num_cache_layers
from specdec.verify import DraftTree, Topology
from specdec.verify.native import library

INT8, FP8 = QUANTISED["int8"], QUANTISED["fp8"]
RELATIVE = {"int8": 0.51 / 127, "fp8": 2**-4}
"""The largest error of a number, in terms of the largest one that shares its scale."""
natively = pytest.mark.skipif(library.why_not() is not None, reason=f"no native pass: {library.why_not()}")


def states(shape: tuple[int, ...], seed: int) -> Tensor:
    """Of every size, with tokens of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    out = (
        torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape[:-1], generator=generator))[..., None]
    )
    out[..., 0, :] = 0
    return out


@pytest.mark.parametrize("name", QUANTISED)
@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 140), seed=st.integers(0, 99), dtype=st.sampled_from(list(models.DTYPES.values())))
def test_near_what_was_written_whatever_stands_beside_it(name: str, size: int, seed: int, dtype: torch.dtype) -> None:
    how, given_ = QUANTISED[name], states((2, 3, size), seed).to(dtype)
    packed = how.pack(given_)
    assert packed.dtype == torch.int8
    assert packed.shape == (2, 3, how.width(size))
    read = how.unpack(packed, dtype)
    assert read.shape == given_.shape
    assert read.dtype == dtype
    assert not read[:, 0].any()
    largest = given_.double().abs().amax(-1, keepdim=True)
    assert bool(((read.double() - given_.double()).abs() <= (RELATIVE[name] + 2**-8) * largest).all())
    for row in range(2):
        for token in range(3):
            assert torch.equal(how.pack(given_[row, token]), packed[row, token])


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_states_that_are_not_finite_are_not_read_as_if_they_were(name: str, bad: float) -> None:
    given_ = states((4, 40), 0)
    given_[1, 37] = bad
    read = QUANTISED[name].unpack(QUANTISED[name].pack(given_), torch.float32)
    assert not bool(read[1, 37].isfinite())
    assert bool(read[[0, 2, 3]].isfinite().all())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_as_many_more_pages_as_the_bytes_say(dtype: str) -> None:
    """Heads of 64 numbers in float32: 256 bytes, or 64 and two scales."""
    whole_model: Any = models.llama(vocab=64, hidden=128, heads=2)
    model = whole_model.to(models.DTYPES[dtype])
    whole, small = (KVPool.sized({"target": model}, 1 << 20, quantised=how) for how in (None, INT8))
    ratio = 64 * (4 if dtype == "fp32" else 2) / (64 + 4)
    assert whole.num_pages is not None
    assert small.num_pages == pytest.approx(whole.num_pages * ratio, rel=0.05)
    for pool in (whole, small):
        prefilled(pool, model, list(range(3, 20)))
        assert 0.9 * (1 << 20) < pool.num_bytes() <= 1 << 20
        assert pool.bytes_held == 2 * pool.page_bytes
    assert whole.page_bytes == pytest.approx(small.page_bytes * ratio)


def prefilled(pool: KVPool, model: Any, text: list[int], way: str = "modules") -> int:
    sequence = pool.open(text)
    have = pool.length(sequence)
    if have < len(text):
        cache = PagedKVCache(pool, [sequence])
        forward_by(model, way).causal(cache, torch.tensor([text[have:]]), [have], None, 1)
        pool.set_length(sequence, len(text))
    pool.publish(sequence, text)
    return sequence


def bytes_of(pool: KVPool, sequence: int) -> list[Tensor]:
    """Of every layer, as they lie there."""
    store, found = pool.stores["target"], pool.sequence(sequence)
    return [
        torch.cat([layer[page] for page in found.pages])[: found.length]
        for layer in (*store.keys, *store.values)
        if layer is not None
    ]


def fresh(model: Any, text: list[int], how: Quantised, way: str) -> list[Tensor]:
    pool = KVPool({"target": num_cache_layers(model)}, page_size=4, quantised=how)
    return bytes_of(pool, prefilled(pool, model, text, way))


def lives(model: Any, how: Quantised, way: str) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Texts and the bytes of their K/V after shared beginnings, forks, trees of which a path is kept, and rollbacks."""
    pool = KVPool({"target": num_cache_layers(model)}, page_size=4, quantised=how)
    forward = forward_by(model, way)
    head = [int(token) for token in models.prompts((13,), models.VOCAB, 5)[0][0]]
    own = [prefilled(pool, model, head + tail, way) for tail in ([], [7, 9], [11])]
    texts = [head, [*head, 7, 9], [*head, 11]]
    own.append(pool.fork(own[1]))
    texts.append(list(texts[1]))
    shape = Topology.widths((2, 2))
    generator = torch.Generator().manual_seed(1)
    for paths in ([[0, 2, 5], [0], [0, 1], [0, 2, 6]], None, [[0, 1, 4], [0, 2, 6], [0, 2], [0, 1, 3]]):
        cache = PagedKVCache(pool, own)
        nodes = torch.randint(3, models.VOCAB, (len(own), 7), generator=generator)
        forward.tree(cache, DraftTree.build(shape, nodes))
        if paths is None:
            cache.rollback()
            continue
        cache.commit(paths)
        for text, row, path in zip(texts, nodes.tolist(), paths, strict=True):
            text += [row[node] for node in path]
        pool.check_integrity()
    for text, sequence in zip(texts, own, strict=True):
        yield text, bytes_of(pool, sequence)


@pytest.mark.parametrize(
    ("name", "dtype", "way"),
    [
        ("int8", "fp64", "modules"), ("int8", "fp64", "direct"), ("fp8", "fp64", "modules"),
        ("int8", "fp64", "planned"),
        pytest.param("int8", "fp32", "native", marks=natively), pytest.param("int8", "bf16", "native", marks=natively),
    ],
)  # fmt: skip
def test_nothing_in_the_bytes_tells_how_they_came_there(name: str, dtype: str, way: str) -> None:
    """Drafted in a tree, moved, forked, shared or read from a prompt: as if the text had been read at once."""
    model = models.target("llama-gqa", dtype)
    for text, found in lives(model, QUANTISED[name], way):
        assert all(map(torch.equal, found, fresh(model, text, QUANTISED[name], way)))


def test_the_bytes_would_tell_of_a_scale_that_is_shared() -> None:
    model, how = models.target("llama-gqa", "fp64"), OfAPass("int8", torch.int8, 127.0, native=0)
    same = [
        all(map(torch.equal, found, fresh(model, text, how, "modules"))) for text, found in lives(model, how, "modules")
    ]
    assert not any(same)


@natively
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "qwen3"])
def test_native_passes_write_and_read_the_same_bytes(family: str, dtype: str) -> None:
    """In the first layer, whose K/V no attention has touched, all of them are the rounding of its own states."""
    model = models.target(family, dtype)
    layers = {"target": num_cache_layers(model)}
    text = [int(token) for token in models.prompts((30,), model.config.vocab_size, 3)[0][0]]
    logits, kept = {}, {}
    for how in (None, INT8):
        for way in ("native", "direct"):
            pool = KVPool(layers, page_size=4, quantised=how)
            cache = PagedKVCache(pool, [pool.open()])
            logits[way, how] = forward_by(model, way).causal(cache, torch.tensor([text]), [0], None, 0).logits.float()
            pool.set_length(cache.sequences[0], len(text))
            kept[way, how] = bytes_of(pool, cache.sequences[0])
    first = [0, layers["target"]]
    for layer in first:
        assert torch.equal(kept["native", INT8][layer], INT8.pack(kept["native", None][layer]))
    scale = float(logits["direct", None].abs().max())
    assert float((logits["native", INT8] - logits["direct", INT8]).abs().max()) < 0.06 * scale
    assert not torch.equal(logits["native", INT8], logits["native", None])


@natively
def test_native_passes_read_what_is_not_finite() -> None:
    model = models.target("llama-gqa", "fp32")
    pool = KVPool({"target": num_cache_layers(model)}, page_size=4, quantised=INT8)
    cache, forward = PagedKVCache(pool, [pool.open()]), forward_by(model, "native")
    forward.causal(cache, torch.tensor([[5, 6, 7]]), [0], None, 1)
    pool.set_length(cache.sequences[0], 3)
    keys = pool.stores["target"].keys[0]
    assert keys is not None
    keys[pool.sequence(cache.sequences[0]).pages[0], 1] = INT8.pack(torch.full((*keys.shape[2:-1], 8), float("nan")))
    assert bool(forward.causal(cache, torch.tensor([[8]]), [3], None, 1).logits.isnan().all())


@natively
def test_chains_are_found_natively_only_in_what_native_passes_read() -> None:
    """Greedily from the same text: as passes of one token each find them."""
    model = models.target("llama-gqa", "fp32")
    for how in (INT8, FP8):
        pool = KVPool({"target": num_cache_layers(model)}, page_size=4, quantised=how)
        cache, forward = PagedKVCache(pool, [prefilled(pool, model, [5, 6, 7, 8, 9])]), forward_by(model, "native")
        found = forward.best_chain(cache, torch.tensor([[10]]), [5], 4, models.VOCAB)
        if how is FP8:
            assert found is None
            continue
        assert found is not None
        cache.rollback()
        token, wanted = 10, []
        for place in range(5, 9):
            logits = forward.causal(cache, torch.tensor([[token]]), [place], None, 1).logits
            wanted.append(token := int(logits[0, -1].argmax()))
        assert found[0].tolist() == wanted
