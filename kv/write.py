"""`Write`: what one forward pass reads and writes, bound to that pass; and how an unmodified model sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from specdec.kv.layout import Layout
from specdec.kv.quantised import Quantised


class Write(ABC):
    """The K/V of one pass of one model: row `b` of the pass writes slots `starts[b] .. starts[b] + width - 1`.

    Made by `PassCache.writing`, valid inside its block. Several may be open at once, over disjoint rows.

    Attributes:
        starts: per row, the slot of its first column.
        width: columns of the pass.
        valid: per row, how many leading columns are real; None for all. The others are padding.
        read: slots that attention reads, `[0, read)`.
        table: int64 `[rows, pages]`, where attention may follow pages itself; None where it reads contiguous K/V.
        quantised: how K/V is kept, None for as it is computed: `update` gives what is read, the layout says bytes.
        store: the contiguous storage, for passes that address it by slot; None where there are pages, or other rows.
    """

    starts: Sequence[int]
    width: int
    valid: Sequence[int] | None
    read: int
    table: Tensor | None = None
    quantised: Quantised | None = None
    store: Any = None
    num_layers: int

    @property
    def num_rows(self) -> int:
        return len(self.starts)

    @abstractmethod
    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new states `[rows, kv_heads, width, head_dim]`.

        Returns:
            keys and values `[rows, kv_heads, read, head_dim]`.
        """

    @abstractmethod
    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `update`, for attention that follows `table` itself: returns all pages `[pages, kv_heads, page_size,
        head_dim]`, or what `update` returns where there are none."""

    @abstractmethod
    def layout(self, like: Tensor) -> Layout:
        """For a pass that reads and writes by addresses.

        Args:
            like: any tensor `[*, kv_heads, *, head_dim]` of the dtype and device of the states.
        """

    @abstractmethod
    def row(self, row: int, width: int) -> Write:
        """One row's part alone, padded to `width` columns (at least its own); valid as long as this one."""

    def view(self, pages: bool = False) -> PassView:
        """The `transformers` cache through which an unmodified model writes.

        Args:
            pages: its attention follows `table` itself.
        """
        return PassView(self, self.put if pages else self.update)


class PassView(Cache):
    """What an unmodified `transformers` model sees during one pass: a cache whose `update` writes where it is told."""

    def __init__(self, write: Write, update: Any):
        super().__init__(layers=[_Layer(write, update, i) for i in range(write.num_layers)])
        self._update = update

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        written: tuple[Tensor, Tensor] = self._update(layer_idx, key_states, value_states)
        return written


class _Layer(CacheLayerMixin):
    """The per-layer face some models ask for."""

    is_sliding = False
    is_compileable = False

    def __init__(self, write: Write, update: Any, index: int):
        super().__init__()
        self._write, self._update, self._index = write, update, index
        self.is_initialized = True

    def lazy_initialization(self, *args: Any) -> None:
        """Nothing to do: the storage is allocated by the first write."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        written: tuple[Tensor, Tensor] = self._update(self._index, key_states, value_states)
        return written

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._write.read, 0

    def get_seq_length(self) -> int:
        return self._write.read - self._write.width

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        # The name transformers 5.17 still calls.
        return -1
