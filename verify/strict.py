"""Attention whose bits do not depend on where in a draft tree, or in how long a pass, a node stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from specdec.kv.errors import UnsupportedModelError
from specdec.verify.attention.blocks import BLOCK, BlockPlan

NAME = "specdec_strict"

_UNKNOWN_TERMS = ("s_aux", "sinks", "position_bias", "alibi", "relative_position_bias")
"""Arguments by which models add terms to the softmax that this function does not compute."""

_plan: ContextVar[BlockPlan | None] = ContextVar("specdec_strict_plan", default=None)


@contextmanager
def strict_pass(model: PreTrainedModel, plan: BlockPlan) -> Iterator[None]:
    """Inside the block `model` attends as `plan` says, whatever its own attention implementation; then as before."""
    config = model.config.get_text_config(decoder=True)
    own = config._attn_implementation
    config._attn_implementation = NAME
    token = _plan.set(plan)
    try:
        yield
    finally:
        _plan.reset(token)
        config._attn_implementation = own


def strict_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`block_attention` of the pass that runs; the function registered with `transformers`.

    Raises:
        UnsupportedModelError: the model's softmax has terms that are not computed here.
    """
    unknown = [name for name in _UNKNOWN_TERMS if kwargs.get(name) is not None]
    if unknown:
        raise UnsupportedModelError(
            f"exactness='strict': {type(module).__name__} adds {', '.join(unknown)} to its attention, which the strict "
            "attention does not compute; use exactness='distribution'"
        )
    if dropout:
        raise UnsupportedModelError(f"exactness='strict': dropout={dropout} in attention; call model.eval() first")
    plan = _plan.get()
    assert plan is not None, "strict attention runs inside strict_pass only"
    assert attention_mask is not None, "a planned pass brings its own mask"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return block_attention(query, key, value, attention_mask, plan, scale, softcap), None


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, plan: BlockPlan, scale: float, softcap: float | None
) -> Tensor:
    """Attention of one row's nodes, block by block.

    Every block is one product of the same size; the largest score does not depend on an order; sums are formed within
    blocks and then over blocks from the first to the last, and blocks out of sight add exact zeros. So a node's result
    is a function of its query and of the K/V at the positions it sees: neither its slot, nor the other nodes, nor the
    number of blocks of the pass enters.

    Args:
        query: `[1, heads, width, head_dim]`; key: `[1, kv_heads, >= slots of the plan, head_dim]`; value: same, its own
            head_dim. Below float32 everything is computed in float32 and rounded once.
        visible: bool `[1, 1, width, (shared + own) * BLOCK]`.

    Returns:
        `[1, width, heads, value's head_dim]` in the query's dtype.
    """
    _, heads, width, size = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys, values = _blocks(key[0], plan, dtype), _blocks(value[0], plan, dtype)
    paths, own, shared = plan.slots.shape[0], plan.own, plan.shared
    count = keys.shape[1]
    queries = query[0].reshape(kv_heads, 1, groups * width, size).to(dtype).expand(-1, count, -1, -1)
    scores = torch.bmm(queries.reshape(-1, groups * width, size), keys.flatten(0, 1).transpose(1, 2))
    scores = _by_node(scores.view(kv_heads, count, groups, width, BLOCK), plan) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = visible[0, 0].view(width, shared + own, BLOCK).transpose(0, 1)[None, :, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = torch.exp(scores - scores.amax((1, 4), keepdim=True))
    totals = weights.sum(-1, keepdim=True)
    weights = weights.view(kv_heads, shared + own, groups * width, BLOCK)
    if paths > 1:
        tail = weights[:, None, shared:].expand(-1, paths, -1, -1, -1).flatten(1, 2)
        weights = torch.cat([weights[:, :shared], tail], 1)
    parts = torch.bmm(weights.flatten(0, 1), values.flatten(0, 1))
    parts = _by_node(parts.view(kv_heads, count, groups, width, -1), plan)
    out, total = parts[:, 0], totals[:, 0]
    for block in range(1, shared + own):  # one after the other: a library's sum may pair them by their number
        out, total = out + parts[:, block], total + totals[:, block]
    out = (out / total).to(query.dtype)
    return out.view(1, heads, width, -1).transpose(1, 2).contiguous()


def _blocks(states: Tensor, plan: BlockPlan, dtype: torch.dtype) -> Tensor:
    """`[kv_heads, slots, size]` → `[kv_heads, shared + paths * own, BLOCK, size]`, contiguous."""
    common = states[:, : plan.shared * BLOCK]
    tails = states[:, plan.slots.flatten().to(states.device)]
    return torch.cat([common, tails], 1).to(dtype).unflatten(1, (-1, BLOCK))


def _by_node(blocks: Tensor, plan: BlockPlan) -> Tensor:
    """Of the blocks that exist once per path, each node takes those of its own path.

    `[kv_heads, shared + paths * own, groups, width, n]` → `[kv_heads, shared + own, groups, width, n]`
    """
    if plan.path_of is None:
        return blocks
    tails = blocks[:, plan.shared :].unflatten(1, (-1, plan.own))
    nodes = torch.arange(blocks.shape[3], device=blocks.device)
    chosen = tails[:, plan.path_of.to(blocks.device), :, :, nodes]  # [width, kv_heads, own, groups, n]
    return torch.cat([blocks[:, : plan.shared], chosen.permute(1, 2, 3, 0, 4)], 1)


AttentionInterface.register(NAME, strict_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # a name without a mask function would lose its masks silently
