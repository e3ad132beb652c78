"""The limit of a draft model's positions: rows with longer texts get no drafts from it, the others still do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from specdec.drafters.base import Budget, levels_within


class Context:
    """For which rows of a session a draft model can draft, and how deep.

    Whether a row is drafted for depends on the length of its own text alone: rows around it notice nothing, and no
    drawn token is withdrawn (algorithms B.5).

    Args:
        model: its name. num_positions: tokens of a row that it can read, None for any number.

    Attributes:
        notes: what there is to say about rows that outgrew it.
    """

    def __init__(self, model: str, num_positions: int | None):
        self.num_positions = num_positions
        self.notes: list[str] = []
        self._model = model

    def afresh(self) -> Context:
        """For another session."""
        return Context(self._model, self.num_positions)

    def outgrown(self, num_tokens: Sequence[int]) -> list[bool]:
        """Per row: are its `num_tokens` more than the model can read? Notes the first such row."""
        positions = self.num_positions
        if positions is None:
            return [False] * len(num_tokens)
        longest = max(num_tokens, default=0)
        if longest > positions and not self.notes:
            self.notes.append(
                f"the draft model ({self._model}) has {positions} positions, and a row holds {longest} tokens: rows "
                "that long get no drafts from it, all others do. The output is exact. For drafts there, too, take a "
                "draft model with more positions, or let the planner fall back on n-grams: draft=[model, 'ngram']"
            )
        return [count > positions for count in num_tokens]

    def cut(self, budget: Budget, num_tokens: Sequence[int]) -> Budget:
        """The budget without levels whose parents would lie beyond the last position."""
        if self.num_positions is None:
            return budget
        pairs = zip(budget.depths, num_tokens, strict=True)
        return replace(budget, depths=tuple(levels_within(self.num_positions, depth, count) for depth, count in pairs))
