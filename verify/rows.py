"""The running rows of one generate call: their text, and the padded prefix the user's processors must see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kv.errors import UnsupportedArgumentError


class Rows:
    """Token buffers of all rows of a batch, and which of them still run.

    Two layouts of the same text: `ids`, the prompt exactly as the caller gave it (pads included) followed by the
    emitted tokens, which is what `transformers` hands to processors and criteria; and `text`, the real tokens
    only, which is what models and drafters see. They are one tensor when nothing is padded.

    Attributes:
        live: original row index of each *active storage row*, in the cache's order (see `KVCache.retire`).
        num_tokens: real tokens per original row (prompt and emitted).
        ends: used columns of `ids` per original row.
    """

    def __init__(self, prompt: Tensor, real: Tensor | None, capacity: int):
        """Args:
        prompt: int64 `[rows, columns]`; real: bool, False for pads (None = no pads); capacity: columns to hold.
        """
        rows, columns = prompt.shape
        capacity = max(capacity, columns)
        self.prompt_length = columns
        self._free: list[int] = []
        self.ids = prompt.new_zeros(rows, capacity)
        self.ids[:, :columns] = prompt
        self.real = real
        self.ends = [columns] * rows
        self.live = list(range(rows))
        if real is None or bool(real.all()):
            self.real = None
            self.text = self.ids
            self.num_tokens = [columns] * rows
        else:
            self.num_tokens = [int(count) for count in real.sum(1).tolist()]
            self.text = prompt.new_zeros(rows, capacity)
            for row in range(rows):
                self.text[row, : self.num_tokens[row]] = prompt[row, real[row]]

    @property
    def batch_size(self) -> int:
        """Rows the caller asked for, finished ones included."""
        return self.ids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def lengths(self) -> list[int]:
        """Real tokens of each live row."""
        return list(map(self.num_tokens.__getitem__, self.live))

    def roots(self) -> Tensor:
        """Int64 `[live]`: the last token of each live row."""
        if len(self.live) == 1:
            row = self.live[0]
            return self.text[row, self.num_tokens[row] - 1 : self.num_tokens[row]]
        last = torch.tensor([count - 1 for count in self.lengths()], device=self.device)
        return self.text[self.live, last]

    def window(self, starts: Sequence[int], width: int) -> Tensor:
        """Int64 `[live, width]`: columns `starts[b] .. starts[b] + width - 1` of each live row's text.

        Columns past a row's end hold stale ids; callers mask or overwrite what they produce.
        """
        if len(self.live) == 1:
            row, start = self.live[0], starts[0]
            return self._padded(start + width)[row : row + 1, start : start + width]
        columns = torch.tensor(list(starts), device=self.device)[:, None] + torch.arange(width, device=self.device)
        return self._padded(max(starts) + width)[torch.tensor(self.live, device=self.device)[:, None], columns]

    def extend(self, runs: Sequence[Sequence[int]]) -> None:
        """Add each live row's emitted tokens, all rows at once."""
        if len(self.live) == 1:
            self._extend_one(self.live[0], *runs)
            return
        pairs = list(zip(self.live, runs, strict=True))
        self._padded(max(max(self.ends[row], self.num_tokens[row]) + len(run) for row, run in pairs))
        rows = [row for row, run in pairs for _ in run]
        tokens = [token for run in runs for token in run]
        columns = [self.ends[row] + i for row, run in pairs for i in range(len(run))]
        places = [self.num_tokens[row] + i for row, run in pairs for i in range(len(run))]
        both = torch.tensor([rows, tokens, columns, places], dtype=torch.int64, device=self.device)
        row, new, column, place = both
        self.ids[row, column] = new
        if self.text is not self.ids:
            self.text[row, place] = new
        for index, run in pairs:
            self.ends[index] += len(run)
            self.num_tokens[index] += len(run)

    def _extend_one(self, row: int, run: Sequence[int]) -> None:
        self._padded(max(self.ends[row], self.num_tokens[row]) + len(run))
        places = [(self.ids, self.ends[row])]
        if self.text is not self.ids:
            places.append((self.text, self.num_tokens[row]))
        for buffer, first in places:
            if buffer.device.type == "cpu":  # a third of the price of a tensor and an indexed assignment
                buffer.numpy()[row, first : first + len(run)] = run
            else:
                buffer[row, first : first + len(run)] = torch.tensor(run, device=self.device)
        self.ends[row] += len(run)
        self.num_tokens[row] += len(run)

    def prefix(self, row: int) -> Tensor:
        """Int64 `[columns]`: the padded prefix of an original row, as plain decoding would see it."""
        return self.ids[row, : self.ends[row]]

    def retire(self, storage_row: int) -> None:
        """Drop a live row; the last live row takes its place, as in the cache."""
        self.live[storage_row] = self.live[-1]
        self.live.pop()

    @staticmethod
    def empty(device: torch.device, capacity: int = 256) -> Rows:
        """No rows yet: for batches that requests `join` and `leave` between steps."""
        return Rows(torch.zeros(0, 0, dtype=torch.int64, device=device), None, capacity)

    def join(self, text: Sequence[int]) -> int:
        """A text without pads becomes the last live row.

        Returns:
            the row's index, its own until it leaves; then another row may get it.

        Raises:
            UnsupportedArgumentError: the batch was made of padded prompts, whose rows share their columns.
        """
        if self.text is not self.ids:
            raise UnsupportedArgumentError("expected a batch without pads, got padded prompts: no row can join them")
        if not self._free:
            first, more = self.batch_size, max(4, self.batch_size)
            self.ids = self.text = torch.nn.functional.pad(self.ids, (0, 0, 0, more))
            self.ends += [0] * more
            self.num_tokens += [0] * more
            self._free = list(range(first + more - 1, first - 1, -1))
        row = self._free.pop()
        self._padded(len(text))[row, : len(text)] = torch.tensor(text, device=self.device)
        self.ends[row] = self.num_tokens[row] = len(text)
        self.live.append(row)
        return row

    def leave(self, storage_row: int) -> None:
        """`retire` a live row that joined; its index may be given to another."""
        self._free.append(self.live[storage_row])
        self.retire(storage_row)

    def columns(self) -> Tensor:
        """Int64 `[rows, tokens]`: the column of `ids` that real token `j` of each row lies in."""
        width = self.ids.shape[1]
        if self.real is None:
            return torch.arange(width, device=self.device).expand(self.batch_size, width)
        real = torch.ones(self.batch_size, width, dtype=torch.bool, device=self.device)
        real[:, : self.prompt_length] = self.real
        return torch.argsort((~real).to(torch.int8), dim=1, stable=True)

    def _padded(self, columns: int) -> Tensor:
        """`text`, grown by doubling to at least `columns`."""
        if columns > self.text.shape[1]:
            shared = self.text is self.ids
            extra = max(columns, 2 * self.text.shape[1]) - self.text.shape[1]
            self.ids = torch.nn.functional.pad(self.ids, (0, extra))
            self.text = self.ids if shared else torch.nn.functional.pad(self.text, (0, extra))
        return self.text
