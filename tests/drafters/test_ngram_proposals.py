"""What the n-gram drafter proposes: text equality cannot see a lookup that finds less, or something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafters import Budget, NgramDrafter, Session
from specdec.verify import DraftTree, Rows

NO_NOISE = torch.zeros(1, 0, dtype=torch.float64)
Path = tuple[int, ...]


def session(texts: list[list[int]]) -> Session:
    rows = Rows.empty(torch.device("cpu"))
    for text in texts:
        rows.join(text)
    nothing: Any = None
    return Session(rows, nothing, nothing, do_sample=False, vocab=100)


def proposed(
    drafter: NgramDrafter, texts: list[list[int]], depths: list[int] | None = None, nodes: int = 99
) -> DraftTree:
    drafter.start(session(texts))
    return drafter.propose(Budget(tuple(depths or [99] * len(texts)), nodes), NO_NOISE)


def paths(tree: DraftTree, row: int = 0) -> list[Path]:
    """Every node below the root as the tokens that lead to it, in node order."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    out: list[Path] = [()]
    for node in range(1, int(tree.num_nodes[row])):
        out.append((*out[parents[node]], tokens[node]))
    return out[1:]


def chain(tree: DraftTree, row: int = 0) -> list[int]:
    """The tokens of a tree that is a chain."""
    nodes = paths(tree, row)
    assert [len(path) for path in nodes] == list(range(1, len(nodes) + 1))
    return list(nodes[-1]) if nodes else []


def test_the_longest_match_wins_over_a_later_one() -> None:
    text = [1, 2, 3, 40, 9, 3, 50, 8, 1, 2, 3]  # after 1 2 3 came 40, after the later 3 alone 50
    assert chain(proposed(NgramDrafter(k=1, max_ngram=3), [text])) == [40]
    assert chain(proposed(NgramDrafter(k=1, max_ngram=2), [text])) == [40]
    assert chain(proposed(NgramDrafter(k=1, max_ngram=1), [text])) == [50]


def test_of_equal_matches_the_latest_wins() -> None:
    text = [5, 6, 10, 5, 6, 11, 5, 6, 12, 7, 5, 6]
    assert chain(proposed(NgramDrafter(k=2), [text])) == [12, 7]


def test_shorter_matches_count_only_down_to_the_least() -> None:
    text = [1, 2, 30, 9, 2]
    assert chain(proposed(NgramDrafter(k=1), [text])) == [30]
    assert chain(proposed(NgramDrafter(k=1, min_ngram=2), [text])) == []
    assert chain(proposed(NgramDrafter(k=1, min_ngram=2), [[1, 2, 30, 1, 2]])) == [30]


def test_a_continuation_has_k_tokens_or_ends_with_the_text() -> None:
    text = [1, 2, 3, 4, 5, 6, 1]
    for k in range(1, 9):
        assert chain(proposed(NgramDrafter(k=k), [text])) == [2, 3, 4, 5, 6, 1][:k]
    assert chain(proposed(NgramDrafter(k=5), [[7, 7]])) == [7], "a match may overlap what it predicts"
    assert chain(proposed(NgramDrafter(k=5), [[7]])) == []
    assert chain(proposed(NgramDrafter(k=5), [[1, 2, 3]])) == []


def test_a_row_drafts_as_deep_as_its_own_budget() -> None:
    text = [1, 2, 3, 4, 5, 6, 1]
    tree = proposed(NgramDrafter(k=4), [text] * 4, depths=[0, 1, 3, 9])
    assert [chain(tree, row) for row in range(4)] == [[], [2], [2, 3, 4], [2, 3, 4, 5]]
    assert tree.tokens.shape == (4, 5)
    assert tree.is_chain


def test_branches_are_the_best_different_continuations() -> None:
    text = [1, 2, 20, 21, 1, 2, 30, 31, 1, 2, 20, 22, 4, 2, 50, 51, 9, 1, 2]
    got = [paths(proposed(NgramDrafter(k=2, branches=n), [text])) for n in (1, 2, 3, 4, 5)]
    assert got[0] == [(20,), (20, 22)], "the latest match of two tokens"
    assert got[1] == [*got[0], (30,), (30, 31)], "then the one before it"
    assert got[2] == [*got[1], (20, 21)], "a common prefix is drafted once"
    assert got[3] == [*got[2], (50,), (50, 51)], "then shorter matches"
    assert got[4] == got[3], "there is no other"


def test_what_another_continuation_begins_with_is_no_branch_of_its_own() -> None:
    text = [7, 7, 7]  # 7 was followed by 7, and by 7 7
    assert paths(proposed(NgramDrafter(k=3, branches=3, max_ngram=1), [text])) == [(7,), (7, 7)]
    assert paths(proposed(NgramDrafter(k=3, branches=1, max_ngram=1), [text])) == [(7,)]


