"""Which compiled library a process uses: its own, a named one, or none and one warning; never somebody else's."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from ways import native_of

import specdec
from specdec.verify.native import build, library

WITHOUT = library.why_not()
pytestmark = pytest.mark.skipif(WITHOUT is not None, reason=f"no native pass: {WITHOUT}")


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As in a process that has not asked for the library yet."""
    library._search.cache_clear()
    monkeypatch.setenv(library.VARIABLE, "1")
    yield monkeypatch
    monkeypatch.undo()
    library._search.cache_clear()


def text_of(model: Any) -> Tensor:
    ids = models.prompts((7,), models.VOCAB, 0)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        out = specdec.Speculator(model, "ngram", k=3).generate(ids, max_new_tokens=16, do_sample=False)
    assert isinstance(out, Tensor)
    return out


def test_without_a_compiler_there_is_one_warning_and_the_same_text(unbuilt: pytest.MonkeyPatch) -> None:
    model: Any = models.target("llama-gqa", "fp32")
    wanted = model.generate(models.prompts((7,), models.VOCAB, 0)[0], max_new_tokens=16, do_sample=False)
    unbuilt.setenv("CC", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="no C compiler found.*no-such-compiler"):
        assert library.why_not() is not None
    assert library.why_not() is not None  # and no warning: they are errors here
    assert native_of(model) is None
    assert torch.equal(text_of(model), wanted)


