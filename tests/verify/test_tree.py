"""Draft trees: their derived shape, their checks, and one forward pass that equals a pass per path."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import ancestors, per_path_logits, tree_of

from specdec.kv import InvalidTreeError, SharedKVCache
from specdec.kv.support import num_cache_layers
from specdec.verify import DraftTree, Forward
from specdec.verify.attention.register import attention_of
from specdec.verify.topology import Topology

PARENTS = st.integers(0, 9).flatmap(
    lambda nodes: st.tuples(*(st.integers(0, i) for i in range(nodes))).map(lambda rest: (-1, *rest))
)


@settings(max_examples=100)
@given(PARENTS)
def test_derived_shape_equals_walking_up_the_parents(parents: tuple[int, ...]) -> None:
    topology = Topology(parents)
    per_row = tree_of([parents])
    shared = DraftTree.build(topology, per_row.tokens)
    for node in range(len(parents)):
        path = ancestors(parents, node)
        assert topology.depths[node] == len(path) - 1
        for tree in (per_row, shared):
            assert tree.ancestor_mask[0, node].nonzero()[:, 0].tolist() == sorted(path)
            assert int(tree.depths[0, node]) == len(path) - 1
    chain = parents == tuple(range(-1, len(parents) - 1))
    assert topology.is_chain == per_row.is_chain == shared.is_chain == chain
    assert per_row.max_depth == shared.max_depth == max(topology.depths)
    assert sorted(node for level in topology.levels for node in level) == list(range(len(parents)))


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, 0, 2), (-1, -1), (-1, 0, -1)])
def test_parents_out_of_order_are_refused(parents: tuple[int, ...]) -> None:
    with pytest.raises(InvalidTreeError, match="parents"):
        Topology(parents)


def test_static_widths_in_level_order() -> None:
    assert Topology.widths((3, 2, 1)).parents == (-1, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9)
    assert Topology.widths(()).parents == Topology.chain(0).parents == (-1,)
    assert Topology.widths((1, 1, 1)) == Topology.chain(3)


def sampled_tree() -> DraftTree:
    tokens = torch.tensor([[4, 1, 2], [5, 3, 0]])
    return DraftTree.build(Topology.chain(2), tokens, torch.full((2, 2, 6), 1 / 6))


ROOTS = torch.tensor([4, 5])


def test_a_good_tree_passes() -> None:
    sampled_tree().validate(6, ROOTS)
    tree_of([(-1, 0, 0), (-1,)], vocab=6).validate(6, tree_of([(-1, 0, 0), (-1,)], vocab=6).tokens[:, 0])


def _with(**changes: Any) -> DraftTree:
    return dataclasses.replace(sampled_tree(), **changes)


Q = torch.full((2, 2, 6), 1 / 6)

BAD = {
    "last emitted token": lambda: _with(tokens=torch.tensor([[3, 1, 2], [5, 3, 0]])),
    "ids outside": lambda: _with(tokens=torch.tensor([[4, 6, 2], [5, 3, 0]])),
    "token ids outside": lambda: _with(tokens=torch.tensor([[4, -1, 2], [5, 3, 0]])),
    "int64": lambda: _with(tokens=torch.tensor([[4, 1, 2], [5, 3, 0]], dtype=torch.int32)),
    "num_nodes": lambda: _with(num_nodes=torch.tensor([3, 4])),
    "num_nodes outside": lambda: _with(num_nodes=torch.tensor([0, 3])),
    "expected 2 rows": lambda: _with(tokens=torch.tensor([[4, 1, 2]])),
    "expected parents": lambda: _with(parents=torch.tensor([[-1, 0], [-1, 0]])),
    "does not precede": lambda: _with(topology=None, parents=torch.tensor([[-1, 0, 2], [-1, 0, 1]])),
    "no q was given": lambda: _with(q=None),
    "q has shape": lambda: _with(q=Q[..., :5]),
    "not a law": lambda: _with(q=Q * 1.01),
    "a q row is not": lambda: _with(q=Q.clone().index_fill_(2, torch.tensor([0]), float("nan"))),
    "beyond q": lambda: _with(q_row=torch.tensor([[0, 2, -1], [0, 1, -1]])),
    "no q row": lambda: _with(q_row=torch.tensor([[0, -1, -1], [0, 1, -1]])),
    "q = 0": lambda: _with(q=torch.eye(6)[[0, 0]].expand(2, 2, 6)),
}


@pytest.mark.parametrize("problem", list(BAD))
def test_each_broken_property_is_named(problem: str) -> None:
    with pytest.raises(InvalidTreeError, match=problem):
        BAD[problem]().validate(6, ROOTS)


def test_sampled_siblings_repeat_a_token_only_if_drawn_with_replacement() -> None:
    tokens, q = torch.tensor([[4, 1, 1], [5, 3, 0]]), torch.full((2, 1, 6), 1 / 6)
    siblings = DraftTree.build(Topology.widths((2,)), tokens, q)
    with pytest.raises(InvalidTreeError, match="without replacement"):
        siblings.validate(6, ROOTS)
    dataclasses.replace(siblings, replacement=True).validate(6, ROOTS)
    one_sampled = torch.tensor([False, False, True]).expand(2, 3)
    dataclasses.replace(siblings, sampled=one_sampled).validate(6, ROOTS)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mqa", "gpt2", "mistral-window", "qwen2-mixed-window", "gemma3"])
@settings(max_examples=6)
@given(data=st.data())
def test_one_pass_equals_a_pass_per_path(family: str, data: st.DataObject) -> None:
    """Ragged rows, ragged trees, any shape: every node's logits are those of its own path."""
    shapes = data.draw(st.lists(PARENTS, min_size=1, max_size=3))
    lengths = data.draw(st.tuples(*(st.integers(0, 9) for _ in shapes)))
    model: Any = models.target(family)
    tree = tree_of(list(shapes), seed=data.draw(st.integers(0, 99)))
    text = models.prompts((9,) * len(shapes), models.VOCAB, 1)[0]
    cache = SharedKVCache({"target": num_cache_layers(model)}, len(shapes), capacity=4)
    forward = Forward(model, "target")
    with torch.no_grad(), attention_of(model):
        forward.prefill(cache, text, [0] * len(shapes), list(lengths), chunk=4)
        for row, length in enumerate(lengths):
            cache.set_length(row, length)
        logits = forward.tree(cache, tree).logits
    assert cache.lengths == list(lengths)
    for row, parents in enumerate(shapes):
        expected = per_path_logits(model, text[row, : lengths[row]], tree, row, parents)
        torch.testing.assert_close(logits[row, : len(parents)], expected, rtol=1e-9, atol=1e-9)


