"""The user's cache folder: where what was measured or compiled on this machine is kept between processes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

VARIABLE = "SPECDEC_CACHE"
"""Environment variable that names the folder; "off" keeps nothing on disk."""


PART = ".part"
"""How files end that are being written."""
UNFINISHED = "building-"
"""How folders begin in which something is being built, to be given its name when it is whole."""


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


@contextmanager
def writing_whole(path: Path) -> Iterator[Path]:
    """Inside the block a file is written, whose name is yielded; then `path` is that file. It is there whole or not at
    all, whoever else writes it and whenever this process ends.

    Raises:
        OSError: no room, no permission; nothing is left behind then.
    """
    part: str | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=PART, delete=False) as file:
            part = file.name
        yield Path(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        if part is not None:
            with suppress(OSError):
                os.unlink(part)
        raise


def sweep_unfinished(folder: Path, seconds: float) -> None:
    """Remove what processes that were killed have left half built in a folder, once it is so old."""
    for place in folder.glob(f"{UNFINISHED}*"):
        if time.time() - place.stat().st_mtime > seconds:
            shutil.rmtree(place, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file by `writing_whole`."""
    with writing_whole(path) as part:
        part.write_text(text, encoding="utf-8")
