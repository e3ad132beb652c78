"""Hidden states of a call, in the shapes of plain `generate`: of the prompt, then of every emitted token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specdec.verify.passes.base import Output
from specdec.verify.rows import Rows


class HiddenStates:
    """Collects them from the target's passes, as they come.

    Args:
        columns: of the prompt, the last ones: those of the pass that plain decoding draws the first token from.
    """

    def __init__(self, rows: Rows, columns: int):
        self._rows, self._columns = rows, columns
        self._num_prompt = list(rows.num_tokens)
        self._prompts: list[list[tuple[int, list[Tensor]]]] = [[] for _ in self._num_prompt]
        """Per row, pieces of its prompt: the first slot, and `[tokens, hidden]` of each layer. The later ones count."""
        self._tokens: list[list[list[Tensor]]] = [[] for _ in self._num_prompt]
        self._padding: list[list[list[Tensor]]] = [[] for _ in self._num_prompt]

    def read(self, starts: Sequence[int], valid: Sequence[int], output: Output) -> None:
        """A pass over text of the live rows, or of the first of equal ones. What it reads again is the same again."""
        live = self._rows.live
        repeats = len(live) // len(starts)
        for place, (start, count) in enumerate(zip(starts, valid, strict=True)):
            for row in live[place * repeats : (place + 1) * repeats]:
                own = min(count, self._num_prompt[row] - start)
                if own > 0:
                    self._prompts[row].append((start, [layer[place, :own] for layer in output.features]))

    def emitted(self, row: int, states: Sequence[Tensor]) -> None:
        """`[tokens, hidden]` of each layer, of the nodes that a row's next tokens were drawn after."""
        self._tokens[row] += [list(token) for token in zip(*states, strict=True)]

    def finished(self, storage: Mapping[int, int], starts: Sequence[int], valid: Sequence[int], output: Output) -> None:
        """A pass over what plain decoding feeds finished rows. `storage`: where each row of the batch lies."""
        for row, place in storage.items():
            for column in range(valid[place]):
                self._padding[row].append([layer[place, column] for layer in output.features])

    def assembled(self, counts: Sequence[int]) -> tuple[tuple[Tensor, ...], ...]:
        """Per token, per layer: `[rows, columns, hidden]`, the prompt's columns for the first token, then one. Zero at
        padding before a prompt, where plain decoding computes what nobody can use.

        Args:
            counts: tokens of each row that are kept.
        """
        like = next(states for row in self._tokens for states in row)
        columns, width = self._rows.columns(), self._columns
        unseen = self._rows.prompt_length - width
        first = [states.new_zeros(len(counts), width, states.shape[-1]) for states in like]
        for row, own in enumerate(self._prompts):
            root = self._num_prompt[row] - 1, [state[None] for state in self._tokens[row][0]]
            for start, states in (*own, root):
                places = columns[row, start : start + len(states[0])] - unseen
                seen = places >= 0
                for whole, state in zip(first, states, strict=True):
                    whole[row, places[seen].to(whole.device)] = state[seen.to(state.device)]
        rest = []
        for token in range(1, max(counts)):
            rows = [
                own[token] if token < count else padding[token - count]
                for own, padding, count in zip(self._tokens, self._padding, counts, strict=True)
            ]
            rest.append(tuple(torch.stack(layer)[:, None] for layer in zip(*rows, strict=True)))
        return (tuple(first), *rest)
