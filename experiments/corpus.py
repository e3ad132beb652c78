"""The offline corpus: the Python standard library of the running interpreter (PSF-2.0).

The text is read where it is installed and never copied. Whole files are held out by a hash of their relative path:
another patch release of Python, which adds and removes a few files, leaves every other file on its side of the split.
"""

from __future__ import annotations

import hashlib
import platform
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

HELD_OUT_FRACTION = 0.04
DROPPED_DIRECTORIES = frozenset(
    {"encodings", "lib2to3", "idlelib", "turtledemo", "ensurepip", "pydoc_data", "site-packages", "dist-packages"}
)
# Characters tokenised per wanted token: far above the 3.7 a token has on average, so that a prompt is never too short
# by accident, and far below a whole file, so that prompts are cheap.
CHARS_PER_TOKEN = 16


class Encoder(Protocol):
    """What `held_out_prompts` needs of a tokenizer; every `transformers` tokenizer has it."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class CorpusFile:
    """One source file: its path below the library folder (always with `/`) and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class CorpusRecord:
    """What a run has to write down about its data to be repeatable."""

    python_version: str
    num_training_files: int
    num_held_out_files: int
    num_training_bytes: int
    num_held_out_bytes: int
    sha256: str


def is_dropped(relative_path: str) -> bool:
    """True for tests, tables, tools, generated text and build settings: they teach little or differ between builds."""
    parts = relative_path.split("/")
    return any(part.startswith("test") or part in DROPPED_DIRECTORIES for part in parts) or parts[-1].startswith(
        "_sysconfigdata"
    )


def is_held_out(relative_path: str) -> bool:
    """True for about 4 % of all paths; depends on the path alone."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64


@lru_cache(maxsize=2)
def corpus_files(root: Path | None = None) -> tuple[CorpusFile, ...]:
    """All kept files below `root` (default: the running interpreter's standard library), sorted by path.

    Raises:
        FileNotFoundError: if there is no Python source there (some distributions ship byte code alone).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = []
    for file in root.rglob("*.py"):
        path = file.relative_to(root).as_posix()
        if is_dropped(path):
            continue
        try:
            files.append(CorpusFile(path, file.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue  # a few files declare another encoding; leaving them out is the same on every machine
    if not files:
        raise FileNotFoundError(
            f"expected Python source files of the standard library in {root}, found none; "
            "use an interpreter that ships its .py files (python.org, Debian, pyenv, uv do)"
        )
    return tuple(sorted(files, key=lambda file: file.path))


def training_files() -> list[CorpusFile]:
    return [file for file in corpus_files() if not is_held_out(file.path)]


def held_out_files() -> list[CorpusFile]:
    return [file for file in corpus_files() if is_held_out(file.path)]


def training_texts() -> list[str]:
    """Texts to learn from, one per file, in path order."""
    return [file.text for file in training_files()]


def held_out_texts() -> list[str]:
    """Texts no shipped model has seen, one per file, in path order."""
    return [file.text for file in held_out_files()]


def corpus_record() -> CorpusRecord:
    """Version, sizes and a sha256 over all kept paths and texts."""
    digest = hashlib.sha256()
    for file in corpus_files():
        digest.update(file.path.encode() + b"\0" + file.text.encode() + b"\0")
    training, held_out = training_files(), held_out_files()
    return CorpusRecord(
        python_version=platform.python_version(),
        num_training_files=len(training),
        num_held_out_files=len(held_out),
        num_training_bytes=sum(len(file.text.encode()) for file in training),
        num_held_out_bytes=sum(len(file.text.encode()) for file in held_out),
        sha256=digest.hexdigest(),
    )


def held_out_prompts(tokenizer: Encoder, num: int, prompt_tokens: int, seed: int = 0) -> list[list[int]]:
    """`num` different prompts of exactly `prompt_tokens` ids, each starting at a line start of a held-out file.

    Files are taken in turn, so that the prompts cover as many files as possible; the line inside a file is drawn from
    `seed`. The same arguments give the same prompts.

    Raises:
        ValueError: if a count is not positive or the held-out files do not hold that many prompts.
    """
    if num < 1 or prompt_tokens < 1:
        raise ValueError(f"expected num >= 1 and prompt_tokens >= 1, got num={num}, prompt_tokens={prompt_tokens}")
    return prompts_from(held_out_texts(), tokenizer, num, prompt_tokens, seed)


def prompts_from(texts: Sequence[str], tokenizer: Encoder, num: int, prompt_tokens: int, seed: int) -> list[list[int]]:
    """Prompts as `held_out_prompts` makes them, from any texts."""
    rng = random.Random(seed)
    # Every non-empty line of every text is a possible start; each text's starts are visited in a random order.
    starts = []
    for text in texts:
        offsets, offset = [], 0
        for line in text.splitlines(keepends=True):
            if line.strip():
                offsets.append(offset)
            offset += len(line)
        rng.shuffle(offsets)
        starts.append(offsets)
    order = list(range(len(texts)))
    rng.shuffle(order)
    prompts: list[list[int]] = []
    while len(prompts) < num:
        before = len(prompts)
        for index in order:
            while starts[index] and len(prompts) < num:
                offset = starts[index].pop()
                excerpt = texts[index][offset : offset + CHARS_PER_TOKEN * prompt_tokens]
                ids = tokenizer.encode(excerpt, add_special_tokens=False)[:prompt_tokens]
                if len(ids) == prompt_tokens:
                    prompts.append(ids)
                    break
        if len(prompts) == before:
            raise ValueError(
                f"expected at least {num} prompts of {prompt_tokens} tokens in {len(texts)} texts, "
                f"found {len(prompts)}; ask for fewer or shorter prompts"
            )
    return prompts
