"""Trees of every shape: greedy equality, K/V where the cache is told it lies, budgets, rows, and honest draws."""

from __future__ import annotations

import itertools
from typing import Any

import models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law_checks import must_be_caught
from stats import g_test_strata, judge
from torch import Tensor

from specdec import ModelDrafter, Speculator, StepTrace
from specdec.drafters import BestFirst, Budget, DySpec, TreeShape
from specdec.drafters import dyspec as dyspec_module
from specdec.drafters.base import CACHE_NAME
from specdec.drafters.children import Draws
from specdec.drafters.growth import Run, grow
from specdec.drafters.shapes import Start, shape_of
from specdec.kv import UnsupportedArgumentError
from specdec.verify import DraftTree, Topology

SHAPES: dict[str, Any] = {
    "paths": [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1]],
    "topology": Topology((-1, 0, 1, 0, 3, 3, 1)),
    "best first": BestFirst(depth=4, top_k=3, num_nodes=8),
    "best first, few kept": BestFirst(depth=5, top_k=4, num_nodes=3),
    "best first, wide": BestFirst(depth=2, top_k=50, num_nodes=30),
    "dyspec": DySpec(depth=5, num_nodes=9, max_children=3, threshold=0.1, trust=1.0),
    "dyspec, deeper": DySpec(),
    "dyspec, everything": DySpec(depth=3, num_nodes=14, max_children=3, threshold=0.0),
}
MODES = [(name, mode) for name, shape in SHAPES.items() for mode in shape_of(shape).modes]
every_shape = pytest.mark.parametrize("name", list(SHAPES))


@every_shape
@settings(max_examples=4)
@given(data=st.data())
def test_fp64_tokens_equal_plain_greedy(name: str, data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(["llama-gqa", "mistral-window", "gpt2", "qwen2-mixed-window"]))
    lengths = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4).map(tuple))
    target: Any = models.target(family)
    drafter = ModelDrafter(
        models.draft(data.draw(st.sampled_from(["near", "far", "padded-vocab"])), family), tree=SHAPES[name]
    )
    ids, mask = models.prompts(lengths, models.VOCAB, data.draw(st.integers(0, 10**6)))
    arguments: dict[str, Any] = dict(
        attention_mask=mask, do_sample=False, pad_token_id=models.PAD, eos_token_id=[2, 5, 9],
        max_new_tokens=data.draw(st.integers(1, 14)),
    )  # fmt: skip
    spec = Speculator(target, drafter)
    out: Any = spec.generate(ids, **arguments)
    assert torch.equal(out, target.generate(ids, **arguments))
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0, spec.report.last_drafter_fault


class Forgetful(ModelDrafter):
    """Refills its K/V from the text before every proposal."""

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        assert self._session is not None
        self._session.cache.forget(CACHE_NAME)
        return super().propose(budget, uniforms)


def traces(drafter: ModelDrafter, seed: int = 3, rows: int = 3) -> tuple[list[StepTrace], int]:
    """What every step drafted and accepted, and how often the drafter's K/V had not to be computed again."""
    target = models.target("llama-gqa")
    ids, mask = models.prompts((6, 3, 8)[:rows], models.VOCAB, 1)
    seen: list[StepTrace] = []
    spec = Speculator(target, drafter, rule="traversal")
    spec.generate(
        ids, attention_mask=mask, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=16, seed=seed,
        eos_token_id=None, pad_token_id=0, on_step=seen.append,
    )  # fmt: skip
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0, spec.report.last_drafter_fault
    return [trace._replace(ms_draft=0.0, ms_verify=0.0, ms_rest=0.0) for trace in seen], spec.report.num_accepted_tokens


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_kept_drafter_cache_equals_a_refilled_one(name: str, mode: str) -> None:
    """A node's K/V found in the wrong slot would change what is drafted afterwards."""
    near = models.draft("near", "llama-gqa")
    kept, accepted = traces(ModelDrafter(near, tree=SHAPES[name], children=mode))
    assert kept == traces(Forgetful(near, tree=SHAPES[name], children=mode))[0]
    assert accepted > 3


