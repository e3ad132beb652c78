"""Decisions in the order of plain decoding, for processors that must be called once per emitted token.

A draft tree is walked from its root along what is really kept. At each node the processors are shown the very batch
that plain `generate` would show them, then the rule decides about the node's children, then the stop rules are asked;
nothing is asked about text that is not emitted. The rows of one batch keep step: it ends where its first row leaves its
draft, and what the others had drafted beyond is not looked at (which depends on that row alone, so laws are untouched).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList

from specdec.decision import verdict_of
from specdec.kv import UnsupportedArgumentError
from specdec.kv.faults import from_outside
from specdec.stopping import StopRules, interrupted
from specdec.verify import DraftTree, Rows, Verdict
from specdec.verify.host_integers import on_host
from specdec.verify.law import checked_scores
from specdec.verify.purity import is_pure

T = TypeVar("T")

NOTHING_LEFT = (
    "the logits processors leave nothing to sample from: expected a finite score for some token of every row, got only "
    "-inf, or NaN. Loosen their arguments, or see what your own processors return"
)


class PlainBatch:
    """The rows of one `generate` call as plain decoding sees them after every token.

    Args:
        rows: which rows of `Rows` these are. ids: int64 `[len(rows), columns]`, their text, pads included.
        pad: id shown in the place of a finished row's further tokens, where such rows are padded.
        keeps_scores: whether criteria are given scores.

    Attributes:
        num_calls, ms: per processor class, how often it was called and what that took.
    """

    def __init__(
        self,
        processors: Sequence[Any],
        stop: StopRules,
        rows: Sequence[int],
        ids: Tensor,
        pad: int = 0,
        keeps_scores: bool = False,
    ):
        self.rows = list(rows)
        self.ids = ids
        self.ended = [False] * len(self.rows)
        self.num_calls: dict[str, int] = {}
        self.ms: dict[str, float] = {}
        self._processors = [(type(one).__name__, LogitsProcessorList([one])) for one in processors]
        self._stop = stop
        self._pad = pad
        self._shown: list[Tensor] | None = [] if keeps_scores else None
        self._within: str | None = None
        self._seen = ids
        self._halfway: dict[int, tuple[Tensor, tuple[int, Tensor]]] = {}
        self._answers: dict[int, tuple[Tensor, Tensor]] = {}
        self._opinions: dict[int, tuple[Tensor, list[bool]]] = {}

    def resume(self, stop: StopRules, rows: Sequence[int], columns: int) -> None:
        """Go on from the first `columns` columns, under another name: nothing counts of a step that was interrupted.

        What was asked in that step is not asked again, but answered from memory: the step is taken again with the same
        noise.
        """
        self.rows, self._stop = list(rows), stop
        self.ids, self.ended = self.ids[:, :columns], [False] * len(self.rows)

    def begin(self) -> None:
        """A step begins: forget the answers of those before it."""
        columns = self.ids.shape[1]
        self._answers = {at: answer for at, answer in self._answers.items() if at >= columns}
        self._opinions = {at: opinion for at, opinion in self._opinions.items() if at > columns}

    def process(self, logits: Mapping[int, Tensor]) -> Tensor:
        """Scores of the next token, `[len(rows), vocab]` in the dtype that the processors made of them; zeros stand in
        for the logits of rows that have ended.

        Args:
            logits: `[vocab]` by place in the batch.

        Raises:
            UnsupportedArgumentError: a processor returned something else than scores of this shape. Whatever a
            processor raises.
        """
        columns = self.ids.shape[1]
        if columns not in self._answers:
            self._answers[columns] = self.ids, self._asked(logits)
        return self._same(self._answers[columns])

    def _asked(self, logits: Mapping[int, Tensor]) -> Tensor:
        columns = self.ids.shape[1]
        if columns not in self._halfway:
            first = next(iter(logits.values()))
            scores = first.new_zeros(len(self.rows), first.shape[0], dtype=torch.float32)
            for place, own in logits.items():
                scores[place] = own
            self._halfway = {columns: (self.ids, (0, scores))}
        done, scores = self._same(self._halfway[columns])
        for at, (name, one) in enumerate(self._processors[done:], done):
            self._enter(name, is_pure(one[0]))
            start = perf_counter()
            processed: Any = one(self.ids, scores)  # type: ignore[arg-type]
            self.num_calls[name] = self.num_calls.get(name, 0) + 1
            self.ms[name] = self.ms.get(name, 0.0) + 1e3 * (perf_counter() - start)
            self._refuse_changed(name)
            scores = checked_scores(one[0], processed, scores)
            self._halfway[columns] = self.ids, (at + 1, scores)
            self._within = None
        if self._shown is not None:
            self._shown.append(scores)
        return scores

    def _enter(self, name: str, harmless: bool) -> None:
        """Somebody is called now. Nobody is who was in the middle of a call when a step was interrupted."""
        self._seen = self.ids.clone()
        if self._within is not None:
            raise UnsupportedArgumentError(interrupted(f"{self._within} was called"))
        self._within = None if harmless else name

    def _refuse_changed(self, name: str) -> None:
        """In plain `generate` such writes end up in the text; here passes over it have been made already."""
        if not torch.equal(self._seen, self.ids):
            raise UnsupportedArgumentError(
                f"{name} changed input_ids in place: expected it to leave them as they are, and to work on a clone"
            )

    def _same(self, remembered: tuple[Tensor, T]) -> T:
        """The answer, if it was about this very text."""
        if not torch.equal(remembered[0], self.ids):
            raise UnsupportedArgumentError(interrupted("its processors had seen a token that is not emitted now"))
        return remembered[1]

    def append(self, tokens: Mapping[int, int]) -> None:
        """One token more for every row that runs, and the stop rules' opinion of it (see `ended`).

        Args:
            tokens: by place in the batch.
        """
        column = [tokens.get(place, self._pad) for place in range(len(self.rows))]
        self.ids = torch.cat([self.ids, self.ids.new_tensor(column)[:, None]], dim=1)
        columns = self.ids.shape[1]
        if columns not in self._opinions:
            shown = None if self._shown is None else tuple(self._shown)
            self._enter("a stopping criterion", self._stop.keeps_nothing)
            told = self._stop.ask(self.ids, shown)
            self._refuse_changed("a stopping criterion")
            self._opinions[columns] = self.ids, told
            self._within = None
        stopped = self._stop.column(self.ids, self.rows, self._same(self._opinions[columns]))
        if self._stop.pads_finished or all(stopped):  # else the finished go on until the last one stops
            self.ended = stopped


class Walk(NamedTuple):
    """How far each live row came. Lists are per live row.

    scores, law: float32 `[live, nodes, vocab]`, processed where a row came by, elsewhere raw and zero.
    kept_end: whether the last token is a draft token, too (its node is not on the path: no pass has followed it).
    sick: whether it came to a node with NaN in its logits. failed: what its own processors or criteria raised.
    """

    scores: Tensor
    law: Tensor
    verdict: Verdict
    kept_end: list[bool]
    sick: list[bool]
    failed: dict[int, BaseException]


class PlainOrder:
    """Walks trees for rows that belong to batches of plain decoding.

    Args:
        isolates: what a batch's own code raises ends this batch's walk and is reported in `Walk.failed`. Otherwise it
            is raised, as plain `generate` would.
    """

    def __init__(self, rows: Rows, sampling: bool, isolates: bool):
        self._rows, self._sampling, self._isolates = rows, sampling, isolates
        self.batches: list[PlainBatch] = []

    def join(self, batch: PlainBatch) -> None:
        self.batches.append(batch)

    def leave(self, row: int) -> None:
        """A row that was a batch of its own takes no more part."""
        self.batches = [batch for batch in self.batches if batch.rows != [row]]

    def walk(self, tree: DraftTree, logits: Tensor, sick: Tensor, judge: Callable[[Tensor], Verdict]) -> Walk:
        """Every row's path, as far as its batch comes together.

        Args:
            logits: raw, `[live, nodes, vocab]`; never mutated. sick: bool `[live, nodes]`, nodes with NaN in them.
            judge: a top-down rule's verdict for a law `[live, nodes, vocab]` of which deeper nodes are still zero.
        """
        scores = logits.to(torch.float32, copy=True)
        law = torch.zeros_like(scores)
        (drafted, unfit) = on_host(tree.tokens, sick)
        live = len(self._rows.live)
        paths, ends = [[0] for _ in range(live)], [0] * live
        state = Walk(scores, law, verdict_of(paths, ends, tree), [False] * live, [False] * live, {})
        place_of = {row: place for place, row in enumerate(self._rows.live)}
        walking = [(batch, self._running(batch, place_of)) for batch in self.batches]
        walking = [(batch, places) for batch, places in walking if places]
        for batch, _ in walking:
            batch.begin()
        while walking:
            asked = [one for one in walking if self._ask(*one, state, logits, paths, unfit)]
            if not asked:
                break
            kept, accepted, following = on_host(*judge(law))
            walking = []
            for batch, places in asked:
                tokens = {}
                for index, place in places.items():
                    depth = len(paths[place])
                    state.kept_end[place] = accepted[place] >= depth
                    ends[place] = drafted[place][kept[place][depth]] if state.kept_end[place] else following[place]
                    tokens[index] = ends[place]
                if not self._attempt(batch, places, state, partial(batch.append, tokens)):
                    continue
                running = {index: place for index, place in places.items() if not batch.ended[index]}
                if running and all(state.kept_end[place] for place in running.values()):
                    for place in running.values():
                        paths[place].append(kept[place][len(paths[place])])
                    walking.append((batch, running))
        return state._replace(verdict=verdict_of(paths, ends, tree))

    def _running(self, batch: PlainBatch, place_of: Mapping[int, int]) -> dict[int, int]:
        """Place in the batch -> place among the live rows."""
        return {index: place_of[row] for index, row in enumerate(batch.rows) if row in place_of}

    def _ask(
        self,
        batch: PlainBatch,
        places: Mapping[int, int],
        state: Walk,
        logits: Tensor,
        paths: Sequence[Sequence[int]],
        unfit: Sequence[Sequence[bool]],
    ) -> bool:
        """Scores and laws of the nodes its rows stand at; False where this batch comes no further."""
        for place in places.values():
            state.sick[place] = unfit[place][paths[place][-1]]
        if any(state.sick[place] for place in places.values()):
            return False

        def process() -> None:
            raw = {index: logits[place, paths[place][-1]].to(torch.float32) for index, place in places.items()}
            processed = batch.process(raw)
            own = F.softmax(processed, dim=-1) if self._sampling else _below_the_largest(processed)
            for index, place in places.items():
                node = paths[place][-1]
                state.scores[place, node], state.law[place, node] = processed[index], own[index]
            if self._sampling and bool(own[list(places)].isnan().any()):
                raise UnsupportedArgumentError(NOTHING_LEFT)

        return self._attempt(batch, places, state, process)

    def _attempt(self, batch: PlainBatch, places: Mapping[int, int], state: Walk, call: Callable[[], None]) -> bool:
        """Run a batch's own code; False where that failed (and is nobody else's loss)."""
        try:
            call()
        except BaseException as fault:  # an exit asked for by one request's code is that request's end
            if from_outside(fault) or not self._isolates:
                raise
            state.failed.update(dict.fromkeys(places.values(), fault))
            return False
        return True


def _below_the_largest(scores: Tensor) -> Tensor:
    """Scores whose largest entry is still the same one in float32, which is coarser than float64."""
    if scores.dtype != torch.float64:
        return scores
    largest = scores.amax(-1, keepdim=True)
    return torch.where(largest.isfinite(), scores - largest, scores)
