"""A new pair from two models, with what their files on this machine say about them. Never asks the hub."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from specdec.pairing.errors import PairError
from specdec.pairing.folders import folder_facts
from specdec.pairing.registry import checked
from specdec.pairing.schema import Draft, Drafting, Facts, Pair, Target, home_expanded


def new_pair(
    target: str,
    draft: str,
    name: str | None = None,
    *,
    drafting: Drafting = Drafting(),  # noqa: B008 (frozen)
    dtype: str = "bfloat16",
    revision: str | None = None,
    draft_revision: str | None = None,
    folder: Path | None = None,
) -> Pair:
    """The pair of `target` with `draft`, checked.

    Args:
        target, draft: hub ids or folders; draft may be "ngram", "suffix", "self" or "self:int8".
        name: by default made of the two models' names.
        folder: where its file will lie; paths of models are written relative to it where they can be.

    Raises:
        PairError: anything that would make the file unsound.
    """
    base = (folder or Path()).resolve()
    first = Target(*_where(target, base), revision=revision, facts=_facts(target, revision))
    own = Draft.named(draft)
    if own is not None:
        second = replace(own, revision=draft_revision)
    else:
        second = Draft("model", *_where(draft, base), revision=draft_revision, facts=_facts(draft, draft_revision))
    return checked(
        Pair(
            name=name or pair_name(target, draft),
            summary=f"{_short(draft)} drafts for {_short(target)}"
            if own is None or own.kind != "ngram"
            else f"n-grams on {_short(target)}",
            target=first,
            draft=second,
            drafting=drafting,
            dtype=dtype,
            folder=base,
        )
    )


def _where(model: str, base: Path) -> tuple[str | None, str | None]:
    """(model, path): one of them."""
    folder = home_expanded(Path(model))
    if not folder.is_dir():
        if model.startswith((".", "~", "/")):
            raise PairError(f"expected a folder with a saved model or a hub id such as owner/name, got {model!r}")
        return model, None
    resolved = folder.resolve()
    return None, str(resolved.relative_to(base) if resolved.is_relative_to(base) else resolved)


def _facts(model: str, revision: str | None) -> Facts | None:
    """From a folder, or from what an earlier download left in the hub's cache; None where there is neither."""
    folder = home_expanded(Path(model))
    if folder.is_dir():
        return folder_facts(folder)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None  # the checks say what a hub id looks like
    if not isinstance(cached, str):
        return None
    try:
        return folder_facts(Path(cached).parent)
    except PairError:
        return None  # config.json alone was downloaded


def pair_name(target: str, draft: str) -> str:
    """Made of both models' names."""
    return re.sub(r"[^a-z0-9._-]+", "-", f"{_short(target)}-{_short(draft)}".lower()).strip("-._") or "pair"


def _short(model: str) -> str:
    return Path(model).name
