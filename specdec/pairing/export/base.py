"""What an export is, and the remarks that several engines share."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from typing import Any

from specdec.pairing.errors import PairError
from specdec.pairing.schema import Pair
from specdec.pairing.tables import one_line

LARGE = 70e9
"""Bytes of weights above which a remark about several devices is due."""
_BYTES = {"float32": 4, "float64": 8}


@dataclass(frozen=True)
class Export:
    """One engine's arguments for one pair.

    commands: argument vectors, in the order to run them. files: name to text, for engines that read a file.
    arguments: the speculative part alone, as the engine's own names and values. notes: what does not carry over, and
    what to look after.
    """

    engine: str
    arguments: dict[str, Any]
    commands: tuple[tuple[str, ...], ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Ready to paste: remarks as comments, files as here-documents, then the commands.

        Whatever a pair's file says stays where it belongs: a remark on its own line, an argument in its quotes.
        """
        parts = [f"# {one_line(note)}" for note in self.notes]
        parts += [_here_document(name, text) for name, text in self.files.items()]
        parts += [_wrapped(command) for command in self.commands]
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "arguments": self.arguments,
            "commands": [list(command) for command in self.commands],
            "files": self.files,
            "notes": list(self.notes),
        }


def shared_notes(pair: Pair, chooses: bool = False) -> list[str]:
    """Remarks that are due whatever the engine. chooses: it finds a draft length by itself."""
    notes = []
    if pair.drafting.k is None and pair.drafting.tree is None and not chooses:
        suggested = pair.drafting.suggested_k is not None
        why = "the pair's suggestion" if suggested else f"the default for {pair.draft.kind} drafts"
        notes.append(
            f"specdec chooses the draft length by itself; engines need a number: {pair.draft_length} is {why}. Tune it."
        )
    facts = pair.target.facts
    if facts is not None and facts.num_parameters * _BYTES.get(pair.dtype, 2) > LARGE:
        size = facts.num_parameters * _BYTES.get(pair.dtype, 2) / 1e9
        notes.append(f"The target's weights are {size:.0f} GB in {pair.dtype}: shard or quantise it.")
    if pair.target.gated or pair.draft.gated:
        notes.append("A model is gated on the hub: accept its licence there and log in (`hf auth login`).")
    if pair.target.path is not None or pair.draft.path is not None:
        notes.append("Models are folders of this machine; the engine must see them under the same path.")
    return notes


def lossy_note(pair: Pair, engine: str) -> list[str]:
    """For the rule that changes the law of the text."""
    if pair.drafting.rule != "typical":
        return []
    return [f"rule = typical (lossy) does not carry over: {engine} is left at its own lossless verification."]


def chain_note(pair: Pair, engine: str) -> list[str]:
    """For engines that draft chains only."""
    if pair.drafting.tree is None:
        return []
    return [
        f"tree = {list(pair.drafting.tree)} does not carry over: {engine} drafts chains here; "
        f"{pair.draft_length} tokens, the tree's depth."
    ]


def refuse(pair: Pair, engine: str, why: str, instead: str) -> PairError:
    return PairError(f"pair {pair.name!r} cannot be exported to {engine}: {why}; {instead}")


def yaml(settings: dict[str, Any], indent: str = "") -> str:
    """One setting a line; JSON is YAML."""
    return "".join(f"{indent}{name}: {_json(value)}\n" for name, value in settings.items())


def _json(value: Any) -> str:
    """With everything escaped that YAML takes for a line break or refuses, as YAML escapes it."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def _here_document(name: str, text: str) -> str:
    end = "END"
    while end in text.splitlines():
        end += "_"
    return f"cat > {shlex.quote(name)} <<'{end}'\n{text}{end}"


def _wrapped(command: tuple[str, ...]) -> str:
    """One option with its values per line."""
    lines: list[str] = []
    for part in command:
        if part.startswith("--") and lines:
            lines.append(shlex.quote(part))
        elif lines:
            lines[-1] += f" {shlex.quote(part)}"
        else:
            lines.append(shlex.quote(part))
    return " \\\n    ".join(lines)
