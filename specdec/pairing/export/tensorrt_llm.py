"""TensorRT-LLM: `trtllm-serve MODEL --config FILE` with a `speculative_config` in it.

Names: the decoding configurations in tensorrt_llm/llmapi/llm_args.py and docs/source/features/speculative-decoding.md
of NVIDIA/TensorRT-LLM.
"""

from __future__ import annotations

from typing import Any

from specdec.pairing.export.base import Export, chain_note, lossy_note, refuse, shared_notes, yaml
from specdec.pairing.schema import NGRAM_MAX, Pair

CONFIG = "speculative.yaml"
_TYPES = {"model": "Draft_Target", "ngram": "NGram", "eagle3": "Eagle3"}


def export_tensorrt_llm(pair: Pair) -> Export:
    if pair.draft.kind == "eagle":
        raise refuse(
            pair, "tensorrt-llm", "its PyTorch backend runs EAGLE-3 heads only", "use an eagle3 head, or vllm or sglang"
        )
    if pair.vocabulary == "different":
        raise refuse(pair, "tensorrt-llm", "draft and target need one tokenizer", "export to vllm or transformers")
    notes = shared_notes(pair) + lossy_note(pair, "TensorRT-LLM")
    config: dict[str, Any] = {"decoding_type": _TYPES[pair.draft.kind], "max_draft_len": pair.draft_length}
    if pair.draft.kind == "ngram":
        config["max_matching_ngram_size"] = NGRAM_MAX
    else:
        config["speculative_model"] = pair.location(pair.draft)
        if pair.draft.revision is not None:
            notes.append(
                f"The draft's revision {pair.draft.revision} does not carry over: download it and give the folder."
            )
    if pair.drafting.tree is not None and pair.draft.kind == "eagle3":
        config |= {
            "use_dynamic_tree": True,
            "dynamic_tree_max_topK": max(pair.drafting.tree),
            "max_total_draft_tokens": _total(pair),
        }
        notes.append(f"tree = {list(pair.drafting.tree)} becomes a dynamic tree of its depth, branching and size.")
    else:
        notes += chain_note(pair, "TensorRT-LLM")
    if pair.drafting.rule == "rejection" and pair.draft.kind != "ngram":
        config["use_rejection_sampling"] = True
    elif pair.drafting.rule not in ("auto", "greedy", "naive", "typical"):
        notes.append(f"rule = {pair.drafting.rule} does not carry over: exact-match verification, which is lossless.")
    settings: dict[str, Any] = {"dtype": "float32" if pair.dtype == "float64" else pair.dtype}
    if pair.target.revision is not None:
        settings["revision"] = pair.target.revision
    command = ("trtllm-serve", pair.location(pair.target), "--config", CONFIG)
    text = yaml(settings) + "speculative_config:\n" + yaml(config, "  ")
    return Export("tensorrt-llm", config, (command,), {CONFIG: text}, tuple(notes))


def _total(pair: Pair) -> int:
    """The engine wants depth <= nodes <= branching * depth."""
    assert pair.drafting.tree is not None
    return min(pair.num_nodes, max(pair.drafting.tree) * pair.draft_length)
