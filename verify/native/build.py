"""Compiles the native pass with the system's C compiler, for this processor unless told otherwise."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from specdec.verify.first_use import first_use
from specdec.verify.folders import UNFINISHED, sweep_unfinished

_SOURCES = Path(__file__).parent
_DTYPES = ("F32", "BF16", "F16")
"""Dtypes of models, as the sources name them: for each of them there is one pass (llama.c)."""
_FORMATS = (*_DTYPES, "Q8", "Q4", "Q8I", "Q4I")
"""Formats of weights: for each of them there are products (products.c), whatever the model's dtype."""

_SECONDS = 120
"""A compiler that takes longer is given up."""


class Unavailable(RuntimeError):
    """Why there is no native pass on this machine."""


@lru_cache(maxsize=1)
def entry() -> str:
    """How the names of the C functions begin, one per version of the sources: no library of another version is ever
    called. They end with a dtype."""
    digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(_SOURCES.glob("*.[ch]"))))
    return f"specdec_llama_pass_{digest.hexdigest()[:16]}"


def compiled(folder: Path, processor: str = "native") -> Path:
    """The library in `folder`, compiled if it is not there or not as it was written (see `damage`).

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
        version = _run([*compiler, "--version"])[1]
        flags = _flags(processor, threads=b"Free Software Foundation" in version)
        kept = folder / f"{_key(compiler, flags, version)}.so"
        if damage(kept) is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            sweep_unfinished(folder, 4 * _SECONDS)
            _compile(compiler, flags, kept)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"cannot compile into {folder}: {error}") from error
    return kept


def seal_of(library: Path) -> Path:
    """The file beside a library that says how long it is and what its bytes hash to. It is written last: a library
    without one is not finished."""
    return library.with_name(f"{library.name}.sum")


def damage(library: Path) -> str | None:
    """What is wrong with a library's file, None where it is as it was written. A damaged one must not be loaded: a
    page that is missing ends the process, and no exception says so."""
    try:
        size, digest = seal_of(library).read_text(encoding="ascii").split()
        if library.stat().st_size != int(size):
            return f"{library.name} is {library.stat().st_size} bytes long, it was {size}"
        return None if _digest(library) == digest else f"{library.name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"{library.name} or {seal_of(library).name} cannot be read: {error}"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


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
    flags = ["-std=gnu11", "-O3", f"{kind}={processor}", "-fPIC", "-fno-math-errno", f"-DNAME={entry()}"]
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
    """Compile into a file of its own first: another process may be doing the same, and this one may be killed."""
    with first_use(), tempfile.TemporaryDirectory(dir=target.parent, prefix=UNFINISHED) as place:
        linked = Path(place) / "llama.so"
        parts = [("llama.c", f"-DNUMBER={dtype}") for dtype in _DTYPES]
        parts += [("products.c", f"-DFORMAT={weights}") for weights in _FORMATS]
        built = [str(Path(place) / f"{i}.o") for i in range(len(parts))]
        commands = [
            [*compiler, *flags, define, "-c", str(_SOURCES / source), "-o", to]
            for (source, define), to in zip(parts, built, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            done = list(workers.map(_run, commands))
        # Linked without OpenMP's library: its symbols are found in the one torch has loaded, and with them its threads.
        done.append(_run([*compiler, "-shared", *built, "-o", str(linked), "-lm"]))
        for code, said in done:
            if code:
                raise Unavailable(f"{compiler[0]} failed: {said.decode(errors='replace').strip()[:400]}")
        seal = Path(place) / "seal"
        seal.write_text(f"{linked.stat().st_size} {_digest(linked)}\n", encoding="ascii")
        for file, name in ((linked, target), (seal, seal_of(target))):  # on disk before they have their names
            _flush(file)
            os.replace(file, name)
        _flush(target.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _run(command: list[str]) -> tuple[int, bytes]:
    """Exit code and output of a command.

    A compiler is several processes: past the time limit all of them are ended, and none is waited for that keeps the
    output open.

    Raises:
        subprocess.TimeoutExpired, OSError
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(_SECONDS)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        said.seek(0)
        return code, said.read()
