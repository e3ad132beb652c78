"""Packed copies in the user's cache folder: what took a calibration is there at once the next time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.folders import cache_folder, writing_whole
from specdec.verify.packed import Packed

SCHEMA = 2


def stored_path(key: Mapping[str, Any]) -> Path | None:
    """The file of a copy, None where nothing is kept on disk.

    Args:
        key: all that decides what the copy is, ready for JSON.
    """
    folder = cache_folder()
    digest = hashlib.sha256(json.dumps({"schema": SCHEMA, **key}, sort_keys=True).encode()).hexdigest()
    return None if folder is None else folder / f"packed-{digest[:24]}.safetensors"


def store(path: Path, weights: Mapping[str, Packed]) -> None:
    """Keep weights by the paths of their layers; where that fails, they are packed anew the next time."""
    tensors, formats = {}, {}
    for name, packed in weights.items():
        formats[name] = [packed.bits, packed.group, *packed.shape]
        parts = {"codes": packed.codes, "scales": packed.scales, "offsets": packed.offsets}
        tensors.update({f"{name}.{part}": tensor.cpu() for part, tensor in parts.items() if tensor is not None})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_whole(path) as part:
            save_file(tensors, part, {"formats": json.dumps(formats)})
    except OSError:
        return


def stored(path: Path) -> dict[str, Packed] | None:
    """The weights in a file; None where there is none, or none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            formats = json.loads(file.metadata()["formats"])
            names, found = set(file.keys()), {}
            for name, (bits, group, out, width) in formats.items():
                offsets = f"{name}.offsets"
                found[name] = Packed(
                    bits, (out, width), group, file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scales"),
                    file.get_tensor(offsets) if offsets in names else None,
                )  # fmt: skip
            return found
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, UnsupportedArgumentError):
        return None
