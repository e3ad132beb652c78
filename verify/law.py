"""From logits to a law: the caller's own processors, applied to every node with that node's own prefix."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.nucleus import TopK, TopP
from specdec.verify.purity import PREFIX_FREE, ROW_FREE, is_pure
from specdec.verify.rows import Rows


class SamplingLaw:
    """Logits of tree nodes -> processed scores, exactly as plain `generate` computes them token by token.

    Three routes, all the same law: one vectorised call when no processor reads the prefix; one call per prefix
    length when processors read only the prefix; else (the caller's own, declared pure) one call per prefix length with
    the *original* batch, so that processors that know rows by position still work.

    Args:
        processors: those that are not pure (see `purity.is_pure`) are left out: nobody may ask them about drafts.
            Where there are some, this law is one to draft by; what is emitted is decided in plain order.
        ends: end-of-sequence ids; nothing below a drafted one is shown to processors.
    """

    def __init__(self, processors: Iterable[Any], ends: Collection[int] = ()):
        self._ends = frozenset(ends)
        asked = [processor for processor in processors if is_pure(processor)]
        kinds = {type(processor) for processor in asked}
        self.processors: Any  # a LogitsProcessorList; its stubs insist on LongTensor
        self.processors = LogitsProcessorList(
            [_OURS[type(processor)](processor) if type(processor) in _OURS else processor for processor in asked]
        )
        self.prefix_free = kinds <= PREFIX_FREE
        self.row_free = kinds <= ROW_FREE
        self.raw = not asked

    def __call__(
        self,
        logits: Tensor,
        rows: Rows,
        tokens: Tensor,
        parents: Tensor,
        nodes: range,
        impossible: Tensor | None = None,
    ) -> Tensor:
        """Processed scores of `nodes`.

        Processors are never shown a prefix that plain decoding could not reach: below a token that the law itself
        rules out (a grammar's forbidden token, say) scores are left raw, and no rule can get there.

        Args:
            logits: `[live, len(nodes), vocab]`; never mutated.
            tokens, parents: int64 `[live, >= nodes.stop]`, the tree so far (node 0 = root = last emitted token).
            nodes: which nodes the logits belong to, parents before children.
            impossible: bool `[live, >= nodes.stop]`, nodes known to be ruled out (parents outside `nodes`).

        Returns:
            float32 `[live, len(nodes), vocab]`, as in plain `generate`; not to be written to.
        """
        if self.raw:
            return logits if logits.dtype == torch.float32 else logits.to(torch.float32)
        scores = logits.to(torch.float32, copy=True)
        if self.prefix_free:
            flat = scores.view(-1, scores.shape[-1])
            none = flat.new_zeros(flat.shape[0], 1, dtype=torch.int64)
            for processor in self.processors:  # the list would look up every processor's signature in every call
                flat = processor(none, flat)
            return flat.view_as(scores)
        token_rows, parent_rows = tokens.tolist(), parents.tolist()
        dead = [[False] * tokens.shape[1] for _ in rows.live] if impossible is None else impossible.tolist()
        levels: dict[int, dict[int, list[tuple[int, int, Tensor]]]] = {}
        for i, row in enumerate(rows.live):
            prefix = rows.prefix(row)
            for j, node in enumerate(nodes):
                path = _path(token_rows[i], parent_rows[i], node)
                if not self._ends.isdisjoint(path):  # plain decoding asks nothing beyond the end of a text
                    dead[i][node] = True
                full = torch.cat([prefix, prefix.new_tensor(path)]) if path else prefix
                levels.setdefault(len(path), {}).setdefault(len(full), []).append((i, j, full))
        for _, lengths in sorted(levels.items()):
            self._rule_out(scores, lengths, nodes, token_rows, parent_rows, dead)
            for length, members in lengths.items():
                alive = [member for member in members if not dead[member[0]][nodes[member[1]]]]
                if alive and self.row_free:
                    self._call(scores, rows, alive)
                elif alive:
                    self._call_in_place(scores, rows, length, alive)
        return scores

    def _rule_out(
        self,
        scores: Tensor,
        lengths: dict[int, list[tuple[int, int, Tensor]]],
        nodes: range,
        tokens: list[list[int]],
        parents: list[list[int]],
        dead: list[list[bool]],
    ) -> None:
        """Mark the level's nodes whose parent is dead, or whose token the parent's finished scores exclude."""
        places = [(i, nodes[j]) for members in lengths.values() for i, j, _ in members]
        places = [(i, node) for i, node in places if parents[i][node] >= nodes.start]
        if not places:
            return
        row = [i for i, _ in places]
        parent = [parents[i][node] - nodes.start for i, node in places]
        token = [tokens[i][node] for i, node in places]
        above = scores[row, parent]
        # Where nothing is possible, plain greedy decoding takes token 0 and goes on.
        ruled_out = above.gather(1, torch.tensor(token, device=scores.device)[:, None])[:, 0].isneginf()
        excluded = (ruled_out & ~above.amax(1).isneginf()).tolist()
        for (i, node), gone in zip(places, excluded, strict=True):
            dead[i][node] = dead[i][node] or dead[i][parents[i][node]] or gone

    def _call(self, scores: Tensor, rows: Rows, members: list[tuple[int, int, Tensor]]) -> None:
        row = [i for i, _, _ in members]
        node = [j for _, j, _ in members]
        prefixes = torch.stack([full for _, _, full in members])
        origin = [rows.live[i] for i in row]
        processors: Any = LogitsProcessorList([_for_rows(processor, origin) for processor in self.processors])
        scores[row, node] = processors(prefixes, scores[row, node])

    def _call_in_place(self, scores: Tensor, rows: Rows, length: int, members: list[tuple[int, int, Tensor]]) -> None:
        """One call per node column with every row of the original batch at its own index."""
        pending = list(members)
        while pending:
            taken: dict[int, tuple[int, int, Tensor]] = {}
            rest = []
            for member in pending:
                if taken.setdefault(rows.live[member[0]], member) is not member:
                    rest.append(member)
            pending = rest
            prefixes = torch.stack(
                [taken[row][2] if row in taken else _fill(rows.prefix(row), length) for row in range(rows.batch_size)]
            )
            batch = scores.new_zeros(rows.batch_size, scores.shape[-1])
            for row, (i, j, _) in taken.items():
                batch[row] = scores[i, j]
            for processor in self.processors:
                if isinstance(processor, _PerRowConstraint):
                    processor.wanted = taken.keys()
            for processor in self.processors:
                one: Any = LogitsProcessorList([processor])
                batch = checked_scores(processor, one(prefixes, batch), batch)
            for row, (i, j, _) in taken.items():
                scores[i, j] = batch[row]


def checked_scores(processor: object, processed: Any, given: Tensor) -> Tensor:
    """What a logits processor returned, if that is what it should.

    Args:
        given: the scores it was given.

    Raises:
        UnsupportedArgumentError: no float tensor of that shape.
    """
    shape = tuple(given.shape)
    if isinstance(processed, Tensor) and processed.shape == shape and processed.is_floating_point():
        return processed
    got = f"{processed.dtype} {tuple(processed.shape)}" if isinstance(processed, Tensor) else repr(processed)
    raise UnsupportedArgumentError(
        f"logits processor {type(processor).__name__}: expected it to return scores, a float tensor {shape}, got {got}"
    )


class _PerRowConstraint(hf.LogitsProcessor):
    """`prefix_allowed_tokens_fn` asked only about the rows in question, each under its own batch index."""

    def __init__(self, inner: hf.PrefixConstrainedLogitsProcessor):
        self.inner = inner
        self.wanted: Collection[int] = ()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = scores.clone()
        for row in self.wanted:
            ask = partial(_asked_about, self.inner._prefix_allowed_tokens_fn, row // self.inner._num_beams)
            one: Any = hf.PrefixConstrainedLogitsProcessor(ask, num_beams=1)
            out[row] = one(input_ids[row : row + 1], scores[row : row + 1])[0]
        return out


_OURS: dict[type, Callable[[Any], hf.LogitsProcessor]] = {
    hf.PrefixConstrainedLogitsProcessor: _PerRowConstraint,
    hf.TopKLogitsWarper: TopK,
    hf.TopPLogitsWarper: TopP,
}
"""What stands in for processors of transformers, and gives the same scores."""


def _asked_about(allowed: Callable[[int, Tensor], list[int]], row: int, _: int, ids: Tensor) -> list[int]:
    return allowed(row, ids)


def _for_rows(processor: hf.LogitsProcessor, origin: list[int]) -> hf.LogitsProcessor:
    """The processor for a call whose row `n` is row `origin[n]` of the batch.

    The repetition penalty ignores each row's own padding (one count per batch row, since transformers 5.2x).
    """
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor):
        return processor
    here: Any = copy.copy(processor)
    here.prompt_ignore_length = ignored[torch.tensor(origin, device=ignored.device)]
    return here


def _path(tokens: list[int], parents: list[int], node: int) -> list[int]:
    """Tokens from below the root down to `node`."""
    path = []
    while node > 0:
        path.append(tokens[node])
        node = parents[node]
    return path[::-1]


def _fill(prefix: Tensor, length: int) -> Tensor:
    """A stand-in prefix of the wanted length for a row whose result is thrown away."""
    if len(prefix) >= length:
        return prefix[:length]
    return torch.cat([prefix, prefix[-1:].expand(length - len(prefix))])
