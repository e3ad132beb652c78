"""Is a pair sound? Everything that can be told without loading a model or asking the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from specdec.pairing.devices import DEVICES, LAUNCHES
from specdec.pairing.errors import PairError
from specdec.pairing.folders import folder_facts
from specdec.pairing.schema import (
    DTYPES,
    KINDS,
    MOST,
    MOST_NODES,
    RULES,
    VOCABULARIES,
    WITHOUT_MODEL,
    Draft,
    Facts,
    Pair,
    Published,
    Target,
    nodes_of_widths,
)
from specdec.pairing.tables import shown

MAX_PADDING = 1024
"""Embeddings of one tokenizer are padded to multiples of up to 512 or so; larger differences are other vocabularies."""
_WITHOUT_MODEL = {
    "ngram": "an n-gram drafter",
    "suffix": "a suffix drafter",
    "self": "a target that drafts for itself",
}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_FORM = re.compile(r"[a-z]+[\d,-]*")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_REVISION = re.compile(r"[^\s\x00-\x1f\x7f-][^\s\x00-\x1f\x7f]*")
"""Not what a program could take for an option."""
_POSITIVE = (
    "num_parameters", "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
    "vocab_size",
)  # fmt: skip


def problems(pair: Pair) -> list[str]:
    """What is wrong with `pair`, in words; empty when nothing is."""
    return [*_pair(pair), *_drafting(pair), *_models(pair), *_vocabularies(pair), *_published(pair)]


def _pair(pair: Pair) -> Iterator[str]:
    if not _NAME.fullmatch(pair.name) and pair.folder is not None and not (pair.folder / "target").is_dir():
        yield f"name: expected lower-case letters, digits, '.', '_' and '-', got {pair.name!r}"
    yield from _one_of("dtype", pair.dtype, DTYPES)
    yield from _one_of("vocabulary", pair.vocabulary, VOCABULARIES)
    yield from _one_of("[draft] kind", pair.draft.kind, KINDS)


def _drafting(pair: Pair) -> Iterator[str]:
    drafting = pair.drafting
    yield from _one_of("[drafting] rule", drafting.rule, RULES)
    if drafting.k is not None and drafting.tree is not None:
        yield "[drafting]: expected k or tree, got both; a tree of [1, 1, 1] is k = 3"
    for name in ("k", "suggested_k"):
        value = getattr(drafting, name)
        if value is not None and value < 1:
            yield f"[drafting] {name}: expected at least 1, got {shown(value)}; leave it out and the library chooses"
        elif value is not None and value > MOST_NODES:
            yield f"[drafting] {name}: expected at most {MOST_NODES} tokens, got {shown(value)}"
    if drafting.tree is not None and (not drafting.tree or min(drafting.tree) < 1):
        yield f"[drafting] tree: expected children per level such as [3, 2, 1], got {shown(list(drafting.tree))}"
    elif drafting.tree is not None and nodes_of_widths(drafting.tree) > MOST_NODES:
        yield f"[drafting] tree: expected at most {MOST_NODES} nodes in all, got more: {shown(list(drafting.tree))}"
    if drafting.tree is not None and pair.draft.kind in ("ngram", "suffix"):
        yield f"[drafting] tree: {_WITHOUT_MODEL[pair.draft.kind]} has no static tree; use k"


def _models(pair: Pair) -> Iterator[str]:
    yield from _model("[target]", pair, pair.target)
    if pair.draft.form is not None and (pair.draft.kind != "self" or not _FORM.fullmatch(pair.draft.form)):
        yield f'[draft] form: expected one such as int8, beside kind = "self" only, got {pair.draft.form!r}'
    if pair.draft.kind not in WITHOUT_MODEL:
        yield from _model("[draft]", pair, pair.draft)
        return
    own = [f.name for f in fields(Draft) if f.name not in ("kind", "form")]
    given = [name for name in own if getattr(pair.draft, name) not in (None, "", False)]
    if given:
        yield f"[draft]: {_WITHOUT_MODEL[pair.draft.kind]} has no draft model; leave out {', '.join(given)}"


def _model(where: str, pair: Pair, part: Target | Draft) -> Iterator[str]:
    given = [name for name in ("model", "path", "package") if getattr(part, name) is not None]
    if len(given) != 1:
        yield (
            f"{where}: expected model (a hub id), path (a folder) or package (of Python), got "
            f"{' and '.join(given) or 'none of them'}"
        )
        return
    if part.model is not None and not _HUB_ID.fullmatch(part.model):
        yield f"{where} model: expected a hub id such as owner/name, got {part.model!r}; a folder goes into path"
    if part.package is not None and not _PACKAGE.fullmatch(part.package):
        yield f"{where} package: expected the name of a Python package, got {part.package!r}"
    if part.package is not None and part.gguf_file is None:
        yield f"{where} gguf_file missing; add it: the name of the file that the package {part.package!r} brings"
    if part.path is not None and "\0" in part.path:
        yield f"{where} path: expected a folder, got {part.path!r}"
        return
    if part.revision is not None and not _REVISION.fullmatch(part.revision):
        yield f"{where} revision: expected a branch, tag or commit (of a package, its version), got {part.revision!r}"
    if part.path is not None and part.revision is not None:
        yield f"{where} revision: a folder has none; leave it out"
    if part.facts is not None:
        yield from (f"{where} facts: {problem}" for problem in _facts(part.facts))
    if part.path is not None:
        folder = Path(pair.location(part))
        if part.gguf_file is not None:
            if not (folder / part.gguf_file).is_file():
                yield f"{where} gguf_file: found no {part.gguf_file!r} in {part.path!r}"
        elif not (folder / "config.json").is_file():
            yield f"{where} path: expected a folder with a saved model, found no config.json in {part.path!r}"
        elif part.facts is not None:
            yield from (f"{where} facts: {problem}" for problem in _against_folder(part.facts, folder))


def _facts(facts: Facts) -> Iterator[str]:
    for name in _POSITIVE:
        value = getattr(facts, name)
        if not 1 <= value <= MOST:
            yield f"{name}: expected at {'least 1' if value < 1 else f'most {MOST:.0e}'}, got {shown(value)}"
            return
    if facts.num_heads % facts.num_kv_heads:
        yield f"expected num_heads to be a multiple of num_kv_heads, got {facts.num_heads} and {facts.num_kv_heads}"
    if facts.step_parameters > facts.num_parameters or facts.step_parameters < 1:
        yield (
            f"expected a pass to read between 1 and all {facts.num_parameters} parameters, got {facts.step_parameters}"
        )
    if facts.draft_vocab_size is not None and not 1 <= facts.draft_vocab_size <= facts.vocab_size:
        yield f"draft_vocab_size: expected 1 to vocab_size {facts.vocab_size}, got {facts.draft_vocab_size}"


def _against_folder(facts: Facts, folder: Path) -> Iterator[str]:
    """Stated facts and the model's own files must agree."""
    try:
        found = folder_facts(folder)
    except PairError as error:
        yield str(error)
        return
    for name in ("architecture", "tied_embeddings", *_POSITIVE):
        stated, own = getattr(facts, name), getattr(found, name)
        if stated != own:
            yield f"{name}: the pair says {stated!r}, the model's files say {own!r}"


