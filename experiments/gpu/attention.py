"""Tree attention of one layer, per backend: time, share of the memory bandwidth, and distance from masked SDPA."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from specdec.experiments.clock import Deadline, device_ms, median_ms
from specdec.experiments.gpu.options import GpuOptions
from specdec.verify import Topology
from specdec.verify.attention.choose import BACKENDS, CANDIDATES
from specdec.verify.attention.plan import TreePlan


def attention(options: GpuOptions, deadline: Deadline) -> list[dict[str, Any]]:
    """One entry per backend, context, rows, nodes, and whether rows are equally long."""
    shape = options.target
    size = shape.hidden // shape.heads
    found: list[dict[str, Any]] = []
    device, dtype = options.device, options.torch_dtype
    for context in options.contexts:
        for rows in options.rows:
            if deadline.left < 5:
                return found
            slots = context + max(options.attention_nodes)
            generator = torch.Generator(device).manual_seed(options.seed)
            key, value = (
                torch.randn(rows, shape.kv_heads, slots, size, device=device, dtype=dtype, generator=generator)
                for _ in range(2)
            )
            for nodes in options.attention_nodes:
                query = torch.randn(rows, nodes, shape.heads, size, device=device, dtype=dtype, generator=generator)
                plan = equal_plan(context, rows, nodes, device)
                found += _backends(options, query.transpose(1, 2), key, value, plan)
                if rows > 1 and nodes > 1:
                    found += _backends(options, query.transpose(1, 2), key, value, ragged(plan))
    return found


def equal_plan(context: int, rows: int, nodes: int, device: str) -> TreePlan:
    """A binary tree behind `context` committed slots in every row."""
    topology = Topology(tuple((i - 1) // 2 if i else -1 for i in range(nodes)))
    return TreePlan(
        torch.full((rows,), context, dtype=torch.int32, device=device),
        topology.ancestor_mask.to(device)[None],
        topology.depths_on(torch.device(device)).to(torch.int32)[None],
        context,
        equal=True,
    )


def ragged(plan: TreePlan) -> TreePlan:
    """Rows from half the context up to all of it."""
    lengths = torch.linspace(plan.longest / 2, plan.longest, plan.rows, device=plan.lengths.device).to(torch.int32)
    return TreePlan(lengths, plan.ancestors, plan.depths, plan.longest)


def _backends(
    options: GpuOptions, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TreePlan
) -> list[dict[str, Any]]:
    scale = query.shape[-1] ** -0.5
    tokens = int(plan.lengths.sum()) + plan.rows * plan.tail
    read = 2 * tokens * key.shape[1] * key.shape[3] * key.element_size()
    judge: torch.Tensor | None = None
    found: list[dict[str, Any]] = []
    for name in ("split", *CANDIDATES) if options.dry else CANDIDATES:
        entry: dict[str, Any] = {
            "backend": name, "context": plan.longest, "rows": plan.rows, "nodes": plan.nodes, "equal": plan.equal,
        }  # fmt: skip
        found.append(entry)
        reason = BACKENDS[name].serves(query, key, value, plan, None)
        if reason is not None:
            entry["skipped"] = reason
            continue
        call = partial(BACKENDS[name].attend, query, key, value, plan, scale, None)
        try:
            out = call().float()
            judge = out if judge is None else judge
            entry["error"] = float((out - judge).abs().max())
            entry["ms_wall"] = median_ms(call, options.device, options.repeats)
            entry["ms_device"] = device_ms(call, options.device, options.repeats)
            entry["gb_s"] = read / (entry["ms_device"] or entry["ms_wall"]) / 1e6
        except RuntimeError as fault:
            entry["failed"] = str(fault)[:300]
    return found
