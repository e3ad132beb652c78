"""Where plain decoding would have stopped, token by token, for every row."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from specdec.kv import UnsupportedArgumentError
from specdec.verify.purity import decides_by_row
from specdec.verify.rows import Rows

FROM_CONFIG = object()
"""Stands for stop strings that were not given, where None means none."""


class Opinions:
    """Answers of criteria that may keep state, about one row's text. They are remembered for one step: if it is taken
    again after Ctrl-C, no criterion is asked twice."""

    def __init__(self) -> None:
        self._said: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._asking = False

    def begin(self, columns: int) -> None:
        """A step begins at a text so long: forget the answers of those before it."""
        self._said = {at: said for at, said in self._said.items() if at > columns}

    def of(self, ids: torch.Tensor, ask: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Their opinion of `ids` `[1, columns]`, from memory or by `ask`.

        Raises:
            UnsupportedArgumentError: another text than they were asked about, or they were interrupted themselves.
        """
        columns = ids.shape[1]
        if columns not in self._said:
            if self._asking:
                raise UnsupportedArgumentError(interrupted("a stopping criterion was called"))
            self._asking = True
            self._said[columns] = ids.clone(), ask()
            self._asking = False
        seen, told = self._said[columns]
        if not torch.equal(seen, ids):
            raise UnsupportedArgumentError(
                interrupted("its stopping criteria had seen a token that is not emitted now")
            )
        return told


def interrupted(what: str) -> str:
    """Why a text cannot go on after Ctrl-C."""
    return (
        f"a step was interrupted (Ctrl-C) while or after {what}; that may keep state, so that this text cannot go on: "
        "submit it again"
    )


