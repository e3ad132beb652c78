"""What a rule hands back, whatever the shape: paths of padded trees, small integers off the device."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from trees import ancestors, tree_of

from specdec.kv.base import kept_slots
from specdec.verify import DraftTree, Noise, Topology
from specdec.verify.host_integers import entries, on_host, packed
from specdec.verify.rules.base import row_at, sample_from, verdict_at
from specdec.verify.rules.greedy import Greedy


def random_parents(draw: random.Random, nodes: int) -> tuple[int, ...]:
    return (-1, *(draw.randrange(max(0, node - 3), node) for node in range(1, nodes)))


@pytest.mark.parametrize("seed", range(20))
def test_a_verdict_names_the_ancestors_of_its_node(seed: int) -> None:
    """Rows of different sizes, each node of each row; what pads a row is on no path."""
    draw = random.Random(seed)
    shapes = [random_parents(draw, draw.randint(1, 9)) for _ in range(3)]
    tree = tree_of(shapes, seed)
    for nodes in zip(*([draw.randrange(len(shape)) for _ in range(9)] for shape in shapes), strict=True):
        verdict = verdict_at(tree, torch.tensor(nodes), torch.tensor([5, 6, 7]))
        assert verdict.next_token.tolist() == [5, 6, 7]
        assert verdict.path.shape == (3, tree.max_depth + 1)
        for row, node in enumerate(nodes):
            wanted = ancestors(shapes[row], node)
            path = verdict.path[row].tolist()
            assert path[: len(wanted)] == wanted
            assert set(path[len(wanted) :]) <= {-1}
            assert int(verdict.num_accepted[row]) == len(wanted) - 1


@pytest.mark.parametrize("shared", [True, False])
def test_greedy_matching_keeps_no_padding(shared: bool) -> None:
    """Chains of one, two and three nodes, padded with token 0, where token 0 is the target's choice as well."""
    tree = DraftTree.build(Topology.chain(2), torch.tensor([[3, 0, 0], [3, 1, 0], [3, 1, 0]]))
    tree = replace(tree, num_nodes=torch.tensor([1, 2, 3]), topology=tree.topology if shared else None)
    scores = F.one_hot(torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 0]]), 4).float()
    verdict = Greedy()(tree, scores, Noise(torch.zeros(3, 3), torch.zeros(3)))
    assert verdict.num_accepted.tolist() == [0, 1, 2]
    assert verdict.path.tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2]]
    assert verdict.next_token.tolist() == [0, 0, 0]


def test_the_two_ways_to_a_verdict_of_a_chain_agree() -> None:
    tokens = torch.arange(8).view(2, 4)
    shared = DraftTree.build(Topology.chain(3), tokens)
    apart = tree_of([(-1, 0, 1, 2)] * 2)
    for nodes in ((0, 3), (2, 1), (3, 0)):
        one, other = (verdict_at(tree, torch.tensor(nodes), torch.tensor([1, 2])) for tree in (shared, apart))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_integers_travel_packed_and_come_back_as_they_were() -> None:
    """One column is still a list of lists, a vector is none, and what is packed first stays first."""
    tensors = (
        torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([7, 8]), torch.tensor([[9], [10]]),
        torch.tensor([True, False]), torch.zeros(2, 0, dtype=torch.int64), torch.tensor([[2**40, -1], [0, 3]]),
    )  # fmt: skip
    wanted = [tensor.tolist() for tensor in tensors]
    assert packed(*tensors) == wanted == on_host(*tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_entries_and_rows_by_index(dtype: torch.dtype) -> None:
    values = torch.arange(24.0).view(2, 3, 4).to(dtype)
    places = [(1, 2, 3), (0, 0, 0), (1, 0, 2)]
    assert entries(values, places) == [23.0, 0.0, 14.0]
    assert torch.equal(row_at(values, torch.tensor([2, 1])), torch.stack([values[0, 2], values[1, 1]]))
    assert torch.equal(row_at(values[:1], torch.tensor([2])), values[:1, 2])


def test_a_draw_never_hits_what_has_no_weight() -> None:
    """Both ends of the unit interval, and points that lie exactly between two entries."""
    weights = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    for point, wanted in ((0.0, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2.0**-52, 4)):
        assert int(sample_from(weights, torch.tensor(point, dtype=torch.float64))) == wanted


def test_kept_slots_are_those_a_model_has_without_a_gap() -> None:
    assert kept_slots([0, 1, 2], 3, None) == [0, 1, 2]
    assert kept_slots([0, 2, 5], 5, None) == [0, 2]  # slot 5 would be the sixth
    assert kept_slots([0, 2, 5], 6, None) == [0, 2, 5]
    assert kept_slots([], 3, None) == []
    assert kept_slots([0, 1], 0, None) == []
    assert kept_slots([0, 1, 2], 3, [2, 0, 1]) == [2, 0, 1]
    assert kept_slots([0, 2, 1], 3, [0, -1, 1]) == [0, 1]  # node 1 was not run
    assert kept_slots([0, 1, 2], 9, [4, 7]) == [4, 7]  # nor was node 2, of which nothing is said
    assert kept_slots([2, 0], 9, [4, 7]) == []
