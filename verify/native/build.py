"""Compiles the native pass with the system's C compiler at first use, and keeps it in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch

from specdec.verify.folders import cache_folder

VARIABLE = "SPECDEC_NATIVE"
"""Environment variable: "0" never uses the native pass; a path names a library compiled elsewhere (by `compiled`)."""
SOURCE = Path(__file__).with_name("llama.c")
"""The file to compile; it includes the headers beside it."""
ENTRY = "specdec_llama_pass"

_SECONDS = 120
"""A compiler that takes longer is given up."""


class Unavailable(RuntimeError):
    """Why there is no native pass on this machine."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled pass, from the cache folder or compiled now (some four seconds, once per machine and version).

    Raises:
        Unavailable: switched off, no compiler, or a compiler that fails.
    """
    chosen = os.environ.get(VARIABLE, "1")
    if chosen.lower() in ("0", "off", "no", "false"):
        raise Unavailable(f"switched off by {VARIABLE}={chosen}")
    if chosen.lower() not in ("", "1", "on", "yes", "true"):
        return _load(Path(chosen).expanduser())
    folder = cache_folder()
    if folder is None:  # a loaded library needs its file no longer
        with tempfile.TemporaryDirectory() as place:
            return _load(compiled(Path(place)))
    return _load(compiled(folder / "native"))


@lru_cache(maxsize=1)
def why_not() -> str | None:
    """Why there is no native pass here; None when there is one. Whoever did not ask for that is warned, once."""
    try:
        library()
    except Unavailable as reason:
        if not str(reason).startswith("switched off"):
            warnings.warn(f"specdec decodes without its native kernels: {reason}", RuntimeWarning, stacklevel=2)
        return str(reason)
    return None


def compiled(folder: Path) -> Path:
    """The library for this machine in `folder`, compiled if it is not there.

    Raises:
        Unavailable: as `library`.
    """
    if sys.platform == "win32":
        raise Unavailable("not supported on Windows")
    compiler, flags = _compiler(), _flags()
    kept = folder / f"{_key(compiler, flags)}.so"
    if not kept.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, flags, kept)
        except OSError as error:
            raise Unavailable(f"cannot write to {folder}: {error}") from error
    return kept


def _compiler() -> str:
    wanted = os.environ.get("CC")
    names = (wanted,) if wanted else ("gcc", "cc", "clang")
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise Unavailable(f"no C compiler found (looked for {', '.join(names)}); install gcc or set CC")


def _flags() -> list[str]:
    own = "-mcpu=native" if platform.machine().lower() in ("aarch64", "arm64") else "-march=native"
    flags = ["-std=gnu11", "-O3", own, "-fPIC", "-fno-math-errno"]
    return flags if sys.platform == "darwin" else [*flags, "-fopenmp"]


def _key(compiler: str, flags: list[str]) -> str:
    """Of everything the result depends on: source, compiler, flags, and what this processor can do."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_SECONDS, check=False).stdout
    abilities = platform.processor().encode()
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        abilities += next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        pass
    sources = [file.read_bytes() for file in sorted(SOURCE.parent.glob("*.[ch]"))]
    parts = (*sources, version, " ".join(flags).encode(), abilities)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _compile(compiler: str, flags: list[str], target: Path) -> None:
    """Compile into a file of its own first: another process may be doing the same."""
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        built, linked = Path(place) / "llama.o", Path(place) / "llama.so"
        # Linked without OpenMP's library: its symbols are found in the one torch has loaded, and with them its threads.
        for command in (
            [compiler, *flags, "-c", str(SOURCE), "-o", str(built)],
            [compiler, "-shared", str(built), "-o", str(linked), "-lm"],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise Unavailable(f"{compiler} did not run: {error}") from error
            if done.returncode:
                raise Unavailable(f"{compiler} failed: {(done.stderr or done.stdout).strip()[:400]}")
        os.replace(linked, target)


def _load(path: Path) -> ctypes.CDLL:
    """With torch in the process: its OpenMP is the one that is found."""
    assert torch.get_num_threads() > 0
    try:
        loaded = ctypes.CDLL(str(path))
        getattr(loaded, ENTRY).restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        raise Unavailable(f"cannot load the compiled pass: {error}") from error
    return loaded
