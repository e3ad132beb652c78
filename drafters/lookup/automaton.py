"""A suffix automaton over growing texts: every context that ever occurred, and how often each token followed it."""

from __future__ import annotations

from collections.abc import Iterable

ROOT = 0
"""The state of the empty context."""
_MOST_COUNTED = 64
"""Contexts counted per token, the longest first: a text of one token repeated has as many as it has tokens."""


class SuffixAutomaton:
    """Contexts are the substrings of all texts; those that end at the same places share a state (Blumer et al. 1985).

    A token is added in amortised constant time and memory. `following[state]` says which state each next token leads
    to, `link[state]` is the state of the longest shorter context that occurs elsewhere, too, `length[state]` the
    length of its longest context, `count[state]` how often that occurred. For example after "abcab" the longest context
    that occurred before is "ab", and "c" is all that ever followed it.

    Counts miss those of contexts shorter than the `_MOST_COUNTED` longest ones of a token: they order drafts, no more.
    """

    def __init__(self) -> None:
        self.following: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.count = [0]
        self._last = ROOT

    def __len__(self) -> int:
        return len(self.link)

    @property
    def repeated(self) -> int:
        """The state of the longest end of the text that occurred before (`ROOT`: none did)."""
        return max(ROOT, self.link[self._last])

    def begin(self) -> None:
        """The next token begins another text."""
        self._last = ROOT

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        known = self.following[self._last].get(token)
        if known is None:
            self._last = self._grown(token)
        else:  # an earlier text went on like this
            fits = self.length[known] == self.length[self._last] + 1
            self._last = known if fits else self._split(self._last, token, known)
        state, counted = self._last, 0
        while state > ROOT and counted < _MOST_COUNTED:
            self.count[state] += 1
            state, counted = self.link[state], counted + 1

    def read(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Where a text that matched `length` tokens up to `state` matches after one more token: state and length."""
        while state > ROOT and token not in self.following[state]:
            state = self.link[state]
            length = self.length[state]
        found = self.following[state].get(token)
        return (ROOT, 0) if found is None else (found, length + 1)

    def _grown(self, token: int) -> int:
        """A new state for the whole text with one more token."""
        new = self._state({}, ROOT, self.length[self._last] + 1, 0)
        state = self._last
        while state >= 0 and token not in self.following[state]:
            self.following[state][token] = new
            state = self.link[state]
        if state >= 0:
            known = self.following[state][token]
            fits = self.length[known] == self.length[state] + 1
            self.link[new] = known if fits else self._split(state, token, known)
        return new

    def _split(self, state: int, token: int, known: int) -> int:
        """The shorter contexts of `known` now end at more places than its longest: they get a state of their own."""
        new = self._state(dict(self.following[known]), self.link[known], self.length[state] + 1, self.count[known])
        self.link[known] = new
        while state >= 0 and self.following[state].get(token) == known:
            self.following[state][token] = new
            state = self.link[state]
        return new

    def _state(self, following: dict[int, int], link: int, length: int, count: int) -> int:
        self.following.append(following)
        self.link.append(link)
        self.length.append(length)
        self.count.append(count)
        return len(self.link) - 1
