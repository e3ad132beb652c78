"""Compiles the native pass with the system's C compiler, for this processor unless told otherwise."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).with_name("llama.c")
"""The file to compile; it includes the headers beside it."""

_SECONDS = 120
"""A compiler that takes longer is given up."""


class Unavailable(RuntimeError):
    """Why there is no native pass on this machine."""


@lru_cache(maxsize=1)
def entry() -> str:
    """Name of the C function, one per version of the sources: no library of another version is ever called."""
    digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(SOURCE.parent.glob("*.[ch]"))))
    return f"specdec_llama_pass_{digest.hexdigest()[:16]}"


def compiled(folder: Path, processor: str = "native") -> Path:
    """The library in `folder`, compiled if it is not there.

    Args:
        processor: as the compiler's `-march` (`-mcpu` on Arm) has it; "native" is this one. A library for another
            machine needs a name that fits all of its processors, e.g. "x86-64-v3".

    Raises:
        Unavailable: no compiler, one that fails, or a folder that cannot be written to.
    """
    if sys.platform == "win32":
        raise Unavailable("not supported on Windows")
    compiler = _compiler()
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_SECONDS, check=False).stdout
        flags = _flags(processor, threads=b"Free Software Foundation" in version)
        kept = folder / f"{_key(compiler, flags, version)}.so"
        if not kept.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, flags, kept)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"cannot compile into {folder}: {error}") from error
    return kept


def _compiler() -> list[str]:
    wanted = os.environ.get("CC")
    names = [shlex.split(wanted)] if wanted else [["gcc"], ["cc"], ["clang"]]
    for name in names:
        if name and shutil.which(name[0]):
            return name
    raise Unavailable(f"no C compiler found (looked for {', '.join(map(shlex.join, names))}); install gcc or set CC")


def _flags(processor: str, threads: bool) -> list[str]:
    """threads: with OpenMP, which is torch's own where the compiler is GCC; clang's would be a second one."""
    kind = "-mcpu" if platform.machine().lower() in ("aarch64", "arm64") else "-march"
    flags = ["-std=gnu11", "-O3", f"{kind}={processor}", "-fPIC", "-fno-math-errno", f"-DENTRY={entry()}"]
    return [*flags, "-fopenmp"] if threads else flags


def _key(compiler: list[str], flags: list[str], version: bytes) -> str:
    """Of everything the result depends on: sources, compiler, flags, and what this processor can do."""
    abilities = platform.processor().encode()
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        abilities += next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        pass
    parts = (version, shlex.join([*compiler, *flags]).encode(), abilities)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _compile(compiler: list[str], flags: list[str], target: Path) -> None:
    """Compile into a file of its own first: another process may be doing the same."""
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        built, linked = Path(place) / "llama.o", Path(place) / "llama.so"
        # Linked without OpenMP's library: its symbols are found in the one torch has loaded, and with them its threads.
        for command in (
            [*compiler, *flags, "-c", str(SOURCE), "-o", str(built)],
            [*compiler, "-shared", str(built), "-o", str(linked), "-lm"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
            if done.returncode:
                raise Unavailable(f"{compiler[0]} failed: {(done.stderr or done.stdout).strip()[:400]}")
        os.replace(linked, target)