def test_a_node_looked_for_in_the_wrong_slot_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without `place` the cache takes slot i for node i, and later drafts differ."""
    near = models.draft("near", "llama-gqa")
    honest = traces(ModelDrafter(near, tree=SHAPES["best first"]))[0]
    monkeypatch.setattr("specdec.kv.shared.SharedKVCache.place", lambda self, name, slots: None)
    assert traces(ModelDrafter(near, tree=SHAPES["best first"]))[0] != honest


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_a_row_drafts_the_same_alone_and_in_company(name: str, mode: str) -> None:
    near = models.draft("near", "llama-gqa")
    target = models.target("llama-gqa")
    ids, mask = models.prompts((6, 2, 7), models.VOCAB, 5)
    arguments: dict[str, Any] = dict(
        do_sample=True, top_k=0, max_new_tokens=10, eos_token_id=None, pad_token_id=0
    )  # fmt: skip
    spec = Speculator(target, ModelDrafter(near, tree=SHAPES[name], children=mode), rule="traversal")
    together: Any = spec.generate(ids, attention_mask=mask, seed=[4, 5, 6], **arguments)
    for row in range(3):
        length = int(mask[row].sum())
        alone: Any = spec.generate(
            ids[row : row + 1, -length:], attention_mask=mask[row : row + 1, -length:], seed=[4 + row], **arguments
        )
        assert torch.equal(alone[0, length:], together[row, ids.shape[1] :])


VOCAB = 6
TABLE = torch.tensor(np.random.default_rng(7).normal(0, 1.6, (VOCAB, VOCAB)), dtype=torch.float32)
"""A Markov drafter: scores after a token."""


def markov(run: Run, slots: range) -> Tensor:
    return TABLE[run.tokens[:, slots.start : slots.stop]]


def grown(shape: TreeShape, mode: str, rows: int, seed: int = 0, limit: int = 99, nodes: int = 99) -> DraftTree:
    """Trees of `rows` rows that differ in their noise only."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(rows, shape.num_uniforms, generator=generator, dtype=torch.float64)
    depths = (min(limit, shape.max_depth),) * rows
    start = Start(torch.full((rows,), 2), depths, min(nodes, shape.max_nodes), mode, uniforms)
    tree = grow(shape.grower(start), start.roots, markov).tree
    tree.validate(VOCAB, start.roots)
    return tree


def check_draws(tree: DraftTree, what: str) -> None:
    """Every sampled node, given the siblings before it, follows its parent's q off them: whatever decided that it
    should exist, its own token did not."""
    counts: dict[tuple[int, ...], np.ndarray] = {}
    fixed: dict[tuple[int, ...], np.ndarray] = {}
    rows = zip(*(part.tolist() for part in (tree.tokens, tree.parents, tree.num_nodes, tree.sampled)), strict=True)
    for tokens, parents, count, sampled in rows:
        elder: dict[int, list[int]] = {}
        for node in range(1, count):
            taken = elder.setdefault(parents[node], [])
            if sampled[node]:
                key = (tokens[parents[node]], *sorted(taken))
                counts.setdefault(key, np.zeros(VOCAB))[tokens[node]] += 1
                law = TABLE[tokens[parents[node]]].double().softmax(-1).numpy().copy()
                law[taken] = 0.0
                fixed[key] = law / law.sum()
            taken.append(tokens[node])
    assert sum(count.sum() for count in counts.values()) > len(tree.tokens) / 2, "nothing was sampled"
    judge(g_test_strata(list(counts.values()), [fixed[key] for key in counts]), what)


@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        ((3, 2), "sampled"),
        ((3, 2), "mixed"),
        ([[0], [1], [0, 0], [0, 1], [0, 2], [1, 0]], "sampled"),
        ([[0], [1], [0, 0], [0, 1], [0, 2], [1, 0]], "mixed"),
        (DySpec(3, 7, 3, 0.1, trust=1.0), "sampled"),
        (DySpec(4, 4, 4, 0.0), "sampled"),
    ],
    ids=["widths-sampled", "widths-mixed", "paths-sampled", "paths-mixed", "dyspec", "dyspec-small"],
)
def test_every_draw_follows_its_law_given_what_was_drawn_before(shape: Any, mode: str) -> None:
    check_draws(grown(shape_of(shape), mode, 8000), f"draws of {shape}, {mode}")


def test_looking_at_a_token_before_keeping_it_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: DySpec with a sibling's value computed from its own token."""
    honest = dyspec_module.draw_children

    def peeking(scores: Tensor, count: int, uniforms: Tensor) -> Draws:
        draws = honest(scores, count, uniforms)
        return draws._replace(rest=draws.mass)

    monkeypatch.setattr(dyspec_module, "draw_children", peeking)
    with must_be_caught():
        check_draws(grown(DySpec(3, 7, 3, 0.1, trust=1.0), "sampled", 8000), "peeking")


