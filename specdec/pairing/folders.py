"""The facts of a model that lies on this machine, from its own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specdec.pairing.errors import PairError
from specdec.pairing.schema import Facts
from specdec.pairing.tables import one_line

_KEYS = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
}
"""A fact's names in the configs of Llama and its relatives, GPT-2 and OPT, in this order."""


def folder_facts(folder: Path) -> Facts:
    """What `folder/config.json` and the headers of its safetensors files say.

    Raises:
        PairError: no or broken config.json, a field missing, no safetensors files.
    """
    config = _config(folder)
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    sizes = {name: _first(config, keys) for name, keys in _KEYS.items()}
    heads, hidden = sizes["num_heads"], sizes["hidden_size"]
    if sizes["intermediate_size"] is None and hidden is not None:
        sizes["intermediate_size"] = 4 * hidden  # GPT-2's default
    if sizes["num_kv_heads"] is None:
        sizes["num_kv_heads"] = heads
    if sizes["head_dim"] is None and heads and hidden:
        sizes["head_dim"] = hidden // heads
    missing = [name for name, value in sizes.items() if value is None]
    if missing or not isinstance(config.get("model_type"), str):
        lacking = ", ".join(_KEYS[name][0] for name in missing) or "model_type"
        raise PairError(f"{folder.name}/config.json: expected a decoder-only model's configuration, found no {lacking}")
    shapes = _shapes(folder)
    head = any(name.startswith(("lm_head.", "output.")) for name in shapes)
    return Facts(
        architecture=config["model_type"],
        num_parameters=sum(shapes.values()),
        tied_embeddings=not head,
        source="config.json and the safetensors headers",
        **sizes,  # type: ignore[arg-type]
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PairError(f"{folder.name}/config.json: could not be read: {error}") from None
    if not isinstance(config, dict):
        raise PairError(f"{folder.name}/config.json: expected a JSON object, got {type(config).__name__}")
    return config


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    """A whole number; None where there is none."""
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _shapes(folder: Path) -> dict[str, int]:
    """Number of elements of every stored tensor."""
    from safetensors import SafetensorError, safe_open

    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():
                    counts[name] = _product(file.get_slice(name).get_shape())
        except (SafetensorError, OSError, ValueError) as error:
            raise PairError(f"{folder.name}/{path.name}: not a safetensors file: {one_line(str(error))}") from None
    if not counts:
        raise PairError(f"{folder.name}: expected *.safetensors files, found none; other formats are not loaded")
    return counts


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
