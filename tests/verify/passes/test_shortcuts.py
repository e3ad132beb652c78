"""Every shortcut of a step gives, to the bit, what the general way gives: NaN, ties and padded rows included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specdec.decision import read_verdict, undrafted
from specdec.drafters.guard import normalised
from specdec.drafters.model import best_token
from specdec.kv import InvalidTreeError
from specdec.verify import DraftTree, Noise, NoiseStream, Rows, SamplingLaw
from specdec.verify.host_integers import argmax, entries, on_host, packed
from specdec.verify.noise import Role, uniform
from specdec.verify.passes.inputs import CausalBand, additive_masks
from specdec.verify.rules import RULES
from specdec.verify.rules.base import row_at, verdict_at
from specdec.verify.rules.block import _kept, _kept_on_host
from specdec.verify.rules.chain import draft_law, view_chain
from specdec.verify.rules.greedy import _followed
from specdec.verify.topology import Topology, frame_of
from specdec.verify.tree import Verdict

NAN, INF = float("nan"), float("inf")
VOCAB = 23


def scores_with_traps(generator: torch.Generator, *shape: int) -> Tensor:
    """Few distinct values (ties), infinities, both zeros, now and then NaN."""
    scores = torch.randint(-2, 3, shape, generator=generator).float()
    scores[torch.rand(shape, generator=generator) < 0.1] = -INF
    scores[torch.rand(shape, generator=generator) < 0.1] = -0.0
    scores[torch.rand(shape, generator=generator) < 0.01] = NAN
    return scores


def drawn_chain(generator: torch.Generator, rows: int, k: int) -> tuple[DraftTree, Tensor, Noise]:
    q = torch.randn(rows, k, VOCAB, generator=generator).mul(2).softmax(-1)
    near = torch.cat([q.log(), torch.randn(rows, 1, VOCAB, generator=generator)], 1)
    p = (near + torch.randn(near.shape, generator=generator) * 0.7).softmax(-1)
    tokens = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(rows, k)
    tree = DraftTree.build(Topology.chain(k), torch.cat([torch.zeros(rows, 1, dtype=torch.int64), tokens], 1), q)
    uniforms = torch.rand(rows, k + 2, dtype=torch.float64, generator=generator)
    return tree, p, Noise(uniforms[:, : k + 1], uniforms[:, -1])


def unframed(tree: DraftTree) -> DraftTree:
    """The same tree, but with parts that are not known to be what `build` makes."""
    return replace(tree, sampled=tree.sampled.clone())


def same(first: Verdict, second: Verdict) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_argmax_and_entries_are_torch_s() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        scores = scores_with_traps(generator, 3, 4, VOCAB)
        assert torch.equal(argmax(scores), scores.argmax(-1))
        assert torch.equal(argmax(scores.double()), scores.argmax(-1))
        assert torch.equal(argmax(scores[:, ::2]), scores[:, ::2].argmax(-1))
    places = [(0, 1, 5), (2, 3, 22)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert str(entries(scores.to(dtype), places)) == str([float(scores[place]) for place in places])


def test_best_token_refuses_nan_wherever_it_is() -> None:
    scores = torch.randn(2, 1, VOCAB)
    for dtype in (torch.float32, torch.float64):
        peaks: list[Tensor] = []
        assert torch.equal(best_token(scores.to(dtype), peaks), scores.argmax(-1))
        assert all(bool((peak == scores.amax(-1)).all()) for peak in peaks)
    for row in range(2):
        for token in (0, 7, VOCAB - 1):
            sick = scores.clone()
            sick[row, 0, token] = NAN
            with pytest.raises(FloatingPointError, match="NaN"):
                best_token(sick, [])


def test_what_travels_packed_is_what_is_read_in_place() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randint(-9, 9, shape, generator=generator) for shape in ((3,), (3, 4), (3, 1), (3,))]
    tensors.append(torch.rand(3, 2, generator=generator) < 0.5)
    assert packed(*tensors) == on_host(*tensors)


def test_nan_anywhere_in_scores_is_nan_at_the_head_of_their_law() -> None:
    generator = torch.Generator().manual_seed(2)
    for vocab in (2, 7, 4099):
        for trap in (NAN, INF, -INF):
            for place in (0, vocab // 2, vocab - 1):
                scores = torch.randn(3, 2, vocab, generator=generator) * 30
                scores[1, 0, place] = trap
                scores[2, 1] = -INF
                law = scores.softmax(-1)
                assert torch.equal(law[..., 0].isnan(), law.amax(-1).isnan())
                assert bool(law[1, 0, 0].isnan()) == (trap != -INF)
                assert bool(law[2, 1, 0].isnan())


@pytest.mark.parametrize("ragged", [False, True])
def test_greedy_chains_on_the_host(ragged: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    deep = 0
    for trial in range(200):
        rows, k = 1 + trial % 3, trial % 5
        p = scores_with_traps(generator, rows, k + 1, VOCAB)
        tokens = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), p.argmax(-1)[:, :k]], 1)
        tokens[torch.rand(tokens.shape, generator=generator) < 0.2] = 1
        tree = DraftTree.build(Topology.chain(k), tokens)
        if ragged:
            tree = replace(tree, num_nodes=torch.randint(1, k + 2, (rows,), generator=generator))
        choice = p.argmax(-1)
        node = _followed(tree, choice)
        expected = verdict_at(replace(tree, topology=None), node, choice.gather(1, node[:, None])[:, 0])
        got = RULES["greedy"]()(tree, p, Noise(torch.zeros(rows, k + 1), torch.zeros(rows)))
        width = expected.path.shape[1]
        same(got._replace(path=got.path[:, :width]), expected)
        assert bool((got.path[:, width:] == -1).all())
        deep += int(node.max())
    assert deep > 100
    bare = DraftTree.root_only(torch.zeros(3, dtype=torch.int64))
    p = scores_with_traps(generator, 3, 1, VOCAB)
    same(undrafted(p, None), RULES["greedy"]()(bare, p, Noise(torch.zeros(3, 1), torch.zeros(3))))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_block_s_scalars_on_the_host(rows: int, k: int) -> None:
    generator = torch.Generator().manual_seed(100 * rows + k)
    kept = set()
    for trial in range(150):
        tree, p, noise = drawn_chain(generator, rows, k)
        assert tree.is_drawn_chain
        if trial % 10 == 0:
            p[0, trial // 10 % (k + 1)] = NAN
        expected, got = _kept(tree, p, noise), _kept_on_host(tree, p, noise)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1].nan_to_num(-1), expected[1].nan_to_num(-1))
        kept |= set(got[0].tolist())
    assert kept == set(range(k + 1))


@pytest.mark.parametrize("name", ["block", "rejection"])
@pytest.mark.parametrize("rows", [1, 3])
def test_drawn_chains_are_judged_as_any_chain(name: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    for trial in range(150):
        tree, p, noise = drawn_chain(generator, rows, 1 + trial % 4)
        general = unframed(tree)
        assert tree.is_drawn_chain
        assert not general.is_drawn_chain
        same(RULES[name]()(tree, p, noise), RULES[name]()(general, p, noise))
        for one, other in zip(view_chain(tree, p), view_chain(general, p), strict=True):
            assert torch.equal(one, other)
        node = torch.randint(0, tree.tokens.shape[1], (rows,), generator=generator)
        law = row_at(p, node)
        assert torch.equal(law, p[torch.arange(rows), node])
        assert torch.equal(draft_law(tree, node, law), draft_law(general, node, law))


def test_only_what_build_made_passes_as_drawn() -> None:
    tree, _, _ = drawn_chain(torch.Generator().manual_seed(4), 2, 3)
    changed: list[dict[str, Any]] = [
        {"sampled": torch.zeros_like(tree.sampled)},
        {"num_nodes": torch.tensor([4, 2])},
        {"q_row": torch.tensor([[2, 1, 0, -1]]).expand(2, -1)},
        {"q": None, "q_row": None},
        {"topology": None},
    ]
    assert not any(replace(tree, **parts).is_drawn_chain for parts in changed)
    assert torch.equal(replace(tree, num_nodes=torch.tensor([4, 2])).valid.sum(1), torch.tensor([4, 2]))
    assert not DraftTree.build(Topology.widths((2, 1)), torch.zeros(1, 5, dtype=torch.int64), tree.q[:1]).is_drawn_chain  # type: ignore[index]


def test_framed_trees_are_checked_as_all_others() -> None:
    tree, _, _ = drawn_chain(torch.Generator().manual_seed(5), 2, 3)
    assert tree.q is not None
    impossible = tree.q.clone()
    impossible[1, 2] = torch.eye(VOCAB)[(int(tree.tokens[1, 3]) + 1) % VOCAB]
    negative = tree.q.clone()
    negative[0, 0, :2] += torch.tensor([-2.0, 2.0])
    spoiled: list[dict[str, Any]] = [
        {"tokens": tree.tokens + 1},
        {"tokens": tree.tokens * torch.tensor([1, 1, 1, -1])},
        {"tokens": tree.tokens + torch.tensor([0, 0, VOCAB, 0])},
        {"q": impossible},
        {"q": negative},
        {"q": tree.q * 1.01},
        {"q": tree.q.clone().fill_(NAN)},
    ]
    tree.validate(VOCAB, tree.tokens[:, 0])
    for parts in spoiled:
        messages = []
        for kind in (tree, unframed(tree)):
            with pytest.raises(InvalidTreeError) as fault:
                replace(kind, **parts).validate(VOCAB, tree.tokens[:, 0])
            messages.append(str(fault.value))
        assert messages[0] == messages[1]
    with pytest.raises(InvalidTreeError, match="contradict"):
        replace(tree, parents=tree.parents.clamp(min=0)).validate(VOCAB, tree.tokens[:, 0])
    off = replace(tree, q=tree.q * (1 + 1e-4))
    assert torch.equal(normalised(off).q_sums, normalised(unframed(off)).q_sums)
    assert normalised(tree) is tree


def test_the_verdict_on_the_host() -> None:
    parents = torch.tensor([[-1, 0, 0, 1, 1], [-1, 0, 1, 2, 0], [-1, 0, 0, 0, 0]])
    tokens = torch.arange(15).view(3, 5)
    tree = DraftTree(tokens, parents, torch.tensor([5, 4, 1]), torch.zeros(3, 5, dtype=torch.bool))
    path = torch.tensor([[0, 1, 4, -1], [0, 1, -1, -1], [0, -1, -1, -1]])
    sick = torch.tensor([[0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    decision = read_verdict(tree, sick, Verdict(path, torch.tensor([2, 1, 0]), torch.tensor([70, 71, 72])))
    assert decision.paths == [[0, 1, 4], [0, 1], [0]]
    assert decision.runs == [[1, 4, 70], [6, 71], [72]]
    assert decision.kinds == [["accepted", "accepted", "bonus"], ["accepted", "recovered"], ["bonus"]]
    assert (decision.accepted, decision.drafted, decision.reached) == ([2, 1, 0], [4, 3, 0], [2, 2, 0])
    assert (decision.sick, decision.sick_path) == ([True, True, False], [False, True, False])


def test_masks_of_ragged_rows_are_cut_from_the_table() -> None:
    band = CausalBand()
    for starts, width in (([3, 9, 0], 1), ([7, 2], 4)):
        positions = torch.tensor(starts)[:, None] + torch.arange(width)
        read = max(starts) + width
        for dtype in (torch.float32, torch.bfloat16):
            visible = torch.arange(read) <= positions[:, :, None]
            assert torch.equal(band.masks(positions, read, dtype), additive_masks(visible, positions, None, {}, dtype))


def test_prefix_free_processors_are_called_as_transformers_calls_them() -> None:
    generator = torch.Generator().manual_seed(6)
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.8)])
    logits = torch.randn(2, 3, VOCAB, generator=generator)
    given = logits.clone()
    rows = Rows(torch.zeros(2, 1, dtype=torch.int64), None, 8)
    scores = SamplingLaw(processors)(logits, rows, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), range(3))
    any_ids: Any = torch.zeros(6, 1, dtype=torch.int64)
    assert torch.equal(scores, processors(any_ids, given.view(6, -1).clone()).view_as(given))
    assert torch.equal(logits, given)


def test_tabulated_noise_is_the_pure_function() -> None:
    keys = [(3, 0), (-4, 5), (3, 1)]
    stream = NoiseStream([seed for seed, _ in keys], [request for _, request in keys], torch.device("cpu"))
    for step in (0, 1, 2, 127, 128, 130, 2):
        for rows in ([0, 1, 2], [2, 1, 0], [1], [0, 1, 2]):
            own = [uniform(*keys[row], step, Role.DRAFT, torch.arange(5)) for row in rows]
            assert torch.equal(stream.draft(rows, step, 5), torch.stack(own))
        keys[1] = (100 + step, 7)
        stream.join(1, *keys[1])  # the very next draw must know of it


def test_runs_are_written_to_both_layouts() -> None:
    real = torch.tensor([[False, True, True]])
    rows = Rows(torch.tensor([[0, 5, 6]]), real, 4)
    rows.extend([[7, 8, 9]])
    assert rows.ids[0, :6].tolist() == [0, 5, 6, 7, 8, 9]
    assert rows.text[0, :5].tolist() == [5, 6, 7, 8, 9]
    assert (rows.ends, rows.num_tokens) == ([6], [5])


def test_a_tree_written_to_is_judged_as_it_says() -> None:
    """What trees of a shape share must not be written to; whoever does it all the same gets the general way."""
    topology = Topology((-1, 0, 1, 2, 3, 4))
    q = torch.full((1, 5, 7), 1 / 7)
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    assert DraftTree.build(topology, tokens, q).is_drawn_chain
    tree = DraftTree.build(topology, tokens, q)
    try:
        tree.sampled[:, 5] = False
        assert not tree.is_drawn_chain
    finally:  # every later tree of so many nodes would have it
        tree.sampled[:, 5] = True
        frame_of.cache_clear()