def paths_of(tree: DraftTree, row: int) -> list[tuple[int, ...]]:
    """The tokens from the root to each node."""
    paths: list[tuple[int, ...]] = [()]
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    for node in range(1, int(tree.num_nodes[row])):
        paths.append((*paths[parents[node]], tokens[node]))
    return paths[1:]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 20), st.integers(1, 5), st.integers(1, 25))
def test_best_first_keeps_the_likeliest_nodes(depth: int, top_k: int, nodes: int, limit: int, most: int) -> None:
    """Against all paths scored one by one. With a beam of `top_k` only what the beam can see counts."""
    tree = grown(BestFirst(depth, top_k, nodes), "top", 2, limit=limit, nodes=most)
    law = TABLE.double().log_softmax(-1)

    def value(path: tuple[int, ...]) -> float:
        return float(sum(law[a, b] for a, b in itertools.pairwise((2, *path))))

    wide = min(top_k, VOCAB)
    seen: list[tuple[float, tuple[int, ...]]] = []
    beam: list[tuple[int, ...]] = [()]
    for _ in range(min(depth, limit)):
        level = [(*path, token) for path in beam for token in law[(2, *path)[-1]].topk(wide).indices.tolist()]
        seen += [(value(path), path) for path in level]
        beam = sorted(level, key=value, reverse=True)[:top_k]
    wanted = {path for _, path in sorted(seen, reverse=True)[: min(nodes, most)]}
    for row in range(2):
        assert set(paths_of(tree, row)) == wanted
        assert len(paths_of(tree, row)) == len(wanted)


def test_rows_keep_to_their_own_depth() -> None:
    for shape in (BestFirst(4, 3, 12), DySpec(4, 12, 3, 0.0), shape_of((2, 2, 2))):
        for mode in shape.modes:
            uniforms = torch.rand(3, shape.num_uniforms, dtype=torch.float64)
            start = Start(torch.tensor([2, 2, 2]), (0, 2, 3), 9, mode, uniforms)
            tree = grow(shape.grower(start), start.roots, markov).tree
            tree.validate(VOCAB, start.roots)
            deepest = torch.where(tree.valid, tree.depths, 0).amax(1).tolist()
            assert deepest[0] == 0
            assert deepest[1] == 2
            assert 2 <= deepest[2] <= 3
            assert int(tree.num_nodes.max()) == 10
            assert bool((tree.depths.where(tree.valid, 99).diff(dim=1) >= 0).all()), "level order"


def test_laws_with_fewer_tokens_than_children() -> None:
    """Two possible tokens, three children: the third is never one of the law's, and no law is broken."""
    scores = torch.full((1, 1, VOCAB), float("-inf"))
    scores[..., 1], scores[..., 4] = 0.0, 1.0

    def two_tokens(run: Run, slots: range) -> Tensor:
        return scores.expand(len(run.tokens), len(slots), VOCAB)

    for shape in (shape_of((3, 3)), BestFirst(2, 3, 12), DySpec(2, 12, 3, 0.0)):
        for mode in shape.modes:
            uniforms = torch.rand(50, shape.num_uniforms, dtype=torch.float64)
            start = Start(torch.full((50,), 2), (2,) * 50, 12, mode, uniforms)
            tree = grow(shape.grower(start), start.roots, two_tokens).tree
            tree.validate(VOCAB, start.roots)
            for row in range(50):
                found = [path for path in paths_of(tree, row) if set(path) <= {1, 4}]
                assert sorted(found) == [(1,), (1, 1), (1, 4), (4,), (4, 1), (4, 4)], (shape, mode)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tree": BestFirst(), "children": "sampled"}, "children: expected one of"),
        ({"tree": DySpec(), "children": "mixed"}, "children: expected one of"),
        ({"tree": (2, 1), "children": "best"}, "children: expected one of"),
        ({"tree": (2, 1), "k": 2}, "k or tree"),
        ({"tree": (2, 99)}, "children"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=said):
        ModelDrafter(models.draft("near", "llama-gqa"), **options)


@pytest.mark.parametrize(
    "policy", [lambda: BestFirst(depth=0), lambda: DySpec(num_nodes=0), lambda: DySpec(threshold=1)]
)
def test_policies_refuse_nonsense(policy: Any) -> None:
    with pytest.raises(UnsupportedArgumentError, match="expected"):
        policy()
