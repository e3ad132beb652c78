"""The contract every KV layout keeps (contiguous now, paged behind the same methods)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from specdec.kv.errors import CacheStateError
from specdec.kv.quantised import Quantised
from specdec.kv.write import Write


class PassCache(ABC):
    """What a forward pass needs of a cache: where its rows stand, and a place to write to."""

    num_rows: int
    """Rows that still take part in forward passes; retired rows lie behind them."""

    lengths: list[int]
    """Committed tokens per storage row. Host integers: they are needed on the host every step anyway."""

    quantised: Quantised | None = None
    """How K/V is kept; None for as it is computed."""

    @abstractmethod
    def row(self, row: int) -> PassCache:
        """One active row alone, as a cache of one row: for passes that must not depend on the rows around it."""

    @abstractmethod
    def writing(
        self, name: str, starts: Sequence[int], width: int, valid: Sequence[int] | None = None
    ) -> AbstractContextManager[Write]:
        """One forward pass of `name`: row `b` writes slots `starts[b] .. starts[b] + width - 1`.

        Yields where the pass reads and writes. `valid[b]` (default `width`) says how many of the written columns are
        real; the rest is right padding. A row without a real column is in the pass for its shape only: whatever it
        holds below `starts[b]` stays, and so does its `filled`. `filled` moves only when the block ends without an
        exception.

        Raises:
            CacheStateError: a start that would leave a hole (`starts[b] > filled[b]`) or a wrong number of rows.
        """


class KVCache(PassCache):
    """K/V of several models over the same sequences: one length rule, one commit, one rollback.

    A *slot* is a token's position in its row's text (pads own no slot), so slot == position for every committed
    token. Node `i` of a draft tree lives in slot `lengths[row] + i` of the speculative tail until `commit`
    moves the kept nodes down or `rollback` forgets them.

    A model may lag: `filled(name)[row] <= lengths[row]` means its K/V of the missing tokens must be written
    before it can draft again. Slots below `lengths` are never rewritten by commit or rollback.

    A model may **borrow** the storage of another (the target drafting for itself): it reads the owner's committed K/V,
    of as many leading layers as it has, and writes its own tail into the same slots, where the owner's next pass
    overwrites it. It can write nothing else, nothing of its tail is ever kept. Whichever of them a pass is of, it costs
    the others what they hold from its first slots on, also where it fails or those slots are padding.
    """

    @abstractmethod
    def filled(self, name: str) -> list[int]:
        """Leading slots per row that hold valid K/V of model `name` (committed plus tail)."""

    @abstractmethod
    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep tail slots `lengths[b] + paths[b][i]` in path order for every model, drop the rest of the tail.

        Mutates `lengths` (plus `len(paths[b])`). One in-place gather per layer, and none at all for paths that
        are already in place (`0, 1, 2, ...`).
        """

    @abstractmethod
    def place(self, name: str, slots: Sequence[Sequence[int]]) -> None:
        """Until the next commit or rollback, model `name` holds node `i` of row `b` in tail slot `slots[b][i]`.

        For drafters that run nodes in another order than they propose them: -1, or a missing entry, says that the
        node was not run. Moves nothing; `commit` looks there for the kept nodes.
        """

    @abstractmethod
    def rollback(self) -> None:
        """Drop the speculative tail of every model. Moves counters only."""

    @abstractmethod
    def set_length(self, row: int, length: int) -> None:
        """Declare `length` committed tokens (after a prefill or an adopted cache); models may lag behind it."""

    @abstractmethod
    def truncate(self, row: int, length: int) -> None:
        """Forget committed slots from `length` on (a run cut by a stop rule)."""

    @abstractmethod
    def scrub(self, name: str) -> None:
        """Zero what model `name` stored beyond the committed slots, and drop it: hidden slots still enter the
        softmax-weighted sum as 0 * value, and 0 * NaN is NaN."""

    @abstractmethod
    def forget(self, name: str) -> None:
        """Drop everything model `name` stored (its K/V may be poisoned); it lags from zero and refills later."""

    @abstractmethod
    def retire(self, row: int) -> None:
        """Swap `row` behind the active rows and shrink `num_rows`; the last active row takes its place."""

    @abstractmethod
    def revive(self) -> None:
        """Make every retired row active again, where it lies."""

    @abstractmethod
    def fork(self, repeats: int) -> None:
        """Replace each row by `repeats` copies of itself, adjacent (`repeat_interleave`), once, after a prefill."""

    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes allocated for K/V of all models."""

    @abstractmethod
    def layers(self, name: str, row: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer, the committed `(keys, values)` of one row, each `[kv_heads, lengths[row], head_dim]`."""


def kept_slots(path: Sequence[int], have: int, places: Sequence[int] | None) -> list[int]:
    """Where a model holds the nodes of `path`, as far as it has them without a gap.

    Args:
        path: node indices, root first.
        have: slots the model filled in the tail.
        places: tail slot of each node where they differ from the node's index (see `KVCache.place`).

    Returns:
        tail slots of the leading nodes of the path: a drafter never ran its deepest ones.
    """
    slots = path if places is None else [places[node] if node < len(places) else -1 for node in path]
    kept = next((i for i, slot in enumerate(slots) if not 0 <= slot < have), len(slots))
    return list(slots[:kept])


def owners_of(num_layers: Mapping[str, int], borrows: Mapping[str, str]) -> dict[str, str]:
    """Whose storage each model uses: its own, or that of the model it borrows from.

    Raises:
        CacheStateError: a model that borrows from none, from a borrower, or more layers than there are.
    """
    for name, owner in borrows.items():
        if (
            name not in num_layers
            or owner not in num_layers
            or owner in borrows
            or num_layers[name] > num_layers[owner]
        ):
            raise CacheStateError(
                f"expected {name!r} to borrow from a model with storage of its own and at least as many layers, got "
                f"{owner!r} among {dict(num_layers)}"
            )
    return {name: borrows.get(name, name) for name in num_layers}
