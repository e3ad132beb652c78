"""What a text probably goes on with: the longest contexts that occurred before, and what followed them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from specdec.drafters.lookup.automaton import ROOT, SuffixAutomaton

_MOST_FOLLOWERS = 64
"""A context with more followers says too little to be worth ranking them all: those seen first are looked at."""


class Match(NamedTuple):
    """The longest end of a text that occurs in an automaton: its state there, and its length in tokens."""

    automaton: SuffixAutomaton
    state: int
    length: int

    def after(self, token: int) -> Match:
        return Match(self.automaton, *self.automaton.read(self.state, self.length, token))

    def shorter(self) -> Match:
        """The next shorter context with other followers."""
        state = max(ROOT, self.automaton.link[self.state])
        return Match(self.automaton, state, self.automaton.length[state])


@dataclass
class Escapes:
    """How often the next token was none of those that had followed the longest match, by the match's length.

    Measured on the text itself, whether anything was drafted or not. Before anything is seen a match of n tokens is
    trusted as after one trial that failed by 1 / (n + 1).
    """

    trials: list[int] = field(default_factory=lambda: [0] * 8)
    misses: list[int] = field(default_factory=lambda: [0] * 8)

    def saw(self, match: Match, token: int) -> None:
        if match.length:
            place = self._place(match.length)
            self.trials[place] += 1
            self.misses[place] += token not in match.automaton.following[match.state]

    def chance(self, length: int) -> float:
        place = self._place(length)
        return (self.misses[place] + 1 / (length + 1)) / (self.trials[place] + 1)

    def _place(self, length: int) -> int:
        return min(length.bit_length(), len(self.trials) - 1)


def ranked(matches: Sequence[Match], escapes: Sequence[Escapes], least: float) -> list[tuple[float, int]]:
    """`(probability, token)` of the next tokens, those of at least `least`.

    As in PPM (Cleary & Witten 1984): the longest match speaks first, by how often each token followed it; what it
    leaves (its `Escapes`) goes to the next shorter one, for the tokens not named yet.

    Args:
        matches: one for each source; escapes: the same order.
    """
    found: dict[int, float] = {}
    left, current = 1.0, list(matches)
    while left >= least:
        source = max(range(len(current)), key=lambda i: current[i].length)
        match = current[source]
        if not match.length:
            break
        escape = escapes[source].chance(match.length)
        _share(match, left * (1 - escape), found)
        left *= escape
        current[source] = match.shorter()
    return [(chance, token) for token, chance in found.items() if chance >= least]


def _share(match: Match, mass: float, found: dict[int, float]) -> None:
    count = match.automaton.count
    followers = list(match.automaton.following[match.state].items())[-_MOST_FOLLOWERS:]
    total = sum(count[state] for _, state in followers)
    for token, state in followers:
        if token not in found and total:
            found[token] = mass * count[state] / total


class Branch(NamedTuple):
    """A node of the tree to be: its token, its parent's index (the root is 0)."""

    token: int
    parent: int


def grown(matches: Sequence[Match], escapes: Sequence[Escapes], depth: int, nodes: int, least: float) -> list[Branch]:
    """The most probable continuations as a tree: at most `nodes` nodes of probability `least` or more, at most `depth`
    levels, parents before children."""
    branches: list[Branch] = []
    number = 0  # of two equally probable ones the first found goes first
    waiting: list[tuple[float, int, int, int, int, Sequence[Match]]] = []

    def offer(chance: float, parent: int, level: int, matches: Sequence[Match]) -> None:
        nonlocal number
        for share, token in ranked(matches, escapes, least / chance):
            number += 1
            heapq.heappush(waiting, (-chance * share, number, token, parent, level, matches))

    if depth > 0:
        offer(1.0, 0, 1, matches)
    while waiting and len(branches) < nodes:
        chance, _, token, parent, level, before = heapq.heappop(waiting)
        branches.append(Branch(token, parent))
        if level < depth:
            offer(-chance, len(branches), level + 1, [match.after(token) for match in before])
    return branches
