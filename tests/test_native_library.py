"""Which compiled library a process uses: its own, a named one, or none and one warning; never somebody else's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor

import specdec
from specdec.verify.direct import direct_pass
from specdec.verify.native import build, library, native_pass

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
    assert native_pass(direct_pass(model)) is None  # type: ignore[arg-type]
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


def test_the_cache_folder(unbuilt: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kept there once; compiled again if damaged; not used if others can write there, or if nothing can be."""
    unbuilt.setenv("SPECDEC_CACHE", str(tmp_path))

    def kept() -> list[Path]:
        library._search.cache_clear()
        assert library.why_not() is None
        return list((tmp_path / "native").glob("*"))

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