def _vocabularies(pair: Pair) -> Iterator[str]:
    target, draft = pair.target.facts, pair.draft.facts
    if target is None or draft is None or pair.vocabulary != "shared":
        return
    if abs(target.vocab_size - draft.vocab_size) > MAX_PADDING:
        yield (
            f"mismatched vocabularies: the target has {target.vocab_size} tokens, the draft {draft.vocab_size}, which "
            'is no padding; use a draft of the target\'s family, or say vocabulary = "different" (exports only)'
        )


def _published(pair: Pair) -> Iterator[str]:
    for number, entry in enumerate(pair.published, 1):
        yield from (f"[[published]] {number}: {problem}" for problem in _entry(entry))


def _entry(entry: Published) -> Iterator[str]:
    yield from _one_of("device", entry.device, tuple(DEVICES))
    yield from _one_of("launch", entry.launch, LAUNCHES)
    for name, least in (("speedup", 0.0), ("weight_bits", 0.0)):
        if not least < getattr(entry, name) <= MOST:
            yield f"{name}: expected more than {least:g}, got {getattr(entry, name)}"
    if not 0 <= entry.temperature <= MOST:
        yield f"temperature: expected at least 0, got {entry.temperature}"
    if not 0 <= entry.depth <= MOST_NODES or not 1 <= entry.nodes <= MOST_NODES or not 1 <= entry.num_devices <= MOST:
        yield f"expected depth 0 to {MOST_NODES}, nodes 1 to {MOST_NODES} and num_devices >= 1"
    if entry.tokens_per_pass is not None and not 1 <= entry.tokens_per_pass <= entry.nodes + 1:
        yield (
            f"tokens_per_pass: expected 1 to nodes + 1 = {entry.nodes + 1} (the target's own token counts), got "
            f"{entry.tokens_per_pass}"
        )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> Iterator[str]:
    if value not in allowed:
        yield f"{name}: expected one of {', '.join(allowed)}, got {value!r}"
