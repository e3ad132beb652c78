"""One model's K/V in pages: a tensor per layer, addressed by page number, presented to the model as a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kv.layout import Layout, check_layout
from specdec.kv.pages import ZERO_PAGE
from specdec.kv.quantised import Quantised


class PagedStore:
    """Storage `[pages, page_size, kv_heads, head_dim]` per layer, allocated when the layer first writes.

    Shapes, dtype and device are read from the layer's own states. Page 0 is all zeros. Storage grows by a
    sixteenth when it must; a limited pool allocates `most_pages` at once.

    The layout is that of flash-attn's paged cache; quantised, the bytes of a token and head (see `Quantised`) lie where
    its numbers would.

    Attributes:
        capacity: pages there are, the page of zeros included.
        settled: per page, how many of its leading slots hold K/V on which several holders rely. Meaningful for
            shared pages only: those slots are not written again.
        dtype: that of the states, once a layer has written.
    """

    def __init__(
        self,
        num_layers: int,
        page_size: int,
        num_pages: int,
        most_pages: int | None,
        quantised: Quantised | None = None,
    ):
        self.page_size, self.quantised = page_size, quantised
        self.dtype: torch.dtype | None = None
        self.num_layers = num_layers
        self.capacity = num_pages + 1
        self._most = None if most_pages is None else most_pages + 1
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.settled = [0] * self.capacity
        self._unused: set[int] = set()
        self._layout: Layout | None = None

    def layout(self, like: Tensor) -> Layout:
        """Of all pages, without a table: the same object until storage moves.

        Args:
            like: any tensor `[*, kv_heads, *, head_dim]` of the dtype and device of the states.
        """
        known, size, heads, (width, dtype) = self._layout, self.page_size, like.shape[1], self._kept(like)
        strides = (size, size * heads * width, heads * width, width)
        if known is None or known.keys[0].dtype != dtype or known.strides != strides:
            keys, values = zip(*(self.layer(layer, like, like) for layer in range(self.num_layers)), strict=True)
            check_layout((*keys, *values), (self.capacity, size, heads, width), dtype)
            known = self._layout = Layout(keys, values, strides, torch.empty(0, 0, dtype=torch.int64))
        return known

    def read(self, pages: Sequence[int], stop: int) -> list[tuple[Tensor, Tensor]]:
        """Per layer, `(keys, values)` of slots `[0, stop)` of one block table, each `[kv_heads, stop, head_dim]`."""
        out = []
        for keys, values in zip(self.keys, self.values, strict=True):
            if keys is None or values is None:
                break
            index = torch.tensor(list(pages), dtype=torch.int64, device=keys.device)
            both = (self.gathered(tensor, index).flatten(0, 1)[:stop].transpose(0, 1) for tensor in (keys, values))
            out.append((next(both), next(both)))
        return out

    def gathered(self, storage: Tensor, pages: Tensor) -> Tensor:
        """States of those pages of a layer's storage, `[*, page_size, kv_heads, head_dim]`."""
        read = storage.index_select(0, pages)
        return read if self.quantised is None or self.dtype is None else self.quantised.unpack(read, self.dtype)

    def put(self, storage: Tensor, slots: Tensor, states: Tensor) -> None:
        """Write `[*, kv_heads, head_dim]` to those slots of a layer's storage."""
        new = states if self.quantised is None else self.quantised.pack(states)
        storage.flatten(0, 1).index_copy_(0, slots, new)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy slot `sources[i]` to slot `targets[i]`, all layers, in place."""
        source, target = torch.tensor(list(sources)), torch.tensor(list(targets))
        for tensor in self._tensors():
            flat = tensor.flatten(0, 1)
            # The right side is a copy: overlapping moves are safe.
            flat.index_copy_(0, target.to(tensor.device), flat.index_select(0, source.to(tensor.device)))

    def copy_page(self, source: int, target: int) -> None:
        for tensor in self._tensors():
            tensor[target] = tensor[source]

    def renew(self, pages: Sequence[int]) -> None:
        """Zero pages that were just taken: slots behind a row's end are read, hidden, as 0 * value, and what another
        sequence left there may be NaN."""
        self._reserve(max(pages, default=0) + 1)
        self.zero_pages(pages)

    def zero_pages(self, pages: Sequence[int]) -> None:
        """Zero whole pages; nobody relies on anything in them."""
        for page in pages:
            self.settled[page] = 0
        index = torch.tensor(list(pages), dtype=torch.int64)
        for tensor in self._tensors():
            tensor.index_fill_(0, index.to(tensor.device), 0)

    def zero_slots(self, page: int, start: int) -> None:
        """Zero one page from slot `start` of it on."""
        for tensor in self._tensors():
            tensor[page, start:] = 0

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers; 0 until they first write."""
        return sum(tensor[0].nbytes for tensor in self._tensors())

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [tensor for tensor in (*self.keys, *self.values) if tensor is not None]

    def reset(self) -> None:
        """Nobody relies on anything here any more: the next writer's dtype, place and shapes count."""
        self._unused, self._layout = set(range(self.num_layers)), None

    def layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One layer's storage, allocated for states like these."""
        keys, values = self.keys[layer], self.values[layer]
        if layer in self._unused:
            self._unused.remove(layer)
            self.dtype = key.dtype
            if keys is not None and values is not None and not (self._takes(keys, key) and self._takes(values, value)):
                self.keys[layer] = self.values[layer] = keys = values = None
        if keys is None or values is None:
            self.dtype = key.dtype
            with torch.inference_mode(False):  # storage outlives the pass and is written to outside of it
                keys, values = self.keys[layer], self.values[layer] = self._made(key), self._made(value)
        return keys, values

    def _kept(self, states: Tensor) -> tuple[int, torch.dtype]:
        """How wide, and in which dtype, storage is for such states."""
        if self.quantised is None:
            return states.shape[3], states.dtype
        return self.quantised.width(states.shape[3]), torch.int8

    def _made(self, states: Tensor) -> Tensor:
        width, dtype = self._kept(states)
        return states.new_zeros(self.capacity, self.page_size, states.shape[1], width, dtype=dtype)

    def _takes(self, storage: Tensor, states: Tensor) -> bool:
        """Could states `[*, kv_heads, *, head_dim]` be written there?"""
        width, dtype = self._kept(states)
        same = (storage.dtype, storage.device) == (dtype, states.device)
        return same and tuple(storage.shape[2:]) == (states.shape[1], width)

    def _reserve(self, pages: int) -> None:
        if pages <= self.capacity:
            return
        # A sixteenth wastes little memory, and copying all pages once per so many tokens costs less than attention,
        # which reads them for each of those tokens.
        self._layout = None
        more = self.capacity + self.capacity // 16 + 1
        capacity = max(pages, more if self._most is None else min(more, self._most))
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                if tensor is None or tensor.shape[0] >= capacity:
                    continue
                with torch.inference_mode(False):
                    new = tensor.new_zeros(capacity, *tensor.shape[1:])
                new[: tensor.shape[0]] = tensor
                tensors[i] = new
        # Last: if memory ran out on the way, the next attempt grows the tensors that are still small.
        self.settled += [0] * (capacity - self.capacity)
        self.capacity = capacity


assert ZERO_PAGE == 0, "fresh storage is zero, and so is its first page"
