"""One forward pass of an unmodified causal LM over tree nodes, reading and writing the shared cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from specdec.kv.base import PassCache
from specdec.kv.support import text_config
from specdec.kv.versions import CACHE_KEYWORD, cache_argument
from specdec.kv.wrappers import uncompiled
from specdec.verify.attention.register import attention_of
from specdec.verify.direct import DirectPass, direct_pass
from specdec.verify.linear import few_row_linears, is_dense
from specdec.verify.masks import BAND_SLOTS, CausalBand, additive_masks
from specdec.verify.native import NativePass, native_pass
from specdec.verify.observing import observed
from specdec.verify.parts import Part, Text
from specdec.verify.positions import usable_positions, windows_of
from specdec.verify.topology import indices
from specdec.verify.tree import DraftTree

PREFILL_CHUNK = 2048
"""Prompt tokens per prefill pass: bounds the mask and activation memory of long prompts."""
NATIVE_CHUNK = 512
"""The same where passes are native."""


Way = Callable[[Sequence[Part]], list[Tensor]]
"""A way past the model's modules: logits of every part that asks for some."""


def ends(starts: Sequence[int], valid: Sequence[int]) -> list[int]:
    """Tokens that the rows of a pass hold after it; rows that add none place none."""
    return [start + count for start, count in zip(starts, valid, strict=True) if count]


