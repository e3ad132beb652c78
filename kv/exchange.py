"""Exchange with `transformers` caches: adopt a caller's cache, hand one back that it understands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from specdec.kv.base import KVCache
from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.versions import CACHE_KEYWORD


def cached_tokens(cache: Cache) -> int:
    """Columns (pads included) a caller's cache holds."""
    return int(cache.get_seq_length())


def check_adoptable(cache: object, rows: int) -> DynamicCache:
    """Refuse a caller's cache that cannot be read completely and extended in place.

    Raises:
        UnsupportedArgumentError: not a `DynamicCache` itself (quantised, static, offloading ones and users' own kinds
            are not), not `rows` rows, or its sliding layers already dropped tokens.
    """
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        kind = "one that offloads" if type(cache) is DynamicCache else type(cache).__name__
        raise UnsupportedArgumentError(
            f"{CACHE_KEYWORD}: expected a transformers DynamicCache, got {kind}. Pass a DynamicCache "
            f"(it is what `generate` returns), or leave {CACHE_KEYWORD} out."
        )
    layers: list[Any] = cache.layers  # a union of layer kinds, told apart by what they hold
    for i, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedArgumentError(
                f"{CACHE_KEYWORD}: expected layers that hold plain K/V, layer {i} is a {type(layer).__name__}. Build "
                "the cache as a plain DynamicCache()."
            )
        batch = layer.keys.shape[0] if layer.is_initialized and layer.keys is not None and layer.keys.numel() else rows
        if batch != rows:
            raise UnsupportedArgumentError(f"{CACHE_KEYWORD} holds {batch} rows but input_ids has {rows}.")
        held = layer.keys.shape[-2] if layer.is_initialized and layer.keys is not None and layer.keys.numel() else 0
        if held != int(layer.get_seq_length()):
            raise UnsupportedArgumentError(
                f"{CACHE_KEYWORD}: layer {i} ({type(layer).__name__}) holds only the last {held} of "
                f"{int(layer.get_seq_length())} tokens; a cache that dropped tokens cannot be rolled back. "
                f"Generate without {CACHE_KEYWORD}, or build the cache as a plain DynamicCache()."
            )
    return cache


def adopt(shared: KVCache, name: str, cache: DynamicCache, real: torch.Tensor) -> None:
    """Copy a caller's K/V into the shared storage, dropping pad columns.

    Args:
        real: bool `[rows, columns]`, which columns of the caller's cache are real tokens.

    Mutates `shared`: `filled(name)` becomes the number of real columns per row. The caller's cache is not changed.
    """
    counts = [int(count) for count in real.sum(dim=1).tolist()]
    width = max(counts, default=0)
    if width == 0:
        return
    # Order each row's real columns first; what follows is junk beyond `filled`.
    order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)[:, :width]
    layers: list[Any] = cache.layers
    with shared.writing(name, [0] * shared.num_rows, width, counts) as write:
        for i, layer in enumerate(layers):
            if layer.keys is None or layer.values is None:
                continue
            index = order.to(layer.keys.device)[:, None, :, None]
            key = layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
            value = layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
            write.update(i, key, value)


def export(
    shared: KVCache,
    name: str,
    storage_rows: Sequence[int],
    columns: torch.Tensor,
    width: int,
    into: DynamicCache | None = None,
) -> DynamicCache:
    """Write committed K/V into a `DynamicCache` in the padded layout of `generate`'s sequences.

    Args:
        storage_rows: for each output row, where it lies in `shared` (rows move when others retire).
        columns: int64 `[rows, tokens]`, the padded column of each real token of a row (tokens beyond a row's
            own length are ignored).
        width: columns of the result, `sequences.shape[1] - 1` as plain `generate` leaves it.
        into: a caller's cache to extend in place; a new one is made when None.

    What a caller's cache held already stays as it is, pads included; new columns that no real token owns (pads) are
    zero, and every attention mask hides them. Nothing of `into` is changed before all layers are assembled.
    """
    out = DynamicCache() if into is None else into
    held = [list(shared.layers(name, source)) for source in storage_rows]
    assembled = [_padded(layers, columns, width, _own(out, i)) for i, layers in enumerate(zip(*held, strict=True))]
    for i, (keys, values) in enumerate(assembled):
        if into is None or i >= len(out.layers):
            out.update(keys, values, i)
            continue
        layer: Any = out.layers[i]
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if getattr(layer, "is_sliding", False):  # such a layer holds its window and counts what it saw
            keep = min(width, layer.sliding_window - 1)
            layer.keys, layer.values = (tensor[:, :, width - keep :] for tensor in (keys, values))
            layer.cumulative_length = width
    return out


def _own(cache: DynamicCache, i: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Keys and values that layer `i` of a caller's cache holds already (see `check_adoptable`: of every column)."""
    layer: Any = cache.layers[i] if i < len(cache.layers) else None
    if layer is None or not layer.is_initialized or layer.keys is None or not layer.keys.numel():
        return None, None
    return layer.keys, layer.values


def _padded(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    columns: torch.Tensor,
    width: int,
    own: tuple[torch.Tensor | None, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's keys and values `[rows, heads, width, head_dim]`, from those of every row and the caller's own."""
    both = []
    for tensors, before in zip(zip(*layers, strict=True), own, strict=True):  # the keys of all rows, then the values
        first = tensors[0]
        fresh = first.new_zeros(len(tensors), first.shape[0], width, first.shape[2])
        for row, tensor in enumerate(tensors):
            target = columns[row, : tensor.shape[1]].to(tensor.device)
            inside = target < width
            fresh[row, :, target[inside]] = tensor[:, inside]
        if before is not None:
            fresh[:, :, : before.shape[2]] = before
        both.append(fresh)
    return both[0], both[1]
