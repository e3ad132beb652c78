"""Where prompts come from, by name: `shipped`, `instructions`, `stdlib`, or a form and a file (SOURCES)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specdec.prompt_files import Prompt, WorkloadError, read, read_prompts

SHIPPED = {"shipped": "prompts.jsonl", "instructions": "instructions.jsonl"}
"""Our own: beginnings of texts (code, edit, prose, list); what chat models are asked (summary, code, edit, chat)."""
SOURCES = (*SHIPPED, "stdlib", "spec-bench:FILE", "speed-bench:FILE", "jsonl:FILE", "file:FILE")
STDLIB_TOKENS = 128
"""Length of a prompt from a held-out library file."""


@dataclass(frozen=True)
class Source:
    """A set of prompts. name: one of the kinds in SOURCES; path: its file, None where it needs none; chat: of a user's
    own file (`file`), see Prompt."""

    name: str
    path: Path | None = None
    chat: bool = True

    @staticmethod
    def parse(text: str) -> Source:
        """`"stdlib"` or `"spec-bench:question.jsonl"`.

        Raises:
            WorkloadError: anything else.
        """
        name, _, path = text.partition(":")
        needs_file = {source.partition(":")[0]: ":" in source for source in SOURCES}
        if name not in needs_file or needs_file[name] != bool(path):
            raise WorkloadError(f"prompts: expected one of {', '.join(SOURCES)}, got {text!r}")
        return Source(name, Path(path).expanduser() if path else None)

    def load(self, tokenizer: Any, num: int | None = None, seed: int = 0) -> list[Prompt]:
        """The prompts; `num` of them, as many of each domain as possible, in a fixed order; None: all.
        A user's own file (`file`) is taken whole.

        Args:
            tokenizer: needed by `stdlib`, whose prompts are cut by tokens.

        Raises:
            WorkloadError: see `read`.
        """
        if self.name == "stdlib":
            from specdec.experiments.corpus import held_out_prompts

            found = held_out_prompts(tokenizer, 8 if num is None else num, STDLIB_TOKENS, seed)
            return [
                Prompt(f"stdlib-{seed}-{i}", "stdlib", (tokenizer.decode(ids),), ids=tuple(ids))
                for i, ids in enumerate(found)
            ]
        if self.name == "file":
            assert self.path is not None
            return read_prompts(self.path, self.chat)
        prompts = (
            read(Path(__file__).with_name(SHIPPED[self.name]), "jsonl")
            if self.path is None
            else read(self.path, self.name)
        )
        return prompts if num is None else _spread(prompts, num)

    def __str__(self) -> str:
        return self.name if self.path is None else f"{self.name}:{self.path.name}"


def chosen_sources(texts: Iterable[str], files: Sequence[Path], chat: bool) -> list[Source]:
    """The named sources, each once; a user's own files take their place. chat: see Prompt.

    Raises:
        WorkloadError: see `Source.parse`.
    """
    if files:
        return [Source("file", file, chat) for file in files]
    return [replace(Source.parse(text), chat=chat) for text in dict.fromkeys(texts)]


def _spread(prompts: list[Prompt], num: int) -> list[Prompt]:
    """`num` prompts: the first of every domain, then the second of every domain, and so on."""
    seen: dict[str, int] = {}
    turns = []
    for prompt in prompts:
        seen[prompt.domain] = seen.get(prompt.domain, -1) + 1
        turns.append(seen[prompt.domain])
    return [prompt for _, prompt in sorted(zip(turns, prompts, strict=True), key=lambda pair: pair[0])][:num]
