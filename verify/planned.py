"""Tree passes that tell attention which slots to read instead of masking all of them: meant for GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.base import PassCache
from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.paged_store import PagedStore
from specdec.kv.store import StoreView
from specdec.verify.attention.choose import VARIABLE as BACKEND
from specdec.verify.attention.plan import TreePlan, chain
from specdec.verify.attention.register import NAME, attending
from specdec.verify.forward import TreeForward, ends

GRAPHS = "SPECDEC_GRAPHS"
"""Environment variable: "1" turns CUDA graphs on. They are off until they have been measured on a GPU."""

MAX_NODES = 256
"""Wider passes (prefills) are better served by masked or causal SDPA."""


def forward_for(model: PreTrainedModel, name: str) -> TreeForward:
    """The way to run `model`: masked, unless the environment asks for something that is faster where it was measured.

    An attention backend (see `attention/choose.py`; "auto", the fastest of all, on GPUs only) makes passes planned.
    Nothing that has not been measured on a GPU is on there by default.

    Raises:
        UnsupportedArgumentError: the environment asks for something else than "0" or "1" graphs.
    """
    asked = os.environ.get(GRAPHS, "0")
    if asked not in ("0", "1"):
        raise UnsupportedArgumentError(f"expected {GRAPHS} to be 0 or 1, got {asked!r}")
    cuda = next(model.parameters()).is_cuda
    if cuda and asked == "1" and not hasattr(model, "_hf_hook") and len({w.device for w in model.parameters()}) == 1:
        from specdec.verify.graphed import GraphedForward

        return GraphedForward(model, name)
    backend = os.environ.get(BACKEND)
    if backend and (cuda or backend != "auto"):
        return PlannedForward(model, name)
    return TreeForward(model, name)


class PlannedForward(TreeForward):
    """A `TreeForward` whose passes of up to 256 nodes attend by a `TreePlan`: no mask is built, no page gathered.

    Prefills, and models that compute their attention eagerly, run as ever.
    """

    needs_modules = True

    def causal(
        self, cache: PassCache, tokens: Tensor, starts: Sequence[int], valid: Sequence[int] | None, keep: int
    ) -> Tensor:
        rows, width = tokens.shape
        if not self._plans(width) or not any(starts):
            return super().causal(cache, tokens, starts, valid, keep)
        if valid is not None:
            self._check_positions(ends(starts, valid))
        depths, ancestors = chain(rows, width, tokens.device)
        with cache.writing(self.name, starts, width, valid) as read:
            return self._run_planned(cache, tokens, list(starts), depths, ancestors, keep, read)

    def nodes(self, cache: PassCache, tree_tokens: Tensor, depths: Tensor, ancestors: Tensor, first: int) -> Tensor:
        width = tree_tokens.shape[1]
        if not self._plans(width):
            return super().nodes(cache, tree_tokens, depths, ancestors, first)
        lengths = list(cache.lengths[: cache.num_rows])
        with cache.writing(self.name, [length + first for length in lengths], width) as read:
            return self._run_planned(cache, tree_tokens, lengths, depths, ancestors, 0, read)

    def _plans(self, width: int) -> bool:
        return width <= MAX_NODES and self._config._attn_implementation == NAME  # as `prepared` found fitting

    def _run_planned(
        self, cache: PassCache, tokens: Tensor, lengths: list[int], depths: Tensor, ancestors: Tensor, keep: int,
        read: int,
    ) -> Tensor:  # fmt: skip
        committed = torch.tensor(lengths, dtype=torch.int32).to(tokens.device, non_blocking=True)
        pages = self._pages(cache)
        table = None
        if pages is not None:
            assert pages.plan is not None, "inside writing()"
            table = pages.plan.block_table.to(tokens.device, torch.int32)
        equal = len(set(lengths)) == 1
        plan = TreePlan(committed, ancestors, depths.to(torch.int32), max(lengths), equal, table)
        positions = committed[:, None] + depths[:, depths.shape[1] - tokens.shape[1] :]
        with attending(self.model, plan, self._windows) as mask:
            part = self._part(cache, tokens, positions.long(), mask, keep, read)
            return self._run(part if pages is None else part._replace(view=_PagesView(pages)))

    def _pages(self, cache: PassCache) -> PagedStore | None:
        store = getattr(cache.view(self.name), "store", None)
        return store if isinstance(store, PagedStore) else None


class _PagesView(StoreView):
    """The cache a planned pass sees: it writes as ever and hands out all pages, which the plan's table picks from."""

    def __init__(self, store: PagedStore):
        super().__init__(store)
        self._pages = store

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._pages.put(layer_idx, key_states, value_states)
        return keys.transpose(1, 2), values.transpose(1, 2)
