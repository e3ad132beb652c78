"""Earlier outputs that later calls may draft from."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from specdec.drafters.lookup.automaton import SuffixAutomaton
from specdec.kv.errors import UnsupportedArgumentError


class SuffixStore:
    """Texts of calls that are over, for the `SuffixDrafter`s that share it (SuffixDecoding: Oliaro et al. 2024).

    Whoever shares a store drafts from the other's texts: give each tenant one of its own. A text shows in another's
    speed, never in its tokens.

    Args:
        most_tokens: kept at most. There are two generations: when the younger one holds half of this, the older one is
            dropped.

    Raises:
        UnsupportedArgumentError: most_tokens below 2.
    """

    def __init__(self, most_tokens: int = 200_000):
        if not isinstance(most_tokens, int) or most_tokens < 2:
            raise UnsupportedArgumentError(f"most_tokens: expected an integer >= 2, got {most_tokens!r}")
        self.most_tokens = most_tokens
        self.lock = threading.Lock()
        self._young, self._old = SuffixAutomaton(), SuffixAutomaton()
        self._num_young = self._num_old = 0

    @property
    def num_tokens(self) -> int:
        return self._num_young + self._num_old

    @property
    def generations(self) -> tuple[SuffixAutomaton, SuffixAutomaton]:
        """To be read while `lock` is held."""
        return self._young, self._old

    def add(self, tokens: Sequence[int]) -> None:
        """One text. Of a text longer than a generation only the end is kept."""
        half = self.most_tokens // 2
        tokens = tokens[-half:]
        with self.lock:
            if self._num_young + len(tokens) > half:
                self._old, self._num_old = self._young, self._num_young
                self._young, self._num_young = SuffixAutomaton(), 0
            self._young.begin()
            self._young.extend(tokens)
            self._num_young += len(tokens)
