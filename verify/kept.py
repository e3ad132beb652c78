"""What lies in the user's cache folder: which files are this library's, and how to remove them, and nothing else."""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from specdec.verify.folders import PART, UNFINISHED

_WHAT = {
    "cost table": re.compile(r"costs-[0-9a-f]{24}\.json"),
    "packed copy": re.compile(r"packed-[0-9a-f]{24}\.safetensors"),
    "compiled pass": re.compile(r"native/[0-9a-f]{24}\.so(\.sum)?"),
    "model": re.compile(r"models/[0-9a-f]{24}/[\w.-]+"),
    "left over": re.compile(rf"tmp\w+{re.escape(PART)}|(native|models)/{UNFINISHED}\w+/[\w.-]+"),
}
"""Names that the library gives its files, seen from the folder. Whatever is called otherwise is somebody else's."""
_FOLDERS = re.compile(rf"(native|models)(/{UNFINISHED}\w+)?|models/[0-9a-f]{{24}}")


class Kept(NamedTuple):
    """One file: bytes, and seconds since it was written."""

    what: str
    path: Path
    size: int
    age: float


def kept_files(folder: Path) -> list[Kept]:
    """The library's files in a cache folder, by name. Links are nobody's, and are not followed."""
    found = []
    for path in _inside(folder):
        status = path.lstat()
        name = path.relative_to(folder).as_posix()
        what = next((kind for kind, pattern in _WHAT.items() if pattern.fullmatch(name)), None)
        if what is not None and stat.S_ISREG(status.st_mode):
            found.append(Kept(what, path, status.st_size, time.time() - status.st_mtime))
    return sorted(found, key=lambda one: str(one.path))


def other_files(folder: Path) -> int:
    """How many files there are that are not the library's."""
    ours = {one.path for one in kept_files(folder)}
    return sum(path not in ours for path in _inside(folder))


def remove(folder: Path, files: Sequence[Kept]) -> dict[Path, str]:
    """Remove these files, and folders of the library's that are empty then; what could not be removed, and why."""
    failed = {}
    for one in files:
        try:
            one.path.unlink(missing_ok=True)
        except OSError as error:
            failed[one.path] = error.strerror or str(error)
    for place in sorted(_folders(folder), reverse=True):
        try:
            place.rmdir()
        except OSError:  # not empty: something else is in it
            continue
    return failed


def _inside(folder: Path) -> Iterator[Path]:
    """What lies in the folder and in those of its folders that are the library's; other folders are not looked into."""
    for place in (folder, *_folders(folder)):
        yield from (path for path in _entries(place) if path.is_symlink() or not path.is_dir())


def _folders(folder: Path) -> Iterator[Path]:
    tops = [folder / name for name in ("native", "models")]
    for path in (*tops, *(inner for top in tops if not top.is_symlink() for inner in _entries(top))):
        if _FOLDERS.fullmatch(path.relative_to(folder).as_posix()) and path.is_dir() and not path.is_symlink():
            yield path


def _entries(place: Path) -> list[Path]:
    try:
        return sorted(place.iterdir())
    except OSError:  # there is none, or nobody may look into it
        return []
