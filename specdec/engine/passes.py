"""The target's passes of one step: the trees of all lanes at once, and chunks of prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.lane import Lane, merged
from specdec.engine.scheduler import Chunk
from specdec.engine.task import Task
from specdec.kv import SpecdecError, TargetFaultError
from specdec.kv.paged import PagedKVCache
from specdec.kv.pool import KVPool
from specdec.target import TargetModel, TargetPasses
from specdec.verify import DraftTree
from specdec.verify.passes.base import Text

_UNEVEN = 2
"""Chunks share a pass as long as padding makes it at most so many times larger."""


class EnginePasses:
    """Runs the target over sequences of the pool."""

    def __init__(self, model: PreTrainedModel, pool: KVPool):
        self.target = TargetModel(model)
        self._pool = pool

    def step(self, lanes: Sequence[Lane], trees: Sequence[DraftTree], chunks: Sequence[Chunk]) -> list[Tensor]:
        """The trees of all lanes, and the chunks of prefill besides, in one pass where the model allows it.

        Returns:
            per lane, logits `[rows, nodes, vocab]` of its trees.
        """
        sequences = [sequence for lane in lanes for sequence in lane.cache.sequences[: lane.cache.num_rows]]
        cache, texts = PagedKVCache(self._pool, sequences), [self._text(group) for group in _even(chunks)]
        logits = self.target.tree(cache, merged(lanes, trees), texts=texts).logits
        self._have_read(chunks)
        parts = logits.split([tree.tokens.shape[0] for tree in trees])
        return [part[:, : tree.tokens.shape[1]] for part, tree in zip(parts, trees, strict=True)]

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """K/V of the next tokens of each chunk's request; lengths are moved."""
        for group in _even(chunks):
            self.target.forward.causal(*self._text(group), keep=None)
            self._have_read(group)

    def _text(self, group: Sequence[Chunk]) -> Text:
        sequences = [chunk.task.sequence for chunk in group]
        cache = PagedKVCache(self._pool, [sequence for sequence in sequences if sequence is not None])
        tokens = torch.zeros(len(group), max(chunk.num_tokens for chunk in group), dtype=torch.int64)
        for i, (task, count) in enumerate(group):
            tokens[i, :count] = torch.tensor(task.text[task.done : task.done + count])
        starts, valid = [chunk.task.done for chunk in group], [chunk.num_tokens for chunk in group]
        return Text(cache, tokens.to(self.target.device), starts, valid)

    def _have_read(self, chunks: Sequence[Chunk]) -> None:
        for task, count in chunks:
            assert task.sequence is not None
            task.done += count
            self._pool.set_length(task.sequence, task.done)

    def apart(
        self, lane: Lane, tree: DraftTree, logits: Tensor, rows: Sequence[int], errors: dict[Task, SpecdecError]
    ) -> tuple[DraftTree, Tensor]:
        """The given rows' trees again, each request by itself: without its companions and, where there is NaN, without
        the nodes that bring it. Those the target fails on get an entry in `errors`.

        Args:
            logits: `[rows, nodes, vocab]`, as far as they are known.

        Returns:
            the tree and logits with those rows' nodes replaced, as far as they are kept (see
            `TargetPasses.healthy_part`).
        """
        counts, logits = tree.num_nodes.clone(), logits.clone()
        live = lane.live
        for i in rows:
            logits[i] = 0.0
            sequence = live[i].sequence
            assert sequence is not None
            cache = PagedKVCache(self._pool, [sequence])
            try:
                kept, own = TargetPasses(self.target, cache, None, partial(self.fault, live[i])).again(one_row(tree, i))
            except TargetFaultError as fault:
                errors[live[i]] = fault
                continue
            counts[i] = kept.num_nodes[0]
            logits[i, : own.shape[1]] = own[0]
        return replace(tree, num_nodes=counts), logits

    def fault(self, task: Task, what: str) -> TargetFaultError:
        """The error a request ends with on which the target fails."""
        emitted = task.text[task.prompt_length :]
        return TargetFaultError(
            f"the target failed on request {task.handle.id} at its step {task.steps} ({what}); {len(emitted)} tokens "
            "emitted before are in .emitted",
            task.steps,
            [emitted],
        )


def one_row(tree: DraftTree, row: int) -> DraftTree:
    """The tree of one row, as a batch of its own."""
    at = slice(row, row + 1)
    return DraftTree(
        tree.tokens[at],
        tree.parents[at],
        tree.num_nodes[at],
        tree.sampled[at],
        None if tree.q is None else tree.q[at],
        None if tree.q_row is None else tree.q_row[at],
        tree.topology,
        tree.replacement,
    )


def _even(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Groups of chunks that fill a common pass well."""
    groups: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda chunk: -chunk.num_tokens):
        if groups and groups[-1][0].num_tokens * (len(groups[-1]) + 1) <= _UNEVEN * (
            sum(other.num_tokens for other in groups[-1]) + chunk.num_tokens
        ):
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups
