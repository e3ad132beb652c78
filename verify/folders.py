"""The user's cache folder: where what was measured or compiled on this machine is kept between processes."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "SPECDEC_CACHE"
"""Environment variable that names the folder; "off" keeps nothing on disk."""


def cache_folder() -> Path | None:
    """Where tables and kernels are kept, None for nowhere."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None and chosen.lower() in ("", "off", "0"):
        return None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return (Path(base) if base else Path.home() / ".cache") / "specdec"
    except RuntimeError:  # nobody's home
        return None
