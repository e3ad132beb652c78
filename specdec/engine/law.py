"""One law for rows whose requests ask for different ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from specdec.kv.faults import from_outside
from specdec.verify import Rows, SamplingLaw
from specdec.verify.law import PREFIX_FREE

_WARPERS = PREFIX_FREE - {SuppressTokensLogitsProcessor}
"""Processors that never exclude every token."""
_PLAIN_VALUES = (int, float, bool, str, type(None))


def shared_key(processors: LogitsProcessorList, ends: Collection[int]) -> tuple[Any, ...] | None:
    """Equal for requests that may share one `SamplingLaw`; None for those whose processors must be theirs alone.

    Only `transformers`' own prefix-free processors are compared, by their type and attributes.
    """
    key: list[Any] = []
    for processor in processors:
        if type(processor) not in PREFIX_FREE:
            return None
        values = []
        for name, value in sorted(vars(processor).items()):
            if isinstance(value, Tensor):
                value = (str(value.dtype), tuple(value.shape), tuple(value.flatten().tolist()))
            elif not isinstance(value, _PLAIN_VALUES):
                return None
            values.append((name, value))
        key.append((type(processor), tuple(values)))
    return tuple(key), frozenset(ends)


class RowView:
    """Some rows of a batch as a batch of their own: what a `SamplingLaw` reads of `Rows`."""

    def __init__(self, rows: Rows, members: Sequence[int]):
        """Args: members: row indices (not storage rows)."""
        self._rows, self._members = rows, members
        self.live = list(range(len(members)))
        self.batch_size = len(members)

    def prefix(self, row: int) -> Tensor:
        return self._rows.prefix(self._members[row])


class DraftingLaw:
    """A lane's law for its drafter: the raw one stands in wherever a row's own processors leave none.

    One row's NaN would spoil a drafter's whole proposal, and with it the texts that were promised to its companions.
    Whether the row comes to that node at all, and fails there, is the decision's business.
    """

    def __init__(self, law: LaneLaw):
        self._law = law

    @property
    def prefix_free(self) -> bool:
        return self._law.prefix_free

    @property
    def raw(self) -> bool:
        return self._law.raw

    def __call__(
        self,
        logits: Tensor,
        rows: Rows,
        tokens: Tensor,
        parents: Tensor,
        nodes: range,
        impossible: Tensor | None = None,
    ) -> Tensor:
        scores = self._law(logits, rows, tokens, parents, nodes, impossible)
        self._law.take_failed()  # perhaps at a node that is never emitted: the decision will see
        if self._law.always_leaves_some:
            return scores
        return torch.where(scores.amax(-1, keepdim=True).isfinite(), scores, logits.to(scores.dtype))


class LaneLaw:
    """Called like a `SamplingLaw`; every row gets the law of its own request, equal laws are applied at once.

    A processor sees the rows that share its law and no others: with processors of its own, a request is row 0 of a
    batch of one, as it would be alone. Where a row's processors fail, its scores stay raw, for drafter and decision
    alike, and `take_failed` tells: the others' scores, and so their drafts, are what they would be without it.
    """

    def __init__(self) -> None:
        self._failed: dict[int, BaseException] = {}
        self._of_row: dict[int, SamplingLaw] = {}
        self._shared: dict[Any, SamplingLaw] = {}
        self._doubtful: set[int] = set()
        self.prefix_free = True

    def join(self, row: int, processors: LogitsProcessorList, ends: Collection[int]) -> None:
        """From now on `row` has the law of these processors."""
        key = shared_key(processors, ends)
        law = None if key is None else self._shared.get(key)
        if law is None:
            law = SamplingLaw(processors, ends)
            if key is not None:
                self._shared[key] = law
        self._of_row[row] = law
        self.prefix_free &= law.prefix_free
        if any(type(processor) not in _WARPERS for processor in processors):
            self._doubtful.add(row)

    def take_failed(self) -> dict[int, BaseException]:
        """By row, what its processors raised since the last call."""
        failed, self._failed = self._failed, {}
        return failed

    def leave(self, row: int) -> None:
        self._failed.pop(row, None)
        self._doubtful.discard(row)
        law = self._of_row.pop(row, None)
        self.prefix_free = all(other.prefix_free for other in self._of_row.values())
        if law is not None and law not in self._of_row.values():
            self._shared = {key: other for key, other in self._shared.items() if other is not law}

    @property
    def raw(self) -> bool:
        return all(law.raw for law in self._of_row.values())

    @property
    def always_leaves_some(self) -> bool:
        """Whether no row's processors could rule everything out, or make NaN of it."""
        return not self._doubtful

    def __call__(
        self,
        logits: Tensor,
        rows: Rows,
        tokens: Tensor,
        parents: Tensor,
        nodes: range,
        impossible: Tensor | None = None,
    ) -> Tensor:
        """Processed scores, float32 `[live, len(nodes), vocab]`; arguments as of `SamplingLaw`."""
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(rows.live):
            groups.setdefault(id(self._of_row[row]), []).append(place)
        if len(groups) == 1:
            return self._own(logits, rows, range(len(rows.live)), tokens, parents, nodes, impossible)
        scores = torch.empty_like(logits, dtype=torch.float32)
        for places in groups.values():
            at = torch.tensor(places, device=logits.device)
            dead = None if impossible is None else impossible[at]
            scores[at] = self._own(logits[at], rows, places, tokens[at], parents[at], nodes, dead)
        return scores

    def _own(
        self,
        logits: Tensor,
        rows: Rows,
        places: Sequence[int],
        tokens: Tensor,
        parents: Tensor,
        nodes: range,
        impossible: Tensor | None,
    ) -> Tensor:
        """Scores of rows that share a law (all arguments are theirs alone); raw where it fails."""
        law = self._of_row[rows.live[places[0]]]
        view: Any = RowView(rows, [rows.live[place] for place in places])
        try:
            return law(logits, view, tokens, parents, nodes, impossible)
        except BaseException as fault:
            if from_outside(fault):
                raise
            # Rows that share a law have equal processors: what they raise for one row may still be that row's alone.
            if len(places) == 1:
                self._failed[rows.live[places[0]]] = fault
                return logits.to(torch.float32)
        alone = []
        for i, place in enumerate(places):
            at = slice(i, i + 1)
            dead = None if impossible is None else impossible[at]
            alone.append(self._own(logits[at], rows, [place], tokens[at], parents[at], nodes, dead))
        return torch.cat(alone)
