"""Generated texts, each token marked by where it came from."""

from __future__ import annotations

import html
from typing import Any

from specdec.experiments.accept.metrics import Runs
from specdec.experiments.accept.options import UNRECORDED

MOST = 8
"""Texts shown."""


def texts(runs: Runs) -> str:
    """HTML of a few texts: of each temperature's fastest drafting cells, one text per domain by turns."""
    tokenizer = _tokenizer(runs)
    legend = (
        '<p class="note"><span style="background:#d4efd4">accepted</span>: drafted and kept; '
        '<b style="background:#ffd9b3">recovered</b>: the target\'s own, after a rejected draft; '
        '<u style="background:#d6e4fa">bonus</u>: the target\'s own, after everything was accepted. '
        "A bar ends each step.</p>"
    )
    parts = [legend]
    domains = runs.domains()
    for number, cell in enumerate(_chosen(runs)):
        entries = runs.of(cell)
        domain = domains[number % len(domains)]
        entry = next((one for one in entries if one["domain"] == domain), entries[0])
        for turn in entry["turns"][:1]:
            title = html.escape(f"{cell} on {entry['prompt']}")
            rate = len(turn["token_ids"]) / max(1, len(turn["accepted"]))
            parts.append(f"<h3>{title}: {rate:.2f} tokens per step</h3><pre>{marked(turn, tokenizer)}</pre>")
    return "\n".join(parts)


def marked(turn: dict[str, Any], tokenizer: Any) -> str:
    """One turn's tokens as HTML spans of class a, r or b."""
    pieces, known = [], ""
    ids = turn["token_ids"]
    for at, kind in zip(range(len(ids)), turn["kinds"], strict=False):
        text = _decode(tokenizer, ids[: at + 1])
        if text.endswith("\ufffd") and at + 1 < len(ids):
            piece = ""  # half a character: it shows with the token that completes it
        else:
            piece, known = text[len(known) :], text
        shown = html.escape(piece).replace("\n", "↵\n") if piece.strip(" ") else html.escape(piece)
        bar = "" if kind == "a" else '<span class="p">|</span>'
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
    from specdec.experiments.accept.options import AcceptOptions
    from specdec.kv.errors import SpecdecError
    from specdec.pairing.loading import load_tokenizer

    known: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in runs.options.items()
    }
    try:
        pair = AcceptOptions(**{name: known[name] for name in known if name not in UNRECORDED}).chosen_pair()
        return load_tokenizer(pair.location(pair.target), pair.target.revision)
    except (ValueError, TypeError, SpecdecError):
        return None