class TreeForward:
    """Runs `model` (a target or a drafter) on the cache named `name`.

    Writes the speculative tail, moves no committed length. Positions are slots plus depth, so siblings share one.
    """

    reads_prompts = True
    """Whether `tree` takes unread tokens along."""
    needs_modules = False
    """Whether its attention is looked up by the model's own modules."""

    def __init__(self, model: PreTrainedModel, name: str):
        self.model = model
        self.name = name
        config = self._config = text_config(model)
        self._band = CausalBand()
        # Offloading hooks create parameters during the pass, which must stay ordinary ones; so must the tensors that
        # make up a quantised weight.
        self._inference = not hasattr(model, "_hf_hook") and all(is_dense(weight) for weight in model.parameters())
        self._direct: DirectPass | NativePass | None = None
        self._windows = windows_of(config)
        parameters = inspect.signature(model.forward).parameters
        self._keep_argument = "logits_to_keep" in parameters
        self._cache_argument = cache_argument(model) or CACHE_KEYWORD
        self.num_positions = usable_positions(config)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Inside the block passes take the fastest way there is to these weights; the model itself is as before.

        A stock Llama-shaped model on a CPU is not called at all (`verify/direct.py`, `verify/native`). Others run with
        the folded attention and few-row linear layers, and are restored afterwards.
        """
        direct = None if self._windows or self.needs_modules else direct_pass(self.model)
        self._direct = direct and (native_pass(direct) or direct)
        try:
            with nullcontext() if self._direct is not None else self._fitted():
                yield
        finally:
            self._direct = None

    @contextmanager
    def _fitted(self) -> Iterator[None]:
        with attention_of(self.model), few_row_linears(self.model), uncompiled(self.model):
            yield

    def prefill(self, cache: PassCache, text: Tensor, starts: Sequence[int], stops: Sequence[int], chunk: int) -> None:
        """Write K/V of tokens `starts[b] .. stops[b] - 1` of each row, in chunks, without keeping any logits.

        Args:
            text: int64 `[rows, >= max(stops)]`, real tokens of the cache's active rows.
            chunk: most tokens per pass.
        """
        done, chunk = list(starts), self.chunk(chunk)
        while any(start < stop for start, stop in zip(done, stops, strict=True)):
            valid = [max(0, min(chunk, stop - start)) for start, stop in zip(done, stops, strict=True)]
            width = max(valid)
            columns = torch.tensor(done, device=text.device)[:, None] + torch.arange(width, device=text.device)
            tokens = text.gather(1, columns.clamp(max=text.shape[1] - 1))
            self.causal(cache, tokens, done, valid, keep=1)
            done = [start + count for start, count in zip(done, valid, strict=True)]

    def chunk(self, most: int) -> int:
        """Tokens of a row to read in one pass: a native one cannot be interrupted, so it should not last."""
        return min(most, NATIVE_CHUNK) if isinstance(self._shortcut(), NativePass) else most

    def causal(
        self, cache: PassCache, tokens: Tensor, starts: Sequence[int], valid: Sequence[int] | None, keep: int
    ) -> Tensor:
        """Plain causal continuation: row `b`'s tokens go to slots from `starts[b]` on.

        Returns:
            logits of the last `keep` columns (0 = all), `[rows, *, vocab]`.
        """
        if valid is not None:
            self._check_positions(ends(starts, valid))
        with cache.writing(self.name, starts, tokens.shape[1], valid) as read:
            return self._run(self._causal_part(cache, tokens, starts, keep, read))

    def _causal_part(
        self, cache: PassCache, tokens: Tensor, starts: Sequence[int], keep: int | None, read: int
    ) -> Part:
        """That pass, once the cache is ready for it."""
        way = self._shortcut()
        if isinstance(way, NativePass) and way.counts_by_itself:
            return Part(tokens, None, None, self._view(cache), keep, read, starts)
        width, device = tokens.shape[1], tokens.device
        same = starts.count(starts[0]) == len(starts)
        if same and read <= BAND_SLOTS:
            positions = self._band.positions(starts[0], width, device)  # a view of a table
            positions = positions if len(starts) == 1 else positions.expand(tokens.shape)
        else:
            positions = torch.tensor(list(starts), device=device)[:, None]
            positions = positions if width == 1 else positions + indices(width, device)
        tabulated = read <= BAND_SLOTS and not self._windows
        if same and (width == 1 or read == width) and ((width == 1 and tabulated) or self._may_skip_mask(read)):
            mask = None  # every token of the pass reads all there is, or SDPA is told that it is causal
        elif tabulated and same:
            mask = self._band.mask(starts[0], width, self._dtype(), device)
        elif tabulated:
            mask = self._band.masks(positions, read, self._dtype())
        else:
            visible = torch.arange(read, device=device) <= positions[:, :, None]
            slots = torch.arange(read, device=device).expand(len(starts), read) if self._windows else None
            mask = additive_masks(visible, positions, slots, self._windows, self._dtype())
        return self._part(cache, tokens, positions, mask, keep, read)

    def nodes(self, cache: PassCache, tree_tokens: Tensor, depths: Tensor, ancestors: Tensor, first: int) -> Tensor:
        """Forward nodes `first .. first + M - 1` of a tree whose earlier nodes are already in the tail.

        Args:
            tree_tokens: int64 `[rows, M]`, the nodes' tokens.
            depths: int64 `[rows, first + M]`, of all nodes so far.
            ancestors: bool `[rows, M, first + M]`, self included.

        Returns:
            logits `[rows, M, vocab]`.
        """
        starts = [length + first for length in cache.lengths[: cache.num_rows]]
        with cache.writing(self.name, starts, tree_tokens.shape[1]) as read:
            return self._run(self._nodes_part(cache, tree_tokens, depths, ancestors, first, read))

    def _nodes_part(
        self, cache: PassCache, tree_tokens: Tensor, depths: Tensor, ancestors: Tensor, first: int, read: int
    ) -> Part:
        """That pass, once the cache is ready for it."""
        lengths = cache.lengths[: cache.num_rows]
        width, device = tree_tokens.shape[1], tree_tokens.device
        committed = torch.tensor(lengths, device=device)[:, None]
        positions = committed + depths[:, first:]
        slots = torch.arange(read, device=device)
        visible = (slots < committed)[:, None, :].expand(-1, width, -1).contiguous()
        tail = (committed + torch.arange(first + width, device=device))[:, None, :].expand(-1, width, -1)
        visible.scatter_(2, tail, ancestors)
        slot_positions = None
        if self._windows:
            # A tail slot's position is its node's depth, not its index; nodes of a level share a position.
            slot_positions = slots.expand(len(lengths), read).clone()
            slot_positions.scatter_(1, tail[:, 0], committed + depths)
        masks = additive_masks(visible, positions, slot_positions, self._windows, self._dtype())
        return self._part(cache, tree_tokens, positions, masks, 0, read)

    def tree(self, cache: PassCache, tree: DraftTree, unread: Tensor | None = None) -> Tensor:
        """One pass over every node of every row; logits `[rows, nodes, vocab]`.

        Args:
            unread: int64 `[rows, U]`, committed tokens before a chain whose K/V this pass writes as well.
        """
        starts = cache.lengths[: cache.num_rows]
        self._check_positions([start + 1 for start in starts])
        if unread is not None:
            width = unread.shape[1]
            tokens = torch.cat([unread, tree.tokens], dim=1)
            return self.causal(cache, tokens, [start - width for start in starts], None, keep=tree.tokens.shape[1])
        if tree.is_shared_chain:
            return self.causal(cache, tree.tokens, starts, None, keep=0)
        return self.nodes(cache, tree.tokens, tree.depths, tree.ancestor_mask, 0)

    def together(self, cache: PassCache, tree: DraftTree, texts: Sequence[Text]) -> Tensor:
        """What `tree`, and `causal` for each of `texts` (of other rows), do; in one pass where the model allows it: its
        weights are read once, and no row is padded to the width of a longer text.

        Returns:
            logits of the tree's nodes, `[rows, nodes, vocab]`.
        """
        if self._shortcut() is None or not texts:
            logits = self.tree(cache, tree)
            for text in texts:
                self.causal(*text, keep=1)
            return logits
        starts = cache.lengths[: cache.num_rows]
        self._check_positions([length + 1 for length in starts])
        with ExitStack() as stack:

            def pinned(part: Part) -> Part:
                return part._replace(view=part.view.pinned())

            read = stack.enter_context(cache.writing(self.name, starts, tree.tokens.shape[1]))
            if tree.is_shared_chain:
                parts = [pinned(self._causal_part(cache, tree.tokens, starts, 0, read))]
            else:
                parts = [pinned(self._nodes_part(cache, tree.tokens, tree.depths, tree.ancestor_mask, 0, read))]
            for text in texts:
                if text.valid is not None:
                    self._check_positions(ends(text.starts, text.valid))
                read = stack.enter_context(text.cache.writing(self.name, text.starts, text.tokens.shape[1], text.valid))
                parts.append(pinned(self._causal_part(text.cache, text.tokens, text.starts, None, read)))
            return self._run(*parts)

    def _part(
        self, cache: PassCache, tokens: Tensor, positions: Tensor, mask: Any, keep: int | None, read: int
    ) -> Part:
        if self.num_positions is not None:
            # Drafted nodes and padding beyond the table can never be emitted: any position will do for them.
            positions = positions.clamp(max=self.num_positions - 1)
        return Part(tokens, positions, mask, self._view(cache), keep, read)

    def _run(self, *parts: Part) -> Tensor:
        """The first part's logits. Only the direct pass takes several."""
        start = perf_counter()
        with torch.inference_mode(self._inference):  # spares every operation its autograd bookkeeping
            direct = self._shortcut()
            logits = direct(parts)[0] if direct is not None else self._call_model(*parts)
        observed(self.model, perf_counter() - start)
        return logits

    def _shortcut(self) -> Way | None:
        """The direct pass, until a hook is put on the model in the middle of a call."""
        if self._direct is not None and self._direct.hooked:
            self._direct = None
        return self._direct

    def _call_model(self, part: Part) -> Tensor:
        if part.positions is None:
            raise RuntimeError(f"{type(self.model).__name__} was changed (a hook?) while a pass of it was prepared")
        keep = part.keep
        extra: dict[str, Any] = {self._cache_argument: part.view}
        if keep and self._keep_argument:
            extra["logits_to_keep"] = keep
        out = self.model(
            input_ids=part.tokens,
            position_ids=part.positions,
            attention_mask=part.mask,
            use_cache=True,
            return_dict=True,
            **extra,
        )
        logits: Tensor = out.logits
        return logits[:, -keep:] if keep else logits

    def _view(self, cache: PassCache) -> Cache:
        """What the model reads and writes through."""
        return cache.view(self.name)

    def _dtype(self) -> torch.dtype:
        embeddings: Any = self.model.get_input_embeddings()
        dtype: torch.dtype = embeddings.weight.dtype
        return dtype

    def _check_positions(self, counts: Sequence[int]) -> None:
        """Refuse real tokens beyond the last usable position (on a GPU a table look-up there kills the context)."""
        if self.num_positions is not None and max(counts, default=0) > self.num_positions:
            raise ValueError(
                f"{type(self.model).__name__} has {self.num_positions} positions (learned, or before its rotary "
                f"frequencies start to depend on the length of the pass), but a row holds {max(counts)} tokens: "
                "shorten the prompt or lower max_new_tokens"
            )

    def _may_skip_mask(self, read: int) -> bool:
        eager = self._config._attn_implementation == "eager"
        return not eager and all(window is None or read <= window for window in self._windows.values())
