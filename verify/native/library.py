"""The compiled pass that this process uses: named by the user, from the cache folder, or compiled now."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from specdec.verify.folders import cache_folder
from specdec.verify.native.build import Unavailable, compiled, damage, entry, seal_of

VARIABLE = "SPECDEC_NATIVE"
"""Environment variable: "0" never uses the native pass; a path names a library compiled elsewhere (by `compiled`)."""


DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Dtypes of models that have a native pass, as its sources name them."""


class Library(NamedTuple):
    """calls, chains: the C functions of passes and of greedy chains, for models of each dtype. threaded: whether they
    can use more than one thread."""

    calls: dict[torch.dtype, Any]
    chains: dict[torch.dtype, Any]
    threaded: bool


class _Search:
    """What was looked for, once: a library, or the reason why there is none."""

    def __init__(self) -> None:
        self.found: Library | None = None
        self.reason = ""
        self.quiet = True
        chosen = os.environ.get(VARIABLE, "1")
        try:
            if chosen.lower() in ("0", "off", "no", "false"):
                raise Unavailable(f"switched off by {VARIABLE}={chosen}")
            named = chosen.lower() not in ("", "1", "on", "yes", "true")
            self.found = _load(Path(chosen).expanduser()) if named else _own()
        except (Unavailable, OSError, RuntimeError) as error:
            self.reason = str(error) or type(error).__name__
            self.quiet = self.reason.startswith("switched off") or sys.platform == "win32"


@lru_cache(maxsize=1)
def _search() -> _Search:
    return _Search()


def library() -> Library:
    """The compiled pass; compiling takes some fifteen seconds of one core, once per machine and version.

    Raises:
        Unavailable: switched off, no compiler, or a compiler that fails.
    """
    search = _search()
    if search.found is None:
        raise Unavailable(search.reason)
    return search.found


def why_not() -> str | None:
    """Why there is no native pass here; None when there is one. Whoever did not ask for that is warned, once."""
    search = _search()
    if not search.quiet:
        search.quiet = True
        warnings.warn(f"specdec decodes without its native passes: {search.reason}", RuntimeWarning, stacklevel=2)
    return search.reason or None


def _own() -> Library:
    """From the cache folder where only this user can have put it there; else compiled for this process alone."""
    folder = cache_folder()
    if folder is not None:
        kept = folder / "native"
        try:
            kept.mkdir(parents=True, exist_ok=True, mode=0o700)
            if _private(kept):
                return _compiled_into(kept)
        except (OSError, Unavailable):  # a read-only folder, for one
            pass
    with tempfile.TemporaryDirectory() as place:  # a loaded library needs its file no longer
        return _compiled_into(Path(place))


def _private(path: Path) -> bool:
    """Is this user the only one who can write to it?"""
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compiled_into(folder: Path) -> Library:
    path = compiled(folder)
    try:
        if _private(path) and _private(seal_of(path)):
            return _load(path)
    except (OSError, Unavailable):  # damaged in a way that its seal does not show: once more
        pass
    seal_of(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return _load(compiled(folder))


def _load(path: Path) -> Library:
    """With torch in the process: its OpenMP is the one that is found.

    Raises:
        Unavailable: no library, one that is not as it was written, or one of other sources.
    """
    wrong = damage(path)
    if wrong is not None:
        raise Unavailable(f"cannot load the compiled pass from {path}: {wrong}; compile it again, and copy both files")
    assert torch.get_num_threads() > 0
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"cannot load the compiled pass: {error}") from error
    try:
        calls, chains = (
            {dtype: getattr(loaded, f"{entry()}_{name}{what}") for dtype, name in DTYPES.items()}
            for what in ("", "_chain")
        )
    except AttributeError as error:
        raise Unavailable(f"{path} was compiled from other sources: compile it again with this version") from error
    for call in (*calls.values(), *chains.values()):
        call.restype = ctypes.c_int64
    return Library(calls, chains, bool(ctypes.c_int.in_dll(loaded, f"{entry()}_F32_threaded").value))


@lru_cache(maxsize=1)
def usable_cores() -> int:
    """Cores this process may use: more threads would wait for each other, at every meeting of a pass."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # a container's quota, microseconds per period
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return count if quota == "max" else max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return count
