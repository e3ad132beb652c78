"""Generated texts, each token marked by where it came from."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

from specdec.experiments.accept.metrics import Runs
from specdec.kv.errors import SpecdecError
from specdec.pairing.chosen import chosen_pair
from specdec.pairing.loading import pair_tokenizer

MOST = 8
"""Texts shown."""


def texts(runs: Runs) -> Iterator[tuple[str, str]]:
    """A title and a marked text (see `marked`) each: of each temperature's fastest drafting cells, one text per domain
    by turns."""
    tokenizer = _tokenizer(runs)
    domains = runs.domains()
    for number, cell in enumerate(_chosen(runs)):
        entries = runs.of(cell)
        domain = domains[number % len(domains)]
        entry = next((one for one in entries if one["domain"] == domain), entries[0])
        for turn in entry["turns"][:1]:
            rate = len(turn["token_ids"]) / max(1, len(turn["accepted"]))
            yield f"{cell} on {entry['prompt']}: {rate:.2f} tokens per step", marked(turn, tokenizer)


def marked(turn: dict[str, Any], tokenizer: Any) -> str:
    """One turn's tokens as HTML spans of class a, r or b (where each came from); a bar ends each step."""
    pieces, known = [], ""
    ids = turn["token_ids"]
    for at, kind in zip(range(len(ids)), turn["kinds"], strict=False):
        text = _decode(tokenizer, ids[: at + 1])
        if text.endswith("\ufffd") and at + 1 < len(ids):
            piece = ""  # half a character: it shows with the token that completes it
        else:
            piece, known = text[len(known) :], text
        bar = "" if kind == "a" else '<span class="p">|</span>'
        shown = html.escape(piece).replace("\n", "↵\n")
        pieces.append(f'<span class="{kind}">{shown}</span>{bar}')
    return "".join(pieces)


def _chosen(runs: Runs) -> list[Any]:
    """Up to MOST cells: by temperature in turn, the settings with most tokens per step first."""
    by_temperature: dict[float, list[Any]] = {}
    for cell in runs.cells():
        if not cell.is_plain and (stats := runs.stats(cell)) is not None:
            by_temperature.setdefault(cell.temperature, []).append((stats.tokens_per_step.value, str(cell), cell))
    ranked = [[cell for _, _, cell in sorted(found, reverse=True)] for found in by_temperature.values()]
    longest = max((len(found) for found in ranked), default=0)
    turns = [found[i] for i in range(longest) for found in ranked if i < len(found)]
    return turns[:MOST]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids)) + " "
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _tokenizer(runs: Runs) -> Any:
    """The pair's tokenizer; None (ids are shown) where the pair is not on this machine."""
    try:
        named = {name: runs.options.get(name) for name in ("target", "draft", "gguf_file")}
        pair = None if named["target"] is not None else runs.options["pair"]
        return pair_tokenizer(chosen_pair(pair, **named))
    except (KeyError, ValueError, SpecdecError):
        return None
