"""A draft model's passes of one step: catching up with the text, then level by level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.drafters.base import CACHE_NAME, Session
from specdec.drafters.growth import Run
from specdec.kv.base import KVCache
from specdec.kv.idle import IdleRows
from specdec.verify.passes.forward import Forward

MOST_LAG = 8
"""Rows whose K/V lags behind their text by more tokens than this are prefilled before the root is run."""


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
