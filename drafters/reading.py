"""What a draft model reads: how far its positions reach, and its passes of one step, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.drafters.base import CACHE_NAME, Budget, Session, levels_within
from specdec.drafters.growth import Run
from specdec.kv.base import KVCache
from specdec.kv.idle import IdleRows
from specdec.verify.passes.forward import Forward

MOST_LAG = 8
"""Rows whose K/V lags behind their text by more tokens than this are prefilled before the root is run."""


class Context:
    """For which rows of a session a draft model can draft, and how deep: rows with longer texts than it has positions
    get no drafts from it, the others still do.

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

    def fit(self, budget: Budget, num_tokens: Sequence[int]) -> tuple[list[bool], Budget]:
        """Both of the following."""
        if self.num_positions is None:
            return [False] * len(num_tokens), budget
        return self.outgrown(num_tokens), self.cut(budget, num_tokens)

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


class DraftPasses:
    """Runs a draft model below the roots of all live rows. Idle rows are not read, and their logits mean nothing.

    Logits are `[live, *, vocab]` in the target's vocabulary.

    Args:
        vocab: the draft model's own vocabulary size.
        idle: per live row.
    """

    def __init__(self, forward: Forward, vocab: int, session: Session, idle: Sequence[bool]):
        self._forward, self._vocab, self._idle = forward, vocab, idle
        self._rows, self._target_vocab = session.rows, session.vocab
        self._cache: KVCache | IdleRows = session.cache
        if any(idle):
            self._cache = IdleRows(session.cache, CACHE_NAME, idle)

    def roots(self) -> Tensor:
        """Bring the drafter's K/V up to date; logits after each root, one column."""
        rows, cache = self._rows, self._cache
        lengths, filled = cache.lengths[: cache.num_rows], cache.filled(CACHE_NAME)
        lag = [length + 1 - have for length, have in zip(lengths, filled, strict=True)]
        if max(lag) > MOST_LAG + 1:
            self._catch_up(lengths, filled)
            filled = cache.filled(CACHE_NAME)
            lag = [length + 1 - have for length, have in zip(lengths, filled, strict=True)]
        width, real = max(lag), [0 if out else count for count, out in zip(lag, self._idle, strict=True)]
        logits = self._forward.causal(cache, self._known(rows.window(filled, width)), filled, real, keep=0).logits
        if min(lag) == width:
            return self._fit(logits if width == 1 else logits[:, -1:])
        last = torch.tensor(lag, device=logits.device) - 1
        return self._fit(logits[torch.arange(len(lag), device=logits.device), last][:, None])

    def chain(self, tokens: Tensor, depth: int) -> Tensor:
        """Logits after the nodes at `depth`, int64 `[live, 1]`, of chains whose earlier nodes were run."""
        starts = [count + depth for count in self._cache.lengths[: self._cache.num_rows]]
        return self._fit(self._forward.causal(self._cache, self._known(tokens), starts, None, keep=0).logits)

    def best_chain(self, tokens: Tensor, levels: int) -> Tensor | None:
        """The best tokens, int64 `[live, levels]`, one after the other below nodes of depth 1; None where `chain` has
        to be asked level by level."""
        starts = self._cache.filled(CACHE_NAME)  # behind the root
        vocab = min(self._vocab, self._target_vocab)
        return self._forward.best_chain(self._cache, self._known(tokens), starts, levels, vocab)

    def level(self, run: Run, first: int) -> Tensor:
        """Logits after the nodes of a run from slot `first` on; those before it were run."""
        new = self._known(run.tokens[:, first:])
        return self._fit(self._forward.nodes(self._cache, new, run.depths, run.ancestors[:, first:], first).logits)

    def _catch_up(self, lengths: list[int], filled: list[int]) -> None:
        """Prefill rows that lag far behind their text."""
        cache = self._cache
        behind = [i for i, (length, have) in enumerate(zip(lengths, filled, strict=True)) if length - have > MOST_LAG]
        text = self._known(self._rows.window([0] * len(lengths), max(lengths)))
        if len(behind) == len(lengths) - sum(self._idle):
            self._forward.prefill(cache, text, filled, lengths)
            return
        for i in behind:  # the others need not run the width of whoever has just joined
            alone = cache.row(i)
            self._forward.prefill(alone, text[i : i + 1], filled[i : i + 1], lengths[i : i + 1])

    def _known(self, tokens: Tensor) -> Tensor:
        """Replace ids that the drafter has no embedding for by its last one. The target decides anyway."""
        return tokens.clamp(max=self._vocab - 1) if self._vocab < self._target_vocab else tokens

    def _fit(self, logits: Tensor) -> Tensor:
        """Cut or pad the drafter's vocabulary to the target's; padding can never be drafted."""
        missing = self._target_vocab - logits.shape[-1]
        if missing == 0:
            return logits
        if missing <= 0:
            return logits[..., : self._target_vocab]
        return F.pad(logits, (0, missing), value=torch.finfo(logits.dtype).min)
