"""Prompt lookup: propose what followed the last few tokens when they occurred before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specdec.drafters.base import Budget, Drafter, Session
from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.limits import MOST_NGRAM, MOST_NODES, checked_count
from specdec.verify.draft_kind import DraftKind
from specdec.verify.topology import Topology
from specdec.verify.tree import DraftTree


class NgramDrafter(Drafter):
    """Longest-match lookup in the row's own prompt and output (PLD; algorithms C.8). Free, model-less, deterministic.

    The last `max_ngram` .. `min_ngram` tokens are looked up, longest first, latest occurrence first; up to
    `branches` different continuations become branches of one tree that share their common prefix.

    Drafted tokens are deterministic nodes: top-p and friends filter the target's law, never the proposal.

    Args:
        k: tokens per continuation.
        max_ngram, min_ngram: longest and shortest match tried.
        branches: different continuations to propose.

    Raises:
        UnsupportedArgumentError: a number out of its range, or k * branches above `MOST_NODES`.
    """

    name = "ngram"

    def __init__(self, k: int = 10, max_ngram: int = 3, min_ngram: int = 1, branches: int = 1):
        self.k = checked_count("k", k, 1, MOST_NODES)
        self.branches = checked_count("branches", branches, 1, MOST_NODES)
        self.max_ngram = checked_count("max_ngram", max_ngram, 1, MOST_NGRAM)
        self.min_ngram = checked_count("min_ngram", min_ngram, 1, MOST_NGRAM)
        if self.min_ngram > self.max_ngram:
            raise UnsupportedArgumentError(
                f"expected min_ngram <= max_ngram, got min_ngram={min_ngram}, max_ngram={max_ngram}"
            )
        self.max_depth = self.k
        self.max_nodes = checked_count("k * branches", self.k * self.branches, 1, MOST_NODES)
        self._session: Session | None = None
        self._texts: dict[int, list[int]] = {}
        self._ends: dict[int, dict[tuple[int, ...], list[int]]] = {}

    @property
    def kind(self) -> DraftKind:
        return DraftKind("chain" if self.branches == 1 else "tree", "deterministic")

    def nodes_within(self, depth: int) -> int:
        return min(depth, self.k) * self.branches

    def start(self, session: Session) -> None:
        self._session = session
        self._texts, self._ends = {}, {}
        self.join(session.rows.live)

    def join(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._texts[row], self._ends[row] = [], {}

    def finish(self) -> None:
        self._session = None
        self._texts, self._ends = {}, {}

    def stop(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._texts.pop(row, None)
            self._ends.pop(row, None)

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        assert self._session is not None, "propose() before start()"
        rows = self._session.rows
        trees = []
        for row, depth in zip(rows.live, budget.depths, strict=True):
            self._catch_up(row)
            trees.append(_merge(self._texts[row][-1], self._continuations(row, depth), budget.max_nodes))
        width = max(len(tokens) for tokens, _ in trees)
        device = rows.device
        sizes = [len(tokens) for tokens, _ in trees]
        pad = [width - size for size in sizes]
        tokens = torch.tensor([t + [0] * n for (t, _), n in zip(trees, pad, strict=True)], device=device)
        if self.branches == 1:  # a shape that is known needs no masks made from these very tensors
            chain = DraftTree.build(Topology.chain(width - 1), tokens)
            ragged = min(sizes) < width
            return replace(chain, num_nodes=torch.tensor(sizes, device=device)) if ragged else chain
        counts = torch.tensor(sizes, device=device)
        parents = torch.tensor([p + [0] * n for (_, p), n in zip(trees, pad, strict=True)], device=device)
        return DraftTree(tokens, parents, counts, torch.zeros_like(tokens, dtype=torch.bool))

    def _catch_up(self, row: int) -> None:
        """Index the tokens emitted since the last proposal: n-gram -> positions right after it."""
        assert self._session is not None
        rows, text, ends = self._session.rows, self._texts[row], self._ends[row]
        have, count = len(text), rows.num_tokens[row]
        text.extend(rows.text[row, have:count].tolist())
        for end in range(have + 1, count + 1):
            for size in range(self.min_ngram, min(self.max_ngram, end) + 1):
                ends.setdefault(tuple(text[end - size : end]), []).append(end)

    def _continuations(self, row: int, depth: int) -> list[list[int]]:
        text, ends = self._texts[row], self._ends[row]
        found: list[list[int]] = []
        length = min(self.k, depth)
        for size in range(min(self.max_ngram, len(text)), self.min_ngram - 1, -1):
            for end in reversed(ends.get(tuple(text[-size:]), ())):
                tokens = text[end : end + length]
                if tokens and not any(other[: len(tokens)] == tokens for other in found):
                    found.append(tokens)
                if len(found) == self.branches:
                    return found
        return found


def _merge(root: int, continuations: list[list[int]], max_nodes: int) -> tuple[list[int], list[int]]:
    """Tokens and parents of the tree (root first) that holds every continuation once."""
    tokens, parents = [root], [-1]
    children: dict[tuple[int, int], int] = {}
    for continuation in continuations:
        node = 0
        for token in continuation:
            child = children.get((node, token))
            if child is None:
                if len(tokens) > max_nodes:
                    break
                child = children[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
            node = child
    return tokens, parents