class StopRules:
    """Applies the caller's criteria after each single token.

    End-of-sequence and length are decided on host integers. Every other criterion is called once per token, also on
    one that ends the text anyway: with the row's own prefix `[1, columns]` where a run is looked through (`scan`), with
    the batch as plain decoding shows it where that is kept (`column`).

    Without an end-of-sequence rule plain `generate` keeps extending finished rows until the last row stops; so do
    we (`finish_line`), because those tokens are part of its output.

    Attributes:
        stream: given every token `[rows]` after the criteria were asked about it and before they are asked about the
            next one, as plain `generate` feeds a streamer: criterion and streamer may be connected. Not used where rows
            are looked through one by one (`scan`): those criteria keep no state.
        heard: given what the criteria said, one answer a row, it says what counts; None where that is the same.
    """

    def __init__(self, criteria: StoppingCriteriaList, rows: Rows, memory: Opinions | None = None):
        """Args:
        memory: what was said so far, where a step may be taken again (see `scan`).
        """
        self._rows, self._memory = rows, memory
        self._eos: set[int] = set()
        self.max_columns: int | None = None
        self._others: Any = StoppingCriteriaList()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self._eos |= {int(token) for token in criterion.eos_token_id.flatten().tolist()}
            elif type(criterion) is MaxLengthCriteria:
                limit = int(criterion.max_length)
                self.max_columns = limit if self.max_columns is None else min(limit, self.max_columns)
            else:
                self._others.append(criterion)
        self.pads_finished = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.stream: Callable[[torch.Tensor], None] | None = None
        self.heard: Callable[[list[bool]], list[bool]] | None = None
        self._stopped_at: dict[int, int] = {}
        self._by_length: set[int] = set()

    @property
    def keeps_nothing(self) -> bool:
        """Whether no criterion may keep state."""
        return all(map(decides_by_row, self._others))

    def scan(self, row: int, tokens: list[int], scores: list[tuple[torch.Tensor, ...]] | None) -> None:
        """Look for the first stop among the last `len(tokens)` tokens of `row`, which are already appended.

        Args:
            scores: per token, the tuple of `[1, vocab]` scores so far that criteria are given; None if not kept.
        """
        if row in self._stopped_at:
            return
        first = self._rows.ends[row] - len(tokens)
        if self._memory is not None:
            self._memory.begin(first)
        for j, token in enumerate(tokens):
            columns = first + j + 1
            told = False
            if self._others:
                prefix = self._rows.ids[row : row + 1, :columns]
                ask = partial(self._others.__call__, prefix, None if scores is None else scores[j])
                told = bool((ask() if self._memory is None else self._memory.of(prefix, ask)).all())
                if self.heard is not None:
                    (told,) = self.heard([told])
                if self.stream is not None and self._rows.batch_size == 1:
                    self.stream(prefix[:, -1])
            if self._stops(row, token, columns, told):
                return

    def ask(self, ids: torch.Tensor, scores: tuple[torch.Tensor, ...] | None) -> list[bool]:
        """What the criteria that are not decided here say of the last token of every row, as plain decoding asks them:
        all rows at once, the finished, too.

        Args:
            ids: int64 `[rows, columns]`.
            scores: per token so far, the `[rows, vocab]` scores that criteria are given; None if not kept.
        """
        told: list[bool] = self._others(ids, scores).tolist() if self._others else [False] * len(ids)
        if self.heard is not None:
            told = self.heard(told)
        if self.stream is not None:
            self.stream(ids[:, -1])
        return told

    def column(self, ids: torch.Tensor, rows: Sequence[int], told: Sequence[bool]) -> list[bool]:
        """Take note of the token that every row has just got.

        Args:
            ids: int64 `[len(rows), columns]`; rows: which rows of `Rows` these are; told: see `ask`.

        Returns:
            per row, whether it has stopped, now or earlier.
        """
        columns = ids.shape[1]
        for row, token, stop in zip(rows, ids[:, -1].tolist(), told, strict=True):
            if row not in self._stopped_at:
                self._stops(row, token, columns, stop)
        return [row in self._stopped_at for row in rows]

    def final_columns(self, row: int) -> int | None:
        """Columns of `ids` that plain decoding keeps of a row, or None while the row must go on."""
        stopped = self._stopped_at.get(row)
        if self.pads_finished or self._rows.batch_size == 1 or stopped is None:
            return stopped
        if self.max_columns is not None and self._rows.ends[row] >= self.max_columns:
            return self.max_columns  # it cannot grow further; `finish_line` may still cut it in the end
        line = self.finish_line()
        return None if line is None or self._rows.ends[row] < line else line

    def finish_line(self) -> int | None:
        """Columns of the final sequences, once known, where finished rows are extended instead of padded."""
        if self.pads_finished or len(self._stopped_at) < self._rows.batch_size:
            return None
        return max(self._stopped_at.values())

    @property
    def ends(self) -> frozenset[int]:
        """End-of-sequence ids."""
        return frozenset(self._eos)

    def remaining(self, row: int) -> int | None:
        """Tokens the row may still emit before its length limit."""
        return None if self.max_columns is None else max(0, self.max_columns - self._rows.ends[row])

    def by_length_alone(self, row: int) -> bool:
        """Whether nothing but the length limit stopped a row."""
        return row in self._by_length

    def _stops(self, row: int, token: int, columns: int, told: bool) -> bool:
        """Notes the row's stop, if this is one. `told`: what the criteria say that are not decided here."""
        own = told or token in self._eos
        full = self.max_columns is not None and columns >= self.max_columns
        if own or full:
            self._stopped_at[row] = columns
            if not own:
                self._by_length.add(row)
        return own or full


@contextmanager
def own_stop_strings(
    target: PreTrainedModel, config: GenerationConfig | None, strings: Any
) -> Iterator[tuple[GenerationConfig | None, Any]]:
    """Take `stop_strings` out of whatever configuration holds them: `transformers` loses the tokenizer on the way to
    a custom method and would refuse. Yields (config, strings); the target's own config is restored afterwards.
    An explicit None means no stop strings, as in plain `generate`.
    """
    own = target.generation_config.stop_strings
    if config is not None and config.stop_strings is not None:
        strings = config.stop_strings if strings is FROM_CONFIG else strings
        config = copy.deepcopy(config)
        config.stop_strings = None
    strings = own if strings is FROM_CONFIG else strings
    target.generation_config.stop_strings = None
    try:
        yield config, strings
    finally:
        target.generation_config.stop_strings = own
