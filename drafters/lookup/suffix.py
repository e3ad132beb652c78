"""Suffix decoding: propose what followed the longest end of the text, as often as it did."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from specdec.drafters.base import Budget, Drafter, Session
from specdec.drafters.lookup.automaton import ROOT, SuffixAutomaton
from specdec.drafters.lookup.prediction import Branch, Escapes, Match, grown
from specdec.drafters.lookup.store import SuffixStore
from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.limits import MOST_NODES, checked_count
from specdec.verify.draft_kind import DraftKind
from specdec.verify.tree import DraftTree


class _RowText:
    """One row's text, what it has taught, and where it stands in the store's generations."""

    def __init__(self, stored: Sequence[SuffixAutomaton]):
        self.own = SuffixAutomaton()
        self.num_tokens = 0
        self.stored = [Match(automaton, ROOT, 0) for automaton in stored]
        self.escapes = [Escapes() for _ in (self.own, *stored)]

    @property
    def matches(self) -> list[Match]:
        state = self.own.repeated
        return [Match(self.own, state, self.own.length[state]), *self.stored]

    def read(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for match, escapes in zip(self.matches, self.escapes, strict=True):
                escapes.saw(match, token)
            self.own.append(token)
            self.stored = [match.after(token) for match in self.stored]
        self.num_tokens += len(tokens)


class SuffixDrafter(Drafter):
    """Longest matches of any length in the row's own text and in earlier outputs; trees by how often what followed
    (SuffixDecoding: Oliaro et al. 2024). No model; deterministic nodes.

    How far a match is trusted is learned from the text itself: what repeats is drafted deep, what does not costs
    nothing.

    Args:
        nodes: drafted tokens a step, also the deepest level.
        least: no node is drafted that is less probable than this. About the cost of one more node in a pass, in passes.
        store: earlier outputs to draft from. None: the row's own text alone. Texts that are sampled without rule
            "coupled" are never drafted from a store (their tokens would depend, under a seed, on what ran before).

    Raises:
        UnsupportedArgumentError: a number out of its range.
    """

    name = "suffix"

    def __init__(self, nodes: int = 10, least: float = 0.05, store: SuffixStore | None = None):
        self.nodes = checked_count("nodes", nodes, 1, MOST_NODES)
        if not 0 < least < 1:
            raise UnsupportedArgumentError(f"least: expected a probability between 0 and 1, got {least!r}")
        self.least, self.store = float(least), store
        self.max_depth = self.max_nodes = self.nodes
        self._session: Session | None = None
        self._rows: dict[int, _RowText] = {}

    @property
    def kind(self) -> DraftKind:
        return DraftKind("tree", "deterministic")

    def nodes_within(self, depth: int) -> int:
        return self.nodes if depth else 0

    def start(self, session: Session) -> None:
        self._session, self._rows = session, {}
        self.join(session.rows.live)

    def join(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._rows[row] = _RowText(self._generations())

    def stop(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._keep(row)

    def finish(self) -> None:
        for row in list(self._rows):
            self._keep(row)
        self._session, self._rows = None, {}

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        assert self._session is not None, "propose() before start()"
        rows, most = self._session.rows, min(self.nodes, budget.max_nodes)
        with nullcontext() if self.store is None else self.store.lock:
            trees = [self._tree(row, depth, most) for row, depth in zip(rows.live, budget.depths, strict=True)]
        width = max(map(len, trees), default=0)
        filled = [[*tree, *[Branch(0, 0)] * (width - len(tree))] for tree in trees]
        device = rows.device
        below = torch.tensor(filled, dtype=torch.int64, device=device).view(len(trees), width, 2)
        tokens = torch.cat([rows.roots()[:, None], below[:, :, 0]], 1)
        parents = torch.nn.functional.pad(below[:, :, 1], (1, 0), value=-1)
        counts = torch.tensor([len(tree) + 1 for tree in trees], device=device)
        return DraftTree(tokens, parents, counts, torch.zeros_like(tokens, dtype=torch.bool))

    def _tree(self, row: int, depth: int, most: int) -> list[Branch]:
        assert self._session is not None
        rows, known = self._session.rows, self._rows[row]
        known.read(rows.text[row, known.num_tokens : rows.num_tokens[row]].tolist())
        return grown(known.matches, known.escapes, min(depth, self.max_depth), most, self.least)

    def _generations(self) -> Sequence[SuffixAutomaton]:
        assert self._session is not None
        free = not self._session.do_sample or self._session.race is not None
        return self.store.generations if self.store is not None and free else ()

    def _keep(self, row: int) -> None:
        """A row's text goes into the store."""
        known = self._rows.pop(row, None)
        if known is not None and self.store is not None and self._session is not None:
            rows = self._session.rows
            self.store.add(rows.text[row, : rows.num_tokens[row]].tolist())
