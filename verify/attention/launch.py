"""Launches the Triton kernels: block sizes, the number of splits, and what they can serve. Imports no Triton itself."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.attention.layout import TreeLayout

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels compute: 16-bit tiles through tensor cores, float32 in IEEE arithmetic (no TF32)."""

MAX_HEAD_DIM = 256
MAX_SPLITS = 64


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one launch. `block_m` folded queries at a time, `block_n` slots at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @staticmethod
    def of(queries: int, head_dim: int, dtype: torch.dtype) -> Tiles:
        """Tiles for `queries` folded queries, as large as registers allow without spilling (see test_kernels.py)."""
        size, short = _power_of_two(head_dim), dtype.itemsize == 2
        # IEEE float32 products run outside the tensor cores, unrolled: small tiles.
        widest = 16 if not short else 64 if size <= 128 else 32
        block_m = min(widest, max(16, _power_of_two(queries)))
        block_n = max(16, min(64, (8192 if short else 2048) // size))
        return Tiles(block_m, block_n, 8 if block_m == 64 else 4, 2)


def triton_serves(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the Triton kernels cannot serve these states; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package `triton` is not installed (pip install 'specdec-lm[kernels]')"
    if not query.is_cuda and not interpreting():
        return f"they run on CUDA devices (tensors are on {query.device})"
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"they compute bfloat16, float16 or float32, not {query.dtype} with {key.dtype} and {value.dtype} K/V"
    if max(key.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        return f"they hold head dimensions up to {MAX_HEAD_DIM}, not {max(key.shape[3], value.shape[3])}"
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        return "the last dimension of queries, keys and values must be dense"
    return None


def interpreting() -> bool:
    """Is Triton told to interpret its kernels on the CPU?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    scale: float,
    window: int | None = None,
    *,
    splits: int | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Tree attention in one Triton kernel (two with more than one split); see `TreeLayout`.

    Args:
        query: `[rows, heads, nodes, head_dim]`; key, value: contiguous or paged.
        splits: K/V splits, a power of two; by default enough to fill the device. Results depend on it in the last
            bits, so it is chosen from shapes alone, never from a row's length.

    Returns:
        `[rows, nodes, heads, value's head_dim]`, the query's dtype.

    Raises:
        UnsupportedArgumentError: the kernels cannot serve these states, and why.
    """
    layout.check(query, key, value)
    reason = triton_serves(query, key, value)
    if reason is not None:
        raise UnsupportedArgumentError(f"the Triton kernels cannot serve this: {reason}; choose another backend")
    from specdec.verify.attention.kernel import combine_kernel, tree_attention_kernel

    rows, heads, nodes, size = query.shape
    kv_heads, value_size = key.shape[1], value.shape[3]
    groups = heads // kv_heads
    tiles = tiles or Tiles.of(groups * nodes, max(size, value_size), query.dtype)
    query_blocks = -(-groups * nodes // tiles.block_m)
    if splits is None:
        splits = num_splits(rows * kv_heads * query_blocks, -(-layout.longest // tiles.block_n), query.device)
    elif splits < 1 or splits & (splits - 1):
        raise UnsupportedArgumentError(f"splits must be a power of two, got {splits}")
    ancestors, floors = layout.seen(window)
    seen = ancestors.expand(rows, -1, -1).view(torch.uint8)
    seen = seen if seen.stride(2) == 1 else seen.contiguous()
    out = query.new_empty(rows, nodes, heads, value_size)
    parts, lse = out, out  # unused with one split
    if splits > 1:
        parts = query.new_empty(splits, rows, nodes, heads, value_size, dtype=torch.float32)
        lse = query.new_empty(splits, rows, nodes, heads, dtype=torch.float32)
    table, page = (layout.lengths, 0) if layout.table is None else (layout.table, key.shape[2])
    constants = compiled_constants(kv_heads, groups, size, value_size, tiles, splits, page, floors is not None)
    tree_attention_kernel[rows * kv_heads, splits, query_blocks](
        query, key, value, out, parts, lse, layout.lengths, seen, layout.lengths if floors is None else floors, table,
        scale * math.log2(math.e), nodes, layout.tail,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:2], *seen.stride()[:2],
        0 if floors is None else floors.stride(0), 0 if layout.table is None else table.stride(0),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **constants,
    )  # fmt: skip
    if splits > 1:
        lines = rows * nodes * heads
        combine_kernel[lines,](parts, lse, out, lines, value_size, constants["BLOCK_DV"], splits, num_warps=2)
    return out


def compiled_constants(
    kv_heads: int, groups: int, size: int, value_size: int, tiles: Tiles, splits: int, page: int, floors: bool
) -> dict[str, Any]:
    """What the kernel is compiled for. The number of nodes, of rows and of slots is none of it."""
    return {
        "KV_HEADS": kv_heads,
        "GROUPS": groups,
        "D": size,
        "DV": value_size,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": max(16, _power_of_two(size)),
        "BLOCK_DV": max(16, _power_of_two(value_size)),
        "SPLITS": splits,
        "PAGE": page,
        "FLOORS": floors,
        "PRECISION": "ieee",
    }


def num_splits(programs: int, blocks: int, device: torch.device) -> int:
    """Splits of the committed slots: enough programs for two waves, at least two blocks per split, a power of two."""
    wanted = 2 * _processors(device) / max(1, programs)
    most = min(wanted, blocks / 2, MAX_SPLITS)
    return 1 if most < 2 else 2 ** int(math.log2(most))


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