def test_a_continuation_cut_off_by_the_end_of_the_text_takes_no_other_ones_place() -> None:
    text = [2, 2, 2, 5, 9, 2, 7, 2, 2]  # after 2 2 came 5 9 2 and 2 5 9; after 2 alone 2 (and the end), then 7 2 2
    tree = proposed(NgramDrafter(k=3, branches=3, max_ngram=2), [text])
    assert paths(tree) == [(5,), (5, 9), (5, 9, 2), (2,), (2, 5), (2, 5, 9), (7,), (7, 2), (7, 2, 2)]


def test_no_more_nodes_than_the_budget_has() -> None:
    text = [1, 2, 20, 21, 1, 2, 30, 31, 1, 2, 40, 41, 1, 2]
    drafter = NgramDrafter(k=2, branches=3)
    whole = paths(proposed(drafter, [text]))
    assert whole == [(40,), (40, 41), (30,), (30, 31), (20,), (20, 21)]
    for nodes in range(1, 8):
        assert paths(proposed(drafter, [text], nodes=nodes)) == whole[:nodes]
    assert (drafter.max_depth, drafter.max_nodes) == (2, 6)
    assert [drafter.nodes_within(depth) for depth in range(4)] == [0, 3, 6, 6]


def test_rows_are_looked_up_in_their_own_text_and_a_place_is_forgotten_with_its_row() -> None:
    drafter, held = NgramDrafter(k=2), session([[1, 2, 3, 1], [4, 5, 6, 4], [1, 9, 4]])
    drafter.start(held)
    tree = drafter.propose(Budget((9, 9, 9), 99), NO_NOISE)
    assert [chain(tree, row) for row in range(3)] == [[2, 3], [5, 6], []]
    drafter.stop([0])
    held.rows.leave(0)
    [row] = [held.rows.join([8, 1, 8])]
    drafter.join([row])
    assert row == 0
    places = {live: place for place, live in enumerate(held.rows.live)}
    tree = drafter.propose(Budget((9, 9, 9), 99), NO_NOISE)
    assert chain(tree, places[0]) == [1, 8], "nothing of the text that was here before"
    assert chain(tree, places[1]) == [5, 6]
    drafter.start(session([[3, 1]]))
    assert chain(drafter.propose(Budget((9,), 99), NO_NOISE)) == [], "nothing of the last call"


def expected(text: list[int], k: int, largest: int, least: int, branches: int, depth: int, nodes: int) -> list[Path]:
    """By the book: every place where the last tokens occurred before, longest match first, then latest first."""
    found: list[Path] = []
    for size in range(largest, least - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            tokens = tuple(text[end : end + min(k, depth)])
            known = any(other[: len(tokens)] == tokens for other in found)
            if size < len(text) and text[end - size : end] == text[-size:] and tokens and not known:
                found.append(tokens)
    kept: list[Path] = []
    for tokens in found[:branches]:
        for length in range(1, len(tokens) + 1):
            if tokens[:length] not in kept:
                if len(kept) == nodes:
                    break
                kept.append(tokens[:length])
    return kept


@settings(max_examples=300)
@given(data=st.data())
def test_proposals_are_those_by_the_book_however_the_text_grew(data: st.DataObject) -> None:
    text = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=24))
    least = data.draw(st.integers(1, 3))
    largest, k, branches = data.draw(st.integers(least, 4)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    depth, nodes = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    drafter = NgramDrafter(k, largest, least, branches)
    begun = data.draw(st.integers(1, len(text)))
    held = session([text[:begun]])
    drafter.start(held)
    at = begun
    while True:
        tree = drafter.propose(Budget((depth,), nodes), NO_NOISE)
        assert paths(tree) == expected(text[:at], k, largest, least, branches, depth, nodes)
        if at == len(text):
            break
        step = data.draw(st.integers(1, len(text) - at))
        held.rows.extend([text[at : at + step]])
        at += step


@pytest.mark.parametrize("change", [{"max_ngram": 2}, {"branches": 1}, {"k": 2}, {"min_ngram": 2}])
def test_the_book_tells_settings_apart(change: dict[str, int]) -> None:
    """Negative control: with another setting than the drafter's the book says something else, on some text."""
    settings = {"k": 3, "max_ngram": 3, "min_ngram": 1, "branches": 2}
    generator = torch.Generator().manual_seed(0)
    differs = 0
    for _ in range(120):
        text = torch.randint(0, 3, (14,), generator=generator).tolist()
        other = {**settings, **change}
        book = expected(text, other["k"], other["max_ngram"], other["min_ngram"], other["branches"], 9, 99)
        differs += paths(proposed(NgramDrafter(**settings), [text])) != book
    assert differs > 5
