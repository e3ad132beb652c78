"""Hidden states of every layer, from every way to run a model: those of plain `output_hidden_states`."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import Tensor
from trees import tree_of
from ways import graphed_forward

from specdec.kv import PagedKVCache, SharedKVCache
from specdec.kv.support import num_cache_layers
from specdec.verify import DraftTree, Topology
from specdec.verify.native.library import why_not
from specdec.verify.passes.base import Output, Text
from specdec.verify.passes.choose import every_way, strict_runners_for
from specdec.verify.passes.forward import Forward

LENGTHS = (7, 3)
SHAPES: list[tuple[int, ...]] = [(-1, 0, 0, 1, 1, 2), (-1, 0, 1, 0)]
WAYS = ["native", "direct", "modules", "planned", "graphed", "strict"]
CASES = [(way, "llama-gqa") for way in WAYS] + [(way, "qwen3") for way in ("native", "direct")]
CASES += [(way, family) for way in ("modules", "planned", "strict") for family in ("gpt2", "qwen2-mixed-window")]
CASES += [("modules", "gemma3")]


def forward_of(model: Any, way: str) -> Forward:
    if way == "strict":
        return Forward(model, "target", strict_runners_for(model, 8))
    if way == "graphed":
        return graphed_forward(model, "target", None, 1)
    return Forward(model, "target", every_way(model)[way])


def plain(model: Any, tokens: list[int]) -> list[Tensor]:
    """`[T, hidden]` per layer, of one text."""
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_hidden_states=True)
    return [states[0] for states in out.hidden_states]


def close(found: Tensor, wanted: Tensor) -> None:
    tight = wanted.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-9 if tight else 1e-4, atol=1e-9 if tight else 1e-5)


def path_to(parents: tuple[int, ...], node: int) -> list[int]:
    return [*path_to(parents, parents[node]), node] if node else [0]


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize(("way", "family"), CASES, ids=lambda name: name)
def test_every_runner_gives_those_of_plain_passes(way: str, family: str, paged: bool) -> None:
    """Of a prompt read in chunks, of trees of another shape in each row, of a chain behind what was kept."""
    if way == "native" and why_not() is not None:
        pytest.skip("no native pass")
    if way == "graphed" and paged:
        pytest.skip("graphs read no pages")
    model: Any = models.target(family, "fp32" if way == "native" else "fp64")
    layers, rows = num_cache_layers(model), len(LENGTHS)
    text = models.prompts((9,) * rows, models.VOCAB - 9, 1)[0]
    names = {"target": layers}
    cache: Any = PagedKVCache.fresh(names, rows, 4) if paged else SharedKVCache(names, rows, 64)
    forward = forward_of(model, way)
    forward.features = range(layers + 1)
    read: list[list[list[Tensor]]] = [[[] for _ in range(layers + 1)] for _ in LENGTHS]

    def reader(starts: Any, valid: Any, output: Output) -> None:
        assert output.logits.shape[1] == 0
        for row, count in enumerate(valid):
            for layer, states in enumerate(output.features):
                read[row][layer].append(states[row, :count])

    tree = tree_of(SHAPES, seed=3)
    with torch.no_grad(), forward.prepared():
        forward.prefill(cache, text, [0] * rows, LENGTHS, chunk=4, reader=reader)
        for row, length in enumerate(LENGTHS):
            cache.set_length(row, length)
        drafted = forward.tree(cache, tree)
        cache.commit([[0, 2], [0, 1]])
        chain = forward.tree(cache, DraftTree.build(Topology.chain(2), text[:, :3]))
    for row, (length, parents) in enumerate(zip(LENGTHS, SHAPES, strict=True)):
        own = text[row, :length].tolist()
        for layer, wanted in enumerate(plain(model, own)):
            close(torch.cat(read[row][layer]), wanted)
        tokens = tree.tokens[row].tolist()
        for node in range(len(parents)):
            path = [tokens[place] for place in path_to(parents, node)]
            for layer, wanted in enumerate(plain(model, own + path)):
                close(drafted.features[layer][row, node], wanted[-1])
        kept = [tokens[0], tokens[2 if row == 0 else 1]]
        for layer, wanted in enumerate(plain(model, own + kept + text[row, :3].tolist())):
            close(chain.features[layer][row], wanted[-3:])


@pytest.mark.parametrize("way", ["native", "direct", "modules"])
def test_some_layers_beside_few_logits(way: str) -> None:
    """In the order they were asked for; the last layer's hidden states are all there where one row of logits is."""
    if way == "native" and why_not() is not None:
        pytest.skip("no native pass")
    model: Any = models.target("llama-gqa", "fp32")
    text = models.prompts((6, 6), models.VOCAB, 1)[0]
    cache, forward = SharedKVCache({"target": num_cache_layers(model)}, 2), forward_of(model, way)
    forward.features = (2, 0)
    with torch.no_grad(), forward.prepared():
        output = forward.causal(cache, text, [0, 0], None, keep=1)
        wanted = model(text, output_hidden_states=True)
    assert len(output.features) == 2
    close(output.features[0], wanted.hidden_states[2])
    close(output.features[1], wanted.hidden_states[0])
    close(output.logits, wanted.logits[:, -1:])
    with pytest.raises(AssertionError, match="not close"):  # the control: the layer before is another one
        close(output.features[0], wanted.hidden_states[1])


def test_trees_and_prompts_of_one_pass_each_get_theirs() -> None:
    model: Any = models.target("llama-gqa", "fp64")
    text = models.prompts((9,) * 2, models.VOCAB - 9, 3)[0]
    whole = PagedKVCache.fresh({"target": num_cache_layers(model)}, 2, page_size=4)
    rows, other = (PagedKVCache(whole.pool, [sequence]) for sequence in whole.sequences)
    forward = Forward(model, "target")
    forward.features = (1,)
    with torch.no_grad(), forward.prepared():
        forward.prefill(rows, text[:1], [0], [5], chunk=16)
        rows.set_length(0, 5)
        tree = DraftTree.build(Topology.chain(2), text[:1, 5:8])
        drafted, read = forward.together(rows, tree, [Text(other, text[1:], [0], [9])])
    close(drafted.features[0][0], plain(model, text[0, :8].tolist())[1][-3:])
    close(read.features[0][0], plain(model, text[1].tolist())[1])
