"""The Triton kernels of tree attention: split-KV, query heads folded onto their K/V head, lengths read on the device.

Importing this module imports Triton. `TRITON_INTERPRET=1`, set before Triton is first imported, runs it on a CPU.
Method: FlashAttention's online softmax, split over K/V as in Flash-Decoding (Dao et al. 2023), with an ancestor mask.
"""

from __future__ import annotations

# Type annotations in kernels are read by Triton; constexpr ones decide what is compiled.
import triton
import triton.language as tl


@triton.jit
def _slots_to_offsets(slots, inside, table_ptr, row, stride_row, stride_slot, stride_table, PAGE: tl.constexpr):
    """Element offsets of K/V slots: in the row's own stretch, or through the block table."""
    if PAGE == 0:
        return row * stride_row + slots.to(tl.int64) * stride_slot
    page = tl.load(table_ptr + row * stride_table + slots // PAGE, mask=inside, other=0).to(tl.int64)
    return page * stride_row + (slots % PAGE).to(tl.int64) * stride_slot


@triton.jit
def _fold_in(
    query, acc, best, total, slots, visible, inside, key_ptr, value_ptr, table_ptr, row, scale_log2,
    key_row, key_slot, value_row, value_slot, stride_table,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of K/V into the running softmax: `acc`, `best` (largest score, base 2) and `total`."""
    dims = tl.arange(0, BLOCK_D)
    offsets = _slots_to_offsets(slots, inside, table_ptr, row, key_row, key_slot, stride_table, PAGE)
    keys = tl.load(key_ptr + offsets[None, :] + dims[:, None], mask=inside[None, :] & (dims[:, None] < D), other=0.0)
    scores = tl.dot(query, keys, input_precision=PRECISION) * scale_log2
    scores = tl.where(visible, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    # A row that has seen nothing yet keeps -inf; its exponents must not be -inf - (-inf).
    anchor = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - anchor[:, None])
    decay = tl.exp2(best - anchor)
    dims_v = tl.arange(0, BLOCK_DV)
    offsets = _slots_to_offsets(slots, inside, table_ptr, row, value_row, value_slot, stride_table, PAGE)
    values = tl.load(
        value_ptr + offsets[:, None] + dims_v[None, :], mask=inside[:, None] & (dims_v[None, :] < DV), other=0.0
    )
    acc = acc * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return acc, new_best, total * decay + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["nodes", "tail", "stride_table"])
def tree_attention_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, part_ptr, lse_ptr, lengths_ptr, seen_ptr, floors_ptr, table_ptr,
    scale_log2, nodes, tail,
    query_row, query_head, query_node, key_row, key_head, key_slot, value_row, value_head, value_slot,
    out_row, out_node, seen_row, seen_node, floors_row, stride_table,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLITS: tl.constexpr, PAGE: tl.constexpr, FLOORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of `BLOCK_M` folded queries of one row and K/V head over one split of the row's slots.

    Grid: (rows * KV_HEADS, SPLITS, query blocks). Folded query `m` is node `m % nodes` of query head `m // nodes` of
    the K/V head. Splits divide the committed slots, as they are on the device; the last one also takes the tail.
    With one split the result goes to `out`, else normalised float32 parts and their base-2 log-sum-exps are left for
    `combine_kernel`.
    """
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    folded = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = folded < GROUPS * nodes
    node = folded % nodes
    head = (kv_head * GROUPS + folded // nodes).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    query = tl.load(
        query_ptr + row * query_row + (head * query_head + node * query_node)[:, None] + dims[None, :],
        mask=real[:, None] & (dims[None, :] < D),
        other=0.0,
    )
    key_ptr += kv_head.to(tl.int64) * key_head
    value_ptr += kv_head.to(tl.int64) * value_head
    length = tl.load(lengths_ptr + row).to(tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    start = 0
    floors = tl.zeros([BLOCK_M], dtype=tl.int32)
    if FLOORS:
        floors = tl.load(floors_ptr + row * floors_row + node, mask=real, other=2147483647)
        start = tl.min(floors, 0) // BLOCK_N * BLOCK_N
    blocks = tl.cdiv(tl.maximum(length - start, 0), BLOCK_N)
    share = tl.cdiv(blocks, SPLITS)
    first = start + split * share * BLOCK_N
    stop = tl.minimum(length, first + share * BLOCK_N)
    for base in range(first, stop, BLOCK_N):
        slots = base + tl.arange(0, BLOCK_N)
        inside = slots < length
        visible = inside[None, :] & real[:, None]
        if FLOORS:
            visible = visible & (slots[None, :] >= floors[:, None])
        acc, best, total = _fold_in(
            query, acc, best, total, slots, visible, inside, key_ptr, value_ptr, table_ptr, row, scale_log2,
            key_row, key_slot, value_row, value_slot, stride_table, D, DV, BLOCK_D, BLOCK_DV, PAGE, PRECISION,
        )  # fmt: skip
    if split == SPLITS - 1:
        for base in range(0, tail, BLOCK_N):
            columns = base + tl.arange(0, BLOCK_N)
            inside = columns < tail
            shown = tl.load(
                seen_ptr + row * seen_row + (node * seen_node)[:, None] + columns[None, :],
                mask=real[:, None] & inside[None, :],
                other=0,
            )
            acc, best, total = _fold_in(
                query, acc, best, total, length + columns, shown != 0, inside, key_ptr, value_ptr, table_ptr, row,
                scale_log2, key_row, key_slot, value_row, value_slot, stride_table,
                D, DV, BLOCK_D, BLOCK_DV, PAGE, PRECISION,
            )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    dims_v = tl.arange(0, BLOCK_DV)
    keep = real[:, None] & (dims_v[None, :] < DV)
    place = row * out_row + node * out_node + head * DV
    if SPLITS == 1:
        tl.store(out_ptr + place[:, None] + dims_v[None, :], acc.to(out_ptr.dtype.element_ty), mask=keep)
    else:
        lines = tl.num_programs(0) // KV_HEADS * nodes * KV_HEADS * GROUPS
        line = split.to(tl.int64) * lines + (row * nodes + node) * (KV_HEADS * GROUPS) + head
        tl.store(part_ptr + line[:, None] * DV + dims_v[None, :], acc, mask=keep)
        tl.store(lse_ptr + line, best + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=["lines"])
def combine_kernel(
    part_ptr, lse_ptr, out_ptr, lines, DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Merge the splits of one (row, node, head) by their log-sum-exps. Grid: (lines,). A split that saw nothing has
    the log-sum-exp -inf and weighs nothing."""
    line = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    lse = tl.load(lse_ptr + splits.to(tl.int64) * lines + line)
    best = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(best == float("-inf"), 0.0, best))
    total = tl.sum(weights, 0)
    dims = tl.arange(0, BLOCK_DV)
    offsets = (splits.to(tl.int64) * lines + line)[:, None] * DV + dims[None, :]
    parts = tl.load(part_ptr + offsets, mask=dims[None, :] < DV, other=0.0)
    out = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + line * DV + dims, out.to(out_ptr.dtype.element_ty), mask=dims < DV)
