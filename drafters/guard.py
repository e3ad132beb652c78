"""A guard around every drafter: its faults cost speed, never the output."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from specdec.drafters.base import CACHE_NAME, Budget, Drafter, Session
from specdec.kv.errors import InvalidTreeError
from specdec.kv.faults import described, from_outside
from specdec.kv.limits import MOST_NODES, MOST_SLOTS, checked_count
from specdec.verify.draft_kind import DraftKind
from specdec.verify.tree import DraftTree, Verdict

P = ParamSpec("P")
T = TypeVar("T")

MAX_CONSECUTIVE_FAULTS = 8
"""After so many faults in a row the drafter is left alone for the rest of the call."""


_Q_ROUNDING = 1e-5


def finite_levels(tree: DraftTree) -> DraftTree | None:
    """The leading levels of each row's sampled tree whose laws are numbers; None when that leaves no draft at all.

    Whether a later law is NaN depends on the tokens sampled before it (one poisoned embedding row is enough). To
    withdraw those tokens because of it would bias the output (algorithms B.5); to stop there does not.
    """
    if tree.q is None or tree.q_row is None or tree.q.dim() != 3 or tree.q_row.shape != tree.tokens.shape:
        return None
    if int(tree.q_row.max()) >= tree.q.shape[1]:
        return None
    sick_laws = tree.q_sums.isnan()
    sick = sick_laws.gather(1, tree.q_row.clamp(min=0)) & (tree.q_row >= 0) & tree.valid
    depths = torch.where(tree.valid, tree.depths, tree.max_depth)
    if not bool(sick.any()) or bool((depths.diff(dim=1) < 0).any()):  # nodes must be in level order to be cut
        return None
    last = torch.where(sick, depths, tree.max_depth).amin(1, keepdim=True)
    counts = (tree.valid & (depths <= last)).sum(1)
    if int(counts.max()) == 1:
        return None
    q = torch.where(sick_laws[:, :, None], 1.0 / tree.q.shape[2], tree.q)  # nothing is drawn from these any more
    return replace(tree, num_nodes=counts, q=q)


def normalised(tree: DraftTree) -> DraftTree:
    """The tree with every q row divided by its sum where one is off by more than float32 rounding.

    A drafter that samples in proportion to a row samples from the row over its sum: that is the law really used.
    """
    if tree.q is None or not tree.q.numel():
        return tree
    if all(abs(total - 1) <= _Q_ROUNDING for row in tree.q_sums.tolist() for total in row):
        return tree
    return replace(tree, q=tree.q / tree.q_sums[..., None])


class DrafterFaultWarning(UserWarning):
    """A drafter failed; the step was decoded plainly and the output is still exact. Issued once per call."""


class DrafterNoteWarning(UserWarning):
    """Some rows get no drafts though nothing failed, e.g. because they are longer than a draft model can read; the
    output is exact. Issued once per call."""


class FallbackGuard(Drafter):
    """Turns anything wrong with a drafter (exception, NaN, bad ids or shapes, false q, OOM) into an empty proposal.

    What the drafter says of itself is asked once, `num_uniforms` at the start of every session.

    Attributes:
        num_faults: faults of the current call; last_fault: what the last one was.

    Raises:
        UnsupportedArgumentError: a drafter whose trees or tail no pass could serve.
    """

    num_uniforms: int = 0
    tail_slots: int = 1

    def __init__(self, inner: Drafter, most_nodes: int | None = None):
        self.inner = inner
        self.name = inner.name
        self.max_depth = checked_count(f"max_depth of drafter {self.name!r}", inner.max_depth, 0, MOST_NODES)
        nodes = checked_count(f"max_nodes of drafter {self.name!r}", inner.max_nodes, 0, MOST_NODES)
        self.tail_slots = checked_count(f"tail_slots of drafter {self.name!r}", inner.tail_slots, 1, MOST_SLOTS + 1)
        self.max_nodes = nodes if most_nodes is None else min(nodes, most_nodes)
        self.num_faults = 0
        self.last_fault: str | None = None
        self._consecutive = 0
        self._warned = False
        self._session: Session | None = None
        self._serves_many = False
        self._unprepared: list[BaseException] = []  # one list for all clones

    @property
    def notes(self) -> Sequence[str]:  # type: ignore[override]  # read only here
        return self.inner.notes

    @property
    def num_positions(self) -> int | None:
        return self.inner.num_positions

    @property
    def kind(self) -> DraftKind | None:
        return self.inner.kind

    def nodes_within(self, depth: int) -> int:
        return min(self.max_nodes, self._asked(self.inner.nodes_within, self.max_nodes, depth))

    @property
    def num_cache_layers(self) -> int:
        return self.inner.num_cache_layers

    @property
    def shares_target_kv(self) -> bool:
        return self.inner.shares_target_kv

    @contextmanager
    def running(self) -> Iterator[None]:
        self._unprepared.clear()
        entered = ExitStack()
        self._prepare(lambda: entered.enter_context(self.inner.running()))
        try:
            yield
        finally:
            self._prepare(entered.close)

    def start(self, session: Session) -> None:
        self._session = session
        self.num_faults = 0
        self.last_fault = None
        self._consecutive = 0
        self._warned = False
        self._run(self.inner.start, session)
        self.num_uniforms = self._asked(getattr, 0, self.inner, "num_uniforms")
        self._tell()

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        assert self._session is not None, "propose() before start()"
        roots = self._session.rows.roots()
        if budget.max_depth <= 0 or budget.max_nodes <= 0 or self._consecutive >= MAX_CONSECUTIVE_FAULTS:
            return DraftTree.root_only(roots)
        faults = self.num_faults
        tree = self._run(self._checked, budget, uniforms, roots)
        if self.num_faults == faults:
            self._consecutive = 0
        if not self._warned and self.inner.notes:
            self._tell()
        return DraftTree.root_only(roots) if tree is None else tree

    def observe(self, verdict: Verdict, logits: Tensor) -> None:
        self._run(self.inner.observe, verdict, logits)

    def join(self, rows: Sequence[int]) -> None:
        self._consecutive = 0  # a new request, a new chance
        self._run(self.inner.join, rows)
        self._tell()

    def clone(self) -> FallbackGuard:
        """A guard for rows of several callers. A warning that one of them made an error is not raised."""
        copy = FallbackGuard(self.inner.clone(), self.max_nodes)
        copy._serves_many, copy._unprepared = True, self._unprepared
        return copy

    def stop(self, rows: Sequence[int]) -> None:
        self._run(self.inner.stop, rows)

    def finish(self) -> None:
        if self._session is not None:
            self._run(self.inner.finish)
            self._session = None

    def _checked(self, budget: Budget, uniforms: Tensor, roots: Tensor) -> DraftTree:
        assert self._session is not None
        if self._unprepared:
            raise self._unprepared[0]
        tree = self.inner.propose(budget, uniforms)
        if not isinstance(tree, DraftTree):
            raise TypeError(f"propose() must return a DraftTree, got {type(tree).__name__}")
        if tree.tokens.dim() != 2 or tree.tokens.shape[1] > self.max_nodes + 1:
            raise ValueError(f"expected tokens [rows, <= {self.max_nodes + 1}], got {tuple(tree.tokens.shape)}")
        try:
            tree.validate(self._session.vocab, roots)
        except InvalidTreeError as fault:
            kept = finite_levels(tree)
            if kept is None:
                raise
            kept.validate(self._session.vocab, roots)
            self._record(fault)
            return kept
        return tree if tree.q is None else normalised(tree)

    def _prepare(self, call: Callable[[], object]) -> None:
        """What is set up and taken down around a call; a drafter for which that fails is asked for nothing."""
        try:
            call()
        except BaseException as fault:
            if from_outside(fault):
                raise
            self._unprepared.append(fault)

    def _asked(self, question: Callable[..., T], otherwise: T, *about: Any) -> T:
        """What the drafter says of itself, `otherwise` where that fails: its proposals are checked in any case."""
        try:
            return question(*about)
        except BaseException as fault:
            if from_outside(fault):
                raise
            return otherwise

    def _run(self, call: Callable[P, T], *given: P.args, **named: P.kwargs) -> T | None:
        try:
            return call(*given, **named)
        except BaseException as fault:  # any drafter fault whatever: that is this class's purpose
            if from_outside(fault):
                raise
            self._record(fault)
            return None

    def _tell(self) -> None:
        if self.inner.notes and not self._warned:
            self._warned = True
            self._warn(self.inner.notes[0], DrafterNoteWarning)

    def _warn(self, text: str, kind: type[Warning]) -> None:
        with suppress(kind) if self._serves_many else nullcontext():
            warnings.warn(text, kind, stacklevel=4)

    def _record(self, fault: BaseException) -> None:
        assert self._session is not None
        self.num_faults += 1
        self._consecutive += 1
        self.last_fault = described(fault)
        if self.inner.num_cache_layers:
            # Its K/V may hold NaN or half a pass; it refills from the text when it next proposes.
            self._session.cache.forget(CACHE_NAME)
        if isinstance(fault, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        if self.num_faults == 1:
            self._warn(
                f"drafter {self.name!r} failed ({self.last_fault}); decoding plainly for this step. The output is "
                "still exact. See SpecReport.num_drafter_faults.",
                DrafterFaultWarning,
            )