def test_a_compiler_that_cannot_even_start_is_said(unbuilt: pytest.MonkeyPatch, tmp_path: Path) -> None:
    garbage = tmp_path / "cc"
    garbage.write_bytes(b"not a program")
    garbage.chmod(0o755)
    for compiler, match in ((str(garbage), "cannot compile"), ("false", "false failed")):
        unbuilt.setenv("CC", compiler)
        with pytest.raises(build.Unavailable, match=match):
            build.compiled(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_it_can_be_switched_off_without_a_warning(unbuilt: pytest.MonkeyPatch) -> None:
    unbuilt.setenv(library.VARIABLE, "0")
    assert library.why_not() == "switched off by SPECDEC_NATIVE=0"


def test_libraries_of_other_versions_are_never_called(unbuilt: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = build.compiled(tmp_path)
    assert library._load(path).threaded in (True, False)
    unbuilt.setattr(library, "entry", lambda: "specdec_llama_pass_of_another_version")
    unbuilt.setenv(library.VARIABLE, str(path))
    with pytest.warns(RuntimeWarning, match="compiled from other sources"):
        assert library.why_not() is not None
    library._search.cache_clear()
    unbuilt.setenv(library.VARIABLE, str(tmp_path / "nothing.so"))
    with pytest.warns(RuntimeWarning, match="cannot load"):
        assert "nothing.so" in str(library.why_not())


def damaged(path: Path, how: str) -> None:
    """A file of its own: writing into the one that this process has loaded would end it."""
    content, seal = path.read_bytes(), build.seal_of(path).read_text()
    path.unlink()
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "one bit":
        content = content[:3000] + bytes([content[3000] ^ 1]) + content[3001:]
    elif how == "zeros":
        content = bytes(len(content))
    elif how == "longer":
        content += b"x"
    elif how == "seal of another":
        build.seal_of(path).write_text("12 " + seal.split()[1])
    elif how == "seal of garbage":
        build.seal_of(path).write_bytes(b"\xff\x00")
    elif how == "no seal":
        build.seal_of(path).unlink()
    path.write_bytes(b"" if how == "empty" else content)
    if how == "missing":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()


HOW = ("truncated", "one bit", "zeros", "longer", "empty", "seal of another", "seal of garbage", "no seal", "missing")


@pytest.mark.parametrize("how", HOW)
def test_what_is_not_as_it_was_written_is_never_loaded(
    how: str, unbuilt: pytest.MonkeyPatch, tmp_path: Path, copied: Path
) -> None:
    """Loading a truncated library ends the process; the control is that it is not loaded when named, either."""
    damaged(copied, how)
    unbuilt.setattr(library.ctypes, "CDLL", lambda path: pytest.fail(f"loaded {path}"))
    with pytest.raises(build.Unavailable, match=r"cannot load the compiled pass from .*compile it again"):
        library._load(copied)
    assert build.damage(copied) is not None


def test_what_is_as_it_was_written_is_loaded(copied: Path) -> None:
    """Control."""
    assert build.damage(copied) is None
    assert library._load(copied).threaded in (True, False)


@pytest.mark.parametrize("how", ["one bit", "a folder"])
def test_a_damaged_cache_is_built_again_or_gone_around(
    how: str, unbuilt: pytest.MonkeyPatch, tmp_path: Path, copied: Path
) -> None:
    unbuilt.setenv("SPECDEC_CACHE", str(tmp_path))
    damaged(copied, how)
    assert library.why_not() is None  # and no warning: they are errors here
    assert (build.damage(copied) is None) == (how != "a folder")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The library that this process uses, in a cache folder that it has not looked into."""
    kept = build.compiled(Path(__file__).parents[3] / ".pytest_cache" / "native")
    (tmp_path / "native").mkdir(mode=0o700)
    for file in (kept, build.seal_of(kept)):
        (tmp_path / "native" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "native" / kept.name


def test_a_build_that_is_killed_leaves_nothing_that_is_loaded(tmp_path: Path) -> None:
    """Killed at any moment of the last part: what lies there is either finished, or built again."""
    code = """
import os, sys
from pathlib import Path
from specdec.verify.native import build
where, moment = Path(sys.argv[1]), int(sys.argv[2])
build._compiler = lambda: ["true"]
def fake(command):
    if "-o" in command:
        Path(command[command.index("-o") + 1]).write_bytes(b"library" * 1000)
    return 0, b""
build._run = fake
done = [0]
def step(real):
    def other(*arguments):
        done[0] += 1
        if done[0] == moment:
            os.kill(os.getpid(), 9)
        return real(*arguments)
    return other
os.replace, build._flush = step(os.replace), step(build._flush)
path = build.compiled(where)
assert build.damage(path) is None
print(path.name)
"""
    root = Path(__file__).resolve().parents[3]

    def run(moment: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(tmp_path), str(moment)]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)

    for moment in (2, 4):
        assert run(moment).returncode == -9
        for path in tmp_path.glob("*.so"):
            assert build.damage(path) is not None
    finished = run(0)
    assert finished.returncode == 0, finished.stderr
    assert [build.damage(path) for path in tmp_path.glob("*.so")] == [None]


def test_builders_of_two_processes_do_not_break_each_other(tmp_path: Path) -> None:
    """Each finds a whole library at the end, whoever wrote it."""
    code = """
import sys, time
from pathlib import Path
from specdec.verify.native import build
build._compiler = lambda: ["true"]
def fake(command):
    if "-o" in command:
        Path(command[command.index("-o") + 1]).write_bytes(b"library" * 100000)
    return 0, b""
build._run = fake
time.sleep(max(0, float(sys.argv[2]) - time.time()))
for _ in range(4):
    path = build.compiled(Path(sys.argv[1]))
    found = build.damage(path)
    assert found is None or "missing" in found, found  # another one has just damaged it
    path.unlink(missing_ok=True)
build.compiled(Path(sys.argv[1]))
"""
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", code, str(tmp_path), str(time.time() + 6)]
    both = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
    assert [build.damage(path) for path in tmp_path.glob("*.so")] == [None]
    assert not list(tmp_path.glob("building-*"))


def test_a_compiler_that_leaves_a_child_does_not_outlast_its_time(unbuilt: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The child holds the compiler's output open; whoever waits for that waits for the child."""
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nsleep 300 &\necho $! > " + str(tmp_path / "child") + "\nwait\n")
    compiler.chmod(0o755)
    unbuilt.setenv("CC", str(compiler))
    unbuilt.setattr(build, "_SECONDS", 1)
    start = time.monotonic()
    with pytest.raises(build.Unavailable, match="timed out"):
        build.compiled(tmp_path / "out")
    assert time.monotonic() - start < 60
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the compiler's child still runs")


def test_the_cache_folder(unbuilt: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kept there once; compiled again if damaged; not used if others can write there, or if nothing can be."""
    unbuilt.setenv("SPECDEC_CACHE", str(tmp_path))

    def kept() -> list[Path]:
        library._search.cache_clear()
        assert library.why_not() is None
        return list((tmp_path / "native").glob("*.so"))

    first = tmp_path / "native" / build.compiled(tmp_path / "elsewhere").name
    first.parent.mkdir(mode=0o700)
    first.write_bytes(b"")
    assert kept() == [first]
    assert first.stat().st_size > 1000
    made = first.stat().st_mtime_ns
    assert kept() == [first]
    assert first.stat().st_mtime_ns == made
    first.unlink()  # the file that this process has loaded stays as it is
    first.write_bytes(b"what somebody else put there")
    first.parent.chmod(0o777)
    kept()
    assert first.read_bytes() == b"what somebody else put there"
    unbuilt.setenv("SPECDEC_CACHE", "/proc/nowhere")
    library._search.cache_clear()
    assert library.why_not() is None
