"""Children of draft nodes: ranks, ties, and what comes when fewer tokens are left than were asked for."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specdec.drafters.children import (
    MIN_REST,
    best_draws,
    draw_children,
    mixed_children,
    refuse_nan,
    sampled_children,
    top_children,
)
from specdec.drafters.model import best_token
from specdec.drafters.shapes import Start, Static
from specdec.verify import Topology

NEVER = float("-inf")


def scores_of(masses: list[float]) -> Tensor:
    return torch.tensor(masses, dtype=torch.float64).log().float()[None, None]


def uniforms(*values: float) -> Tensor:
    return torch.tensor([[values]], dtype=torch.float64)


def test_draws_without_replacement_by_hand() -> None:
    """q = .5 .25 .25: after 0 was drawn, 1 and 2 have half each of what is left."""
    draws = draw_children(scores_of([0.5, 0.25, 0.25]), 3, uniforms(0.1, 0.6, 0.3))
    assert draws.tokens.tolist() == [[[0, 2, 1]]]
    assert draws.mass[0, 0].tolist() == pytest.approx([0.5, 0.25, 0.25])
    assert draws.rest[0, 0].tolist() == pytest.approx([1.0, 0.5, 0.25])
    assert draws.law[0, 0].tolist() == pytest.approx([0.5, 0.25, 0.25]), "q itself, whatever was drawn"


def test_best_draws_say_what_is_left_before_each() -> None:
    draws = best_draws(scores_of([0.125, 0.5, 0.125, 0.25]), 3)
    assert draws.tokens[0, 0, :2].tolist() == [1, 3]
    assert draws.mass[0, 0].tolist() == pytest.approx([0.5, 0.25, 0.125])
    assert draws.rest[0, 0].tolist() == pytest.approx([1.0, 0.5, 0.25])
    assert best_draws(scores_of([0.5, 0.5]), 5).tokens.shape == (1, 1, 2), "no more than there are tokens"


@given(st.data())
def test_exhausted_draws_give_way_to_the_best_tokens_not_drawn(data: st.DataObject) -> None:
    """Few tokens hold all the mass, many of them equally much: drawn ones come first, each token once."""
    vocab = data.draw(st.integers(2, 7))
    weights = data.draw(st.lists(st.sampled_from([0.0, 1e-6, 1e-5, 0.25, 1.0, 1.0]), min_size=vocab, max_size=vocab))
    weights[data.draw(st.integers(0, vocab - 1))] = 1.0
    count = data.draw(st.integers(1, vocab))
    masses = [weight / sum(weights) for weight in weights]
    noise = [data.draw(st.floats(0, 1, exclude_max=True)) for _ in range(count)]
    made = sampled_children(scores_of(masses), count, uniforms(*noise))
    assert made.sampled is not None
    tokens, sampled, possible = (part[0, 0].tolist() for part in (made.tokens, made.sampled, made.possible))
    assert len(set(tokens)) == count, "no token comes twice"
    left = 1.0
    for rank, (token, drawn) in enumerate(zip(tokens, sampled, strict=True)):
        assert drawn == (left >= MIN_REST) or abs(left - MIN_REST) < 1e-6
        if drawn:
            assert masses[token] > 0
            left -= masses[token]
        else:
            rest = [masses[other] for other in range(vocab) if other not in tokens[:rank]]
            assert masses[token] == pytest.approx(max(rest), abs=1e-9)
            assert not any(sampled[rank:])
        assert possible[rank] == (masses[token] > 0)


def test_tokens_without_mass_come_last_and_are_said_to_be_impossible() -> None:
    made = sampled_children(torch.tensor([[[NEVER, 1.0, NEVER, 1.0, NEVER]]]), 4, uniforms(0.7, 0.2, 0.9, 0.9))
    assert made.tokens[0, 0, :2].tolist() == [3, 1]
    assert sorted(made.tokens[0, 0, 2:].tolist()) == sorted(set(made.tokens[0, 0, 2:].tolist()) - {1, 3})
    assert made.sampled is not None
    assert made.sampled.tolist() == [[[True, True, False, False]]]
    assert made.possible.tolist() == [[[True, True, False, False]]]


def test_one_child_is_always_drawn() -> None:
    made = sampled_children(torch.tensor([[[NEVER, 1.0]]]), 1, uniforms(0.99))
    assert (made.tokens.tolist(), made.possible.tolist()) == ([[[1]]], [[[True]]])
    assert made.sampled is not None
    assert made.sampled.tolist() == [[[True]]]


def test_equal_scores_are_all_drawn_before_any_comes_twice() -> None:
    orders = set()
    for noise in itertools.product((0.05, 0.4, 0.7, 0.95), repeat=3):
        made = sampled_children(torch.zeros(1, 1, 3), 3, uniforms(*noise))
        assert made.sampled is not None
        assert bool(made.sampled.all())
        orders.add(tuple(made.tokens[0, 0].tolist()))
    assert orders == set(itertools.permutations(range(3)))


def test_mixed_children_are_the_best_but_one_and_one_off_them() -> None:
    """Node 0 has three children: 3 and 1, then a draw from 0 and 2; node 1 only one, drawn from all."""
    law = torch.tensor([0.1, 0.3, 0.2, 0.4])
    scores = law.log().expand(1, 2, 4)
    made = mixed_children(scores, torch.tensor([3, 1]), 3, torch.tensor([[0.9, 0.05]], dtype=torch.float64))
    assert made.tokens[0, 0].tolist() == [3, 1, 2]
    assert int(made.tokens[0, 1, 0]) == 0
    assert made.sampled is not None
    assert made.law is not None
    assert made.sampled[0].tolist() == [[False, False, True], [True, False, False]]
    torch.testing.assert_close(made.law[0, 0], torch.tensor([1 / 3, 0.0, 2 / 3, 0.0]))
    torch.testing.assert_close(made.law[0, 1], law)
    low = mixed_children(scores, torch.tensor([3, 1]), 3, torch.tensor([[0.1, 0.95]], dtype=torch.float64))
    assert (int(low.tokens[0, 0, 2]), int(low.tokens[0, 1, 0])) == (0, 3)


def test_mixed_children_where_the_best_hold_all_the_mass() -> None:
    scores = torch.tensor([[[NEVER, 2.0, 1.0, NEVER]]])
    made = mixed_children(scores, torch.tensor([3]), 3, torch.tensor([[0.5]], dtype=torch.float64))
    assert made.tokens[0, 0, :2].tolist() == [1, 2]
    last = int(made.tokens[0, 0, 2])
    assert last in (0, 3)
    assert made.law is not None
    assert made.law[0, 0].tolist() == [float(token == last) for token in range(4)]
    assert made.possible.tolist() == [[[True, True, False]]]


def test_top_children_are_ranked_and_know_what_is_impossible() -> None:
    made = top_children(torch.tensor([[[0.5, NEVER, 2.0, 1.0], [NEVER, NEVER, 3.0, NEVER]]]), 2)
    assert made.tokens[0, 0].tolist() == [2, 3]
    assert int(made.tokens[0, 1, 0]) == 2
    assert made.possible[0].tolist() == [[True, True], [True, False]]
    assert made.sampled is None
    one = top_children(torch.tensor([[[0.5, NEVER, 2.0]]]), 1)
    assert (one.tokens.tolist(), one.possible.tolist()) == ([[[2]]], [[[True]]])
    assert top_children(torch.full((1, 1, 3), NEVER), 1).possible.tolist() == [[[False]]]


def _refusing(scores: Tensor) -> None:
    """On a CPU at once, elsewhere when all levels are there."""
    peaks: list[Tensor] = []
    best_token(scores, peaks)
    refuse_nan(peaks)


@pytest.mark.parametrize("width", [1, 2])
def test_nan_in_any_score_is_refused(width: int) -> None:
    scores = torch.zeros(2, width, 5)
    peaks: list[Tensor] = []
    assert best_token(scores, peaks).shape == (2, width)
    refuse_nan(peaks)
    scores[1, width - 1, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        _refusing(scores)
    made = top_children(scores, 2)
    assert made.peaks is not None
    with pytest.raises(FloatingPointError, match="NaN"):
        refuse_nan([made.peaks])
    refuse_nan([made.peaks[:1]])


def test_what_lies_below_an_impossible_node_is_impossible_too() -> None:
    """The second child of the root has no mass; its own children have, and are no more reachable for it."""
    roots = torch.tensor([1])
    shape = Static(Topology.widths((2, 1, 1)))
    grower = shape.grower(Start(roots, (3,), 6, "top", torch.zeros(1, 7, dtype=torch.float64)))
    first = grower.extend(torch.tensor([[[NEVER, 1.0, NEVER]]]))
    assert first is not None
    assert first.impossible.tolist() == [[False, True]]
    second = grower.extend(torch.tensor([[[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]]))
    assert second is not None
    assert second.tokens.tolist() == [[2, 2]]
    assert second.impossible.tolist() == [[False, True]]
