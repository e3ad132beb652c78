"""transformers: `generate(assistant_model=...)` and `generate(prompt_lookup_num_tokens=...)`.

Names: GenerationConfig and generate of the installed transformers, against which the tests hold them.
"""

from __future__ import annotations

from typing import Any

from specdec.pairing.export.base import Export, chain_note, lossy_note, refuse, shared_notes
from specdec.pairing.schema import NGRAM_MAX, Pair

SCRIPT = "generate.py"


def export_transformers(pair: Pair) -> Export:
    if pair.draft.kind in ("eagle", "eagle3"):
        raise refuse(
            pair,
            "transformers",
            "its assisted generation runs no EAGLE heads",
            "export to vllm, sglang or tensorrt-llm",
        )
    notes = shared_notes(pair) + chain_note(pair, "transformers") + lossy_note(pair, "transformers")
    arguments: dict[str, Any] = {}
    if pair.draft.kind == "ngram":
        arguments = {"prompt_lookup_num_tokens": pair.draft_length, "max_matching_ngram_size": NGRAM_MAX}
    else:
        arguments = {"num_assistant_tokens": pair.draft_length, "num_assistant_tokens_schedule": "constant"}
        notes.append("assistant_confidence_threshold=0 keeps transformers from cutting drafts short by itself.")
        arguments["assistant_confidence_threshold"] = 0.0
    if pair.drafting.rule not in ("auto", "greedy", "rejection", "naive", "typical"):
        notes.append(f"rule = {pair.drafting.rule} does not carry over: transformers rejects token by token.")
    notes.append("Batches of one prompt only; specdec takes any batch with the same models.")
    return Export("transformers", arguments, (("python", SCRIPT),), {SCRIPT: _script(pair, arguments)}, tuple(notes))


def _script(pair: Pair, arguments: dict[str, Any]) -> str:
    """A whole program, so that it can be run as it is."""
    dtype = "auto" if pair.dtype == "auto" else pair.dtype
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"target_id = {pair.location(pair.target)!r}",
        f"tokenizer = AutoTokenizer.from_pretrained(target_id{_revision(pair.target.revision)})",
        f"target = AutoModelForCausalLM.from_pretrained(target_id, dtype={dtype!r}, device_map='auto'"
        f"{_revision(pair.target.revision)})",
    ]
    given = []
    if pair.draft.kind == "model":
        revision = _revision(pair.draft.revision)
        lines += [
            f"draft_id = {pair.location(pair.draft)!r}",
            f"draft = AutoModelForCausalLM.from_pretrained(draft_id, dtype={dtype!r}, device_map='auto'{revision})",
        ]
        lines += [f"draft.generation_config.{name} = {value!r}" for name, value in arguments.items()]
        given.append("assistant_model=draft")
        if pair.vocabulary == "different":
            given += ["tokenizer=tokenizer", "assistant_tokenizer=AutoTokenizer.from_pretrained(draft_id)"]
    else:
        given += [f"{name}={value!r}" for name, value in arguments.items()]
    lines += [
        "inputs = tokenizer('Once upon a time', return_tensors='pt').to(target.device)",
        f"ids = target.generate(**inputs, max_new_tokens=64, {', '.join(given)})",
        "print(tokenizer.decode(ids[0], skip_special_tokens=True))",
    ]
    return "\n".join(lines) + "\n"


def _revision(revision: str | None) -> str:
    return "" if revision is None else f", revision={revision!r}"
