"""What a call returns and streams, in the shapes plain `generate` returns and streams them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

from specdec.hidden_states import HiddenStates
from specdec.kv import KVCache
from specdec.kv.exchange import export
from specdec.kv.versions import decoder_output
from specdec.request import Request
from specdec.verify.rows import Rows


class Collector:
    """Per-token scores, logits and hidden states of every row, and the streamer's progress."""

    def __init__(self, request: Request, rows: Rows):
        self._request = request
        self._rows = rows
        self.scores: list[list[Tensor]] = [[] for _ in range(rows.batch_size)]
        self.logits: list[list[Tensor]] = [[] for _ in range(rows.batch_size)]
        self.hidden = HiddenStates(rows, request.prompt_columns) if request.keeps_hidden_states else None
        self.keeps = request.keeps_scores or request.keeps_logits or request.keeps_hidden_states
        self._streamed = rows.prompt_length
        pad = request.config._pad_token_tensor
        self._pad = None if pad is None else int(pad)
        if request.streamer is not None:
            request.streamer.put(request.input_ids.cpu())

    def record(self, row: int, scores: Tensor, logits: Tensor) -> list[tuple[Tensor, ...]] | None:
        """Keep one run's `[tokens, vocab]` scores and logits if asked for; returns what criteria are shown."""
        if self._request.keeps_logits:
            self.logits[row].extend(logits.to(torch.float32, copy=True))
        if not self._request.keeps_scores:
            return None
        before = len(self.scores[row])
        self.scores[row].extend(scores.clone())
        shown = tuple(score[None] for score in self.scores[row])
        return [shown[: before + j + 1] for j in range(scores.shape[0])]

    def put(self, tokens: Tensor) -> None:
        """Feed the streamer the next column, which is complete: one token of every row."""
        self._request.streamer.put(tokens.clone().cpu())  # the streamer's own
        self._streamed += 1

    def stream(self, final: dict[int, int], line: int | None) -> None:
        """Feed the streamer every column that is complete, one token per row at a time.

        Args:
            final: columns of each finished row.
            line: where the sequences will be cut, if already known.
        """
        rows = self._rows
        running = [rows.ends[row] for row in range(rows.batch_size) if row not in final]
        stop = min(running) if running else max(final.values())
        stop = stop if line is None else min(stop, line)
        for column in range(self._streamed, stop):
            token = rows.ids[:, column].clone()
            for row, columns in final.items():
                if column >= columns:
                    token[row] = self._pad if self._pad is not None else 0
            self.put(token)

    def finish(self, cache: KVCache, storage: dict[int, int]) -> Tensor | GenerateDecoderOnlyOutput:
        """End the stream and assemble the return value.

        Args:
            storage: for each row of the batch, where its K/V lies in `cache`.
        """
        request, rows = self._request, self._rows
        if request.streamer is not None:
            request.streamer.end()
        width = max(rows.ends)
        sequences = rows.ids[:, :width].clone()
        for row, end in enumerate(rows.ends):
            if end < width and self._pad is not None:
                sequences[row, end:] = self._pad
        past = None
        if request.wants_dict or request.cache_is_callers:
            past = self._export(cache, storage, width)
        if not request.wants_dict:
            return sequences
        counts = [end - rows.prompt_length for end in rows.ends]
        return decoder_output(
            past,
            sequences,
            scores=_per_token(self.scores, counts) if request.keeps_scores else None,
            logits=_per_token(self.logits, counts) if request.keeps_logits else None,
            attentions=None,
            hidden_states=None if self.hidden is None else self.hidden.assembled(counts),
        )

    def _export(self, cache: KVCache, storage: dict[int, int], width: int) -> DynamicCache:
        order = [storage[row] for row in range(self._rows.batch_size)]
        return export(cache, "target", order, self._rows.columns(), width - 1, into=self._request.cache)


def _per_token(rows: list[list[Tensor]], counts: Sequence[int]) -> tuple[Any, ...]:
    """Tuple over tokens of `[rows, vocab]`; zero where a row had already finished.

    Args:
        counts: tokens of each row that plain decoding keeps; a run may have been longer (`rows` holds all of it).
    """
    empty = torch.zeros_like(next(row[0] for row in rows if row))
    return tuple(
        torch.stack([row[t] if t < count else empty for row, count in zip(rows, counts, strict=True)])
        for t in range(max(counts))
    )
