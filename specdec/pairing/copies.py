"""Copies of models in the user's cache folder: written once, whole or not at all, and again where one is damaged.

Imports no torch: what is written is the caller's business.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from specdec.verify.first_use import LOGGER
from specdec.verify.folders import UNFINISHED, cache_folder, sweep_unfinished

FOLDER = "models"
"""Of the cache folder, where copies lie, each in a folder of its own."""
SUMS = "SHA256SUMS"
"""What a copy's files hash to, as `sha256sum --check` reads it. It is written last: without it a copy is unfinished."""
_LEFT_OVER = 3600
"""Seconds after which an unfinished copy is taken for that of a process that was killed."""
_ATTEMPTS = 3


def kept_copy(file: Path, form: str, write: Callable[[Path], object]) -> Path | None:
    """The folder with the copy of a model's file, made by `write` where there is no sound one.

    Processes that need it at once each write their own, and the first to finish is what all of them use.

    Args:
        form: what a copy depends on beside the file, such as the version of who writes it.
        write: fills an empty folder with files.

    Returns:
        None: nothing is kept on this machine (SPECDEC_CACHE is off, or there is no room, or no permission).
    """
    folder = cache_folder()
    if folder is None:
        return None
    key = hashlib.sha256(f"{_digest(file)} {form}".encode()).hexdigest()[:24]
    kept = folder / FOLDER / key
    if damage(kept) is None:
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        sweep_unfinished(kept.parent, _LEFT_OVER)
        LOGGER.warning(
            "specdec: first use of %s: a copy that loads fast is written to %s (half a minute, once)", file.name, kept
        )
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=kept.parent, ignore_cleanup_errors=True) as place:
            write(Path(place))
            _seal(Path(place))
            _name(Path(place), kept)
    except OSError as error:
        LOGGER.warning("specdec: no copy is kept, and every start reads %s anew: %s", file.name, error)
        return None
    return kept


def damage(copy: Path) -> str | None:
    """What is wrong with a copy, None where it is as it was written."""
    try:
        entries = [line.split("  ", 1) for line in (copy / SUMS).read_text(encoding="utf-8").splitlines()]
        wrong = [name for digest, name in entries if _digest(copy / name) != digest]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"{copy.name} cannot be read: {error}"
    return f"{wrong[0]} is not what was written" if wrong else None


def _seal(place: Path) -> None:
    lines = [f"{_digest(file)}  {file.name}\n" for file in sorted(place.iterdir())]
    (place / SUMS).write_text("".join(lines), encoding="utf-8")


def _name(place: Path, kept: Path) -> None:
    """Give a finished copy its name, unless another process was faster; a damaged one goes out of the way."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            place.rename(kept)
            return
        except OSError:
            if damage(kept) is None:
                return
            if attempt == _ATTEMPTS:
                raise
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=kept.parent, ignore_cleanup_errors=True) as aside:
            kept.rename(Path(aside) / kept.name)


def _digest(file: Path) -> str:
    found = file.stat()
    return _hashed(file, found.st_size, found.st_mtime_ns)


@lru_cache
def _hashed(file: Path, size: int, changed: int) -> str:
    """A process asks for the same large files several times."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
