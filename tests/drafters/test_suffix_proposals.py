"""What the suffix drafter proposes, and whom it learns it from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from test_ngram_proposals import NO_NOISE, Path, paths, session

import specdec
from specdec.drafters import Budget, SuffixDrafter, SuffixStore
from specdec.drafters.lookup.automaton import SuffixAutomaton
from specdec.drafters.lookup.prediction import Escapes, Match, ranked
from specdec.verify import DraftTree


def proposed(drafter: SuffixDrafter, texts: list[list[int]], depth: int = 99, nodes: int = 99) -> DraftTree:
    drafter.start(session(texts))
    return drafter.propose(Budget((depth,) * len(texts), nodes), NO_NOISE)


def drafted(drafter: SuffixDrafter, text: list[int], depth: int = 99, nodes: int = 99) -> list[Path]:
    return paths(proposed(drafter, [text], depth, nodes))


LINE = [11, 12, 13, 14, 15, 16, 17, 18]


def test_a_long_match_is_followed_deep() -> None:
    got = drafted(SuffixDrafter(nodes=5), [*LINE, 3, *LINE[:4]])
    assert got == [tuple(LINE[4 : 4 + size]) for size in range(1, 5)] + [(*LINE[4:], 3)]


def test_what_followed_more_often_comes_first() -> None:
    text = [1, 2, 30, 9, 1, 2, 31, 8, 1, 2, 30, 7, 1, 2]
    first = [path for path in drafted(SuffixDrafter(nodes=9, least=0.05), text) if len(path) == 1]
    assert first[:2] == [(30,), (31,)]


def test_nothing_is_drafted_where_nothing_occurred_before_and_little_where_matches_mislead() -> None:
    assert drafted(SuffixDrafter(), [1, 2, 3, 4, 5]) == []
    misled = [1]
    for other in range(20, 50):  # 1 was always followed by something new
        misled += [other, 1]
    assert drafted(SuffixDrafter(), misled) == []
    assert drafted(SuffixDrafter(least=1e-4), misled) != []


def test_depth_nodes_and_rows_keep_to_their_own_budget() -> None:
    text = [*LINE, 3, *LINE[:4]]
    assert drafted(SuffixDrafter(nodes=9), text, depth=2) == [(15,), (15, 16)]
    assert drafted(SuffixDrafter(nodes=9), text, nodes=1) == [(15,)]
    assert drafted(SuffixDrafter(nodes=9), text, depth=0) == []
    drafter = SuffixDrafter(nodes=4)
    drafter.start(session([text, [5, 6, 7], text]))
    tree = drafter.propose(Budget((9, 9, 1), 9), NO_NOISE)
    assert [len(paths(tree, row)) for row in range(3)] == [4, 0, 1]


def test_probabilities_are_shares_of_one() -> None:
    """The longest match, then shorter ones with what it leaves; together never more than everything."""
    own = SuffixAutomaton()
    own.extend([1, 2, 3, 9, 1, 2, 4, 9, 5, 2, 6, 1, 2])
    match = Match(own, own.repeated, own.length[own.repeated])
    assert match.length == 2
    escapes = Escapes()
    chances = dict((token, chance) for chance, token in ranked([match], [escapes], 1e-6))
    escape = escapes.chance(2)
    assert chances[3] == chances[4] == pytest.approx((1 - escape) / 2)
    assert 0 < chances[6] < escape, "only after the shorter context"
    assert sum(chances.values()) < 1


def test_trust_is_learned_from_the_text() -> None:
    escapes, own = Escapes(), SuffixAutomaton()
    own.extend([1, 2, 1])
    match = Match(own, own.repeated, 1)
    before = escapes.chance(1)
    escapes.saw(match, 2)
    assert escapes.chance(1) < before
    for _ in range(9):
        escapes.saw(match, 50)
    assert escapes.chance(1) > before


def test_a_store_brings_what_other_calls_said_and_forgets_the_oldest() -> None:
    store = SuffixStore(most_tokens=40)
    writer, reader = SuffixDrafter(store=store), SuffixDrafter(nodes=3, store=store)
    proposed(writer, [LINE])
    assert drafted(reader, LINE[:4]) == [], "a call that runs has said nothing yet"
    reader.finish()
    writer.finish()
    assert drafted(reader, LINE[:4]) == [(15,), (15, 16), (15, 16, 17)]
    reader.finish()
    for start in range(100, 200, 10):
        store.add(list(range(start, start + 10)))
    assert store.num_tokens <= 40
    assert drafted(reader, LINE[:4]) == []
    assert drafted(SuffixDrafter(nodes=1, store=store), [195, 196]) == [(197,)]
    store.add(list(range(300, 400)))
    assert store.num_tokens <= 40, "of a long text its end"


def test_sampled_texts_are_drafted_from_themselves_alone_unless_coupled() -> None:
    """A seed's text would depend on what ran before."""
    store = SuffixStore()
    store.add(LINE)
    nothing: Any = None
    for do_sample, race, found in (
        (False, nothing, True),
        (True, nothing, False),
        (True, lambda depths: nothing, True),
    ):
        drafter = SuffixDrafter(nodes=1, store=store)
        drafter.start(replace(session([LINE[:4]]), do_sample=do_sample, race=race))
        tree = drafter.propose(Budget((9,), 9), NO_NOISE)
        assert (len(paths(tree)) > 0) is found


@pytest.mark.parametrize("bad", [{"nodes": 0}, {"least": 0.0}, {"least": 1.0}, {"nodes": 2.5}])
def test_numbers_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(specdec.UnsupportedArgumentError, match="expected"):
        SuffixDrafter(**bad)


def test_a_store_wants_room() -> None:
    with pytest.raises(specdec.UnsupportedArgumentError, match="most_tokens"):
        SuffixStore(1)


def test_text_and_law_with_repeats() -> None:
    """Greedy text is plain's, with drafts really made and kept; a second call drafts from the first one's."""
    target = models.target("llama-gqa")
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    plain: Any = specdec.Speculator(target).generate(prompt, max_new_tokens=40, do_sample=False)
    store = SuffixStore()
    lengths = []
    for _ in range(2):
        spec = specdec.Speculator(target, SuffixDrafter(nodes=6, store=store))
        text: Any = spec.generate(prompt, max_new_tokens=40, do_sample=False)
        assert torch.equal(text, plain)
        assert spec.report is not None
        assert spec.report.num_accepted_tokens > 0
        lengths.append(spec.report.num_steps)
    assert lengths[1] < lengths[0], "the first call's text helps the second"
