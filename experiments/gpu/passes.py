"""Whole passes of target and draft shapes: one token, trees of growing size; masked, planned, as CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch

from specdec.experiments.clock import Deadline, median_ms
from specdec.experiments.gpu.models import counting_llama
from specdec.experiments.gpu.options import GpuOptions, Shape
from specdec.kv import SharedKVCache
from specdec.verify import DraftTree, Forward, Topology
from specdec.verify.passes.choose import every_way
from specdec.verify.passes.graphed import cuda_capture


def passes(options: GpuOptions, deadline: Deadline) -> list[dict[str, Any]]:
    """One entry per model, mode, context and nodes; `bytes` is what the pass must read (weights and K/V)."""
    found: list[dict[str, Any]] = []
    for kind, shape, nodes in (("target", options.target, options.nodes), ("draft", options.draft, (1, 4))):
        model = counting_llama(shape, options.device, options.torch_dtype, options.seed)
        with torch.inference_mode():
            for context in options.contexts:
                found += _at_context(options, deadline, kind, shape, model, context, nodes)
        del model
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return found


def _at_context(
    options: GpuOptions, deadline: Deadline, kind: str, shape: Shape, model: Any, context: int, counts: tuple[int, ...]
) -> list[dict[str, Any]]:
    most = context + 2 * max(*counts, *options.nodes)
    cache = SharedKVCache({"model": shape.layers}, 1, most, most)
    modes = ways(model, options)
    text = torch.randint(shape.vocab, (1, context), device=options.device)
    with modes["masked"].prepared():
        modes["masked"].prefill(cache, text, [0], [context])
    cache.set_length(0, context)
    found: list[dict[str, Any]] = []
    for count in counts:
        tree = binary_tree(count, shape.vocab, options)
        for mode, forward in modes.items():
            if deadline.left < 5:
                return found

            def one_pass(forward: Forward = forward, tree: DraftTree = tree) -> torch.Tensor:
                cache.rollback()
                return forward.tree(cache, tree).logits

            with forward.prepared():
                ms = median_ms(one_pass, options.device, options.repeats)
            found.append(
                {
                    "model": kind, "mode": mode, "context": context, "nodes": count, "ms": ms,
                    "bytes": weight_bytes(model) + kv_bytes(shape, context + count, options.torch_dtype),
                    "flops": 2 * count * weight_bytes(model) / options.torch_dtype.itemsize,
                }
            )  # fmt: skip
    return found


def ways(model: Any, options: GpuOptions) -> dict[str, Forward]:
    """Ways to run a pass: with a mask, with a plan, recorded as a graph."""
    runners = every_way(model, cuda_capture if options.device.startswith("cuda") else None)
    names = {"masked": "modules", "planned": "planned", "graph": "graphed"}
    return {name: Forward(model, "model", runners[runner]) for name, runner in names.items()}


def binary_tree(nodes: int, vocab: int, options: GpuOptions) -> DraftTree:
    topology = Topology(tuple((i - 1) // 2 if i else -1 for i in range(nodes)))
    return DraftTree.build(topology, torch.randint(vocab, (1, nodes), device=options.device))


def weight_bytes(model: Any) -> int:
    """Everything but the embedding table, of which a pass reads a row per token."""
    total = sum(weight.nbytes for weight in model.parameters())
    return int(total - model.get_input_embeddings().weight.nbytes)


def kv_bytes(shape: Shape, tokens: int, dtype: torch.dtype) -> int:
    return 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * tokens * dtype.itemsize