def test_growing_a_tree_level_by_level_equals_one_pass() -> None:
    """What a drafter does: later levels attend to earlier ones already in the tail."""
    model: Any = models.target("llama-gqa")
    topology = Topology.widths((2, 2))
    tree = DraftTree.build(topology, torch.tensor([[5, 6, 7, 8, 9, 10, 11]]))
    forward = Forward(model, "target")
    outputs = []
    for cuts in ((0, 7), (0, 1, 3, 7)):
        cache = SharedKVCache({"target": 2}, 1)
        with torch.no_grad(), attention_of(model):
            parts = [
                forward.nodes(cache, tree.tokens[:, a:b], tree.depths[:, :b], tree.ancestor_mask[:, a:b, :b], a).logits
                for a, b in pairwise(cuts)
            ]
        outputs.append(torch.cat(parts, 1))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)


def test_the_last_position_of_a_table_is_used_and_none_behind_it() -> None:
    """Drafted nodes beyond it cost nothing: they can never be emitted."""
    model: Any = models.target("gpt2")
    count = model.config.n_positions
    text = torch.randint(3, models.VOCAB, (1, count), generator=torch.Generator().manual_seed(0))
    cache, forward = SharedKVCache({"target": num_cache_layers(model)}, 1), Forward(model, "target")
    tree = DraftTree.build(Topology.widths((2, 1)), text[:, -1:].expand(1, 5).contiguous())
    with torch.no_grad(), attention_of(model):
        forward.prefill(cache, text, [0], [count - 1], chunk=64)
        cache.set_length(0, count - 1)
        logits = forward.tree(cache, tree).logits
        torch.testing.assert_close(logits[0, 0], model(text).logits[0, -1], rtol=1e-9, atol=1e-9)
        cache.commit([[0]])
        with pytest.raises(ValueError, match=f"has {count} positions"):
            forward.tree(cache, tree)
