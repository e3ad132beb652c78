"""The corpus: one split that other patch releases keep, and prompts nobody trained on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from specdec.experiments import corpus


class Letters:
    """A tokenizer with one id per character."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]


def write_tree(root: Path, paths: list[str]) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"# {path}\n")
    return root


def test_split_is_disjoint_complete_and_about_four_percent():
    training = {file.path for file in corpus.training_files()}
    held_out = {file.path for file in corpus.held_out_files()}
    assert not training & held_out
    assert training | held_out == {file.path for file in corpus.corpus_files()}
    assert 0.01 < len(held_out) / len(training | held_out) < 0.10
    assert len(corpus.training_texts()) == len(training)
    assert len(corpus.held_out_texts()) == len(held_out)


@pytest.mark.parametrize(
    ("path", "held_out"),
    [("sched.py", True), ("email/__init__.py", True), ("token.py", True), ("os.py", False), ("json/decoder.py", False)],
)
def test_split_depends_on_the_path_alone(path: str, held_out: bool):
    # Fixed once: weights trained on one release must never have seen what another release holds out.
    assert corpus.is_held_out(path) is held_out


@pytest.mark.parametrize(
    ("path", "dropped"),
    [
        ("os.py", False),
        ("json/decoder.py", False),
        ("latest.py", False),
        ("test/test_os.py", True),
        ("unittest/test/support.py", True),
        ("idlelib/run.py", True),
        ("site-packages/numpy/core.py", True),
        ("pydoc_data/topics.py", True),
        ("_sysconfigdata__linux_x86_64-linux-gnu.py", True),
    ],
)
def test_filter_drops_tests_tables_and_generated_files(path: str, dropped: bool):
    assert corpus.is_dropped(path) is dropped


def test_files_are_sorted_and_undecodable_ones_left_out(tmp_path: Path):
    write_tree(tmp_path, ["b.py", "a/z.py", "a.py", "test/c.py", "notes.txt"])
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    assert [file.path for file in corpus.corpus_files(tmp_path)] == ["a.py", "a/z.py", "b.py"]


def test_a_folder_without_source_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"expected Python source files .* found none"):
        corpus.corpus_files(tmp_path)


def test_record_names_version_sizes_and_hash():
    record = corpus.corpus_record()
    assert record == corpus.corpus_record()
    assert record.python_version == ".".join(map(str, sys.version_info[:3]))
    assert record.num_training_files == len(corpus.training_files())
    assert record.num_training_bytes > 10 * record.num_held_out_bytes > 0
    assert len(record.sha256) == 64


def test_prompts_have_the_length_start_at_lines_and_are_held_out():
    prompts = corpus.held_out_prompts(Letters(), num=30, prompt_tokens=50)
    texts = ["\n" + file.text for file in corpus.held_out_files()]
    assert len({tuple(prompt) for prompt in prompts}) == 30
    for prompt in prompts:
        assert len(prompt) == 50
        assert any("\n" + "".join(map(chr, prompt)) in text for text in texts)


def test_prompts_are_a_function_of_the_seed():
    first = corpus.held_out_prompts(Letters(), num=10, prompt_tokens=20, seed=1)
    assert first == corpus.held_out_prompts(Letters(), num=10, prompt_tokens=20, seed=1)
    assert first != corpus.held_out_prompts(Letters(), num=10, prompt_tokens=20, seed=2)


def test_prompts_cover_the_files_in_turn():
    texts = ["a\n" * 100, "b\n" * 100, "c\n" * 100]
    letters = ["".join(map(chr, p))[0] for p in corpus.prompts_from(texts, Letters(), 6, 2, seed=0)]
    assert sorted(letters) == list("aabbcc")


def test_impossible_prompts_are_refused():
    with pytest.raises(ValueError, match="num >= 1"):
        corpus.held_out_prompts(Letters(), num=0, prompt_tokens=5)
    with pytest.raises(ValueError, match=r"expected at least 3 prompts of 2 tokens .* found 1"):
        corpus.prompts_from(["a\nb"], Letters(), num=3, prompt_tokens=2, seed=0)


def test_module_does_not_import_torch():
    code = "import sys, specdec.experiments.corpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
