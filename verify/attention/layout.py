"""Which K/V slots the nodes of one pass see: laid out once a pass, read by every layer and every backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.kv.errors import UnsupportedArgumentError


@dataclass(frozen=True)
class TreeLayout:
    """Which K/V slots each node sees: its row's committed slots, and its ancestors in the tail behind them.

    Column `j` of the tail lies in slot `lengths[row] + j`; the pass's queries are the last `nodes` of its columns.
    K/V is contiguous, `[rows, kv_heads, slots, head_dim]`, or, with a `table`, paged: `[pages, kv_heads, page_size,
    head_dim]` (any strides), slot `s` of row `b` lying in page `table[b, s // page_size]`.

    Attributes:
        lengths: int32 `[rows]`, committed slots; read by the kernels on the device, never brought to the host.
        ancestors: bool `[rows or 1, nodes, tail]`, self included.
        depths: int32 `[rows or 1, tail]`, of the tail's columns (sliding windows count positions, not slots).
        longest: at least `max(lengths)`, known to the host.
        equal: every row has exactly `longest` committed slots.
        table: int32 `[rows, >= pages of the longest row]`, or None.
    """

    lengths: Tensor
    ancestors: Tensor
    depths: Tensor
    longest: int
    equal: bool = False
    table: Tensor | None = None
    _windows: dict[int, Window] = field(default_factory=dict, repr=False, compare=False)
    _copies: dict[torch.device, TreeLayout] = field(default_factory=dict, repr=False, compare=False)
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: torch.device) -> TreeLayout:
        """The same on another device (models spread over several)."""
        if self.lengths.device == device:
            return self
        if device not in self._copies:
            table = None if self.table is None else self.table.to(device)
            lengths, ancestors, depths = (own.to(device) for own in (self.lengths, self.ancestors, self.depths))
            self._copies[device] = TreeLayout(lengths, ancestors, depths, self.longest, self.equal, table)
        return self._copies[device]

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    @property
    def nodes(self) -> int:
        return self.ancestors.shape[1]

    @property
    def tail(self) -> int:
        return self.ancestors.shape[2]

    @property
    def read(self) -> int:
        """Slots behind which no node of any row sees anything."""
        return self.longest + self.tail

    def window(self, size: int) -> Window:
        """What a layer sees that looks back `size` positions, its own included."""
        if size not in self._windows:
            own = self.depths[:, self.tail - self.nodes :]
            near = own[:, :, None] - self.depths[:, None, :] < size
            floors = (self.lengths[:, None] + own - (size - 1)).clamp(min=0).to(torch.int32)
            self._windows[size] = Window(self.ancestors & near, floors)
        return self._windows[size]

    def seen(self, window: int | None) -> tuple[Tensor, Tensor | None]:
        """`(ancestors, floors)` of a layer: floors int32 `[rows, nodes]` is the first committed slot in sight."""
        if window is None:
            return self.ancestors, None
        view = self.window(window)
        return view.ancestors, view.floors

    def visible(self, slots: int, window: int | None = None) -> Tensor:
        """Bool `[rows, nodes, slots]`: which of the leading `slots` slots each node sees."""
        ancestors, floors = self.seen(window)
        slot = torch.arange(slots, device=self.lengths.device)
        column = slot - self.lengths[:, None]  # [rows, slots]; negative where committed
        committed = (column < 0)[:, None, :].expand(-1, self.nodes, -1)
        if floors is not None:
            committed = committed & (slot >= floors[:, :, None])
        inside = (column >= 0) & (column < self.tail)
        index = column.clamp(0, self.tail - 1)[:, None, :].expand(-1, self.nodes, -1)
        drafted = ancestors.expand(self.rows, -1, -1).gather(2, index.long()) & inside[:, None, :]
        return committed | drafted

    def mask(self, slots: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """Additive `[rows, 1, nodes, slots]`, made once per pass.

        Its storage is padded to a multiple of 16 columns: memory-efficient attention wants aligned rows.
        """
        key = (slots, dtype, window)
        if key not in self._masks:
            wide = torch.zeros(self.rows, 1, self.nodes, -(-slots // 16) * 16, dtype=dtype, device=self.lengths.device)
            mask = wide[..., :slots]
            self._masks[key] = mask.masked_fill_(~self.visible(slots, window)[:, None], torch.finfo(dtype).min)
        return self._masks[key]

    def contiguous(self, states: Tensor) -> Tensor:
        """K or V as `[rows, kv_heads, read or more, head_dim]`; pages are gathered (a copy)."""
        if self.table is None:
            return states
        size = states.shape[2]
        pages = self.table[:, : -(-self.read // size)].long()
        return states[pages].transpose(1, 2).flatten(2, 3)

    def tail_states(self, states: Tensor) -> Tensor:
        """K or V of the tail, `[rows, kv_heads, tail, head_dim]`: a view where rows are equally long and contiguous."""
        if self.table is None and self.equal:
            return states[: self.rows, :, self.longest : self.read]
        rows = torch.arange(self.rows, device=states.device)[:, None]
        slots = self.lengths[:, None].long() + torch.arange(self.tail, device=states.device)
        if self.table is None:
            return states[rows, :, slots].transpose(1, 2)
        size = states.shape[2]
        return states[self.table[rows, slots // size].long(), :, slots % size].transpose(1, 2)

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Refuse shapes that do not fit together.

        Raises:
            UnsupportedArgumentError: naming the first mismatch.
        """
        rows, heads, nodes, size = query.shape
        problem = None
        if rows != self.rows or nodes != self.nodes:
            problem = f"the plan is of {self.rows} rows of {self.nodes} nodes, the queries of {rows} rows of {nodes}"
        elif heads % key.shape[1] or key.shape[1] != value.shape[1]:
            problem = f"{heads} query heads do not share {key.shape[1]} key and {value.shape[1]} value heads"
        elif key.shape[3] != size:
            problem = f"queries have head_dim {size}, keys {key.shape[3]}"
        elif self.ancestors.shape[0] not in (1, rows):
            problem = f"expected ancestors of 1 or {rows} rows, got {self.ancestors.shape[0]}"
        elif self.table is None and (key.shape[0] < rows or key.shape[2] < self.read):
            problem = f"expected K/V of {rows} rows and {self.read} slots, got {key.shape[0]} and {key.shape[2]}"
        elif self.table is not None and self.table.shape[1] * key.shape[2] < self.read:
            problem = f"{self.table.shape[1]} pages of {key.shape[2]} slots do not hold {self.read} slots"
        if problem is not None:
            raise UnsupportedArgumentError(f"tree attention: {problem}; build the plan from the pass it is used in")


@dataclass(frozen=True)
class Window:
    """A sliding window's view of a pass: ancestors `[rows, nodes, tail]` near enough, first committed slot in sight."""

    ancestors: Tensor
    floors: Tensor
