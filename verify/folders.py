"""The user's cache folder: where what was measured or compiled on this machine is kept between processes."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import platformdirs

VARIABLE = "SPECDEC_CACHE"
"""Environment variable that names the folder; "off" keeps nothing on disk."""


PART = ".part"
"""How files end that are being written."""


def cache_folder() -> Path | None:
    """Where tables and kernels are kept, None for nowhere."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None and chosen.lower() in ("", "off", "0"):
        return None
    try:
        folder = Path(chosen or platformdirs.user_cache_dir("specdec", appauthor=False)).expanduser()
    except RuntimeError:  # nobody's home
        return None
    return folder


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whoever else writes it and whenever this process ends.

    Raises:
        OSError: no room, no permission; nothing is left behind then.
    """
    part: str | None = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=PART, delete=False, encoding="utf-8") as file:
            part = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        if part is not None:
            with suppress(OSError):
                os.unlink(part)
        raise
