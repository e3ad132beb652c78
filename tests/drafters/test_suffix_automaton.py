"""The automaton against brute force over all substrings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from specdec.drafters.lookup.automaton import ROOT, SuffixAutomaton

texts = st.lists(st.integers(0, 2), max_size=24)


def state_of(automaton: SuffixAutomaton, context: list[int]) -> int | None:
    state = ROOT
    for token in context:
        found = automaton.following[state].get(token)
        if found is None:
            return None
        state = found
    return state


def occurrences(text: list[int], context: list[int]) -> list[int]:
    """Places right after `context` in `text`."""
    size = len(context)
    return [end for end in range(size, len(text) + 1) if text[end - size : end] == context]


@given(texts)
def test_every_context_is_there_with_its_count_and_what_followed(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    automaton.extend(text)
    assert len(automaton) <= max(2, 2 * len(text))
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            context = text[start:end]
            places = occurrences(text, context)
            state = state_of(automaton, context)
            assert state is not None
            assert automaton.count[state] == len(places)
            assert set(automaton.following[state]) == {text[place] for place in places if place < len(text)}
            assert automaton.length[automaton.link[state]] < len(context) <= automaton.length[state]
    assert all(state_of(automaton, [*text[-2:], other]) is None for other in range(3, 5))


@given(texts)
def test_the_longest_end_that_occurred_before(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    automaton.extend(text)
    repeated = [size for size in range(len(text)) if len(occurrences(text, text[len(text) - size :])) > 1]
    longest = max(repeated, default=0) if text else 0
    assert automaton.length[automaton.repeated] == longest


@given(st.lists(texts, max_size=4), texts)
def test_matches_in_several_texts(stored: list[list[int]], read: list[int]) -> None:
    automaton = SuffixAutomaton()
    for text in stored:
        automaton.begin()
        automaton.extend(text)
    state, length = ROOT, 0
    for count, token in enumerate(read, 1):
        state, length = automaton.read(state, length, token)
        ends = [read[count - size : count] for size in range(count + 1)]
        longest = max((end for end in ends if not end or any(occurrences(text, end) for text in stored)), key=len)
        assert length == len(longest)
        if longest:
            assert automaton.count[state] == sum(len(occurrences(text, longest)) for text in stored)
            after = {text[place] for text in stored for place in occurrences(text, longest) if place < len(text)}
            assert set(automaton.following[state]) == after


def test_a_token_repeated_without_end_stays_cheap() -> None:
    automaton = SuffixAutomaton()
    automaton.extend([7] * 5000)
    assert len(automaton) == 5001
    assert automaton.length[automaton.repeated] == 4999
    assert automaton.count[automaton.repeated] == 2
