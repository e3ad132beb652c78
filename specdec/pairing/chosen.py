"""Which models a user means: a pair by name, or a target and a draft named by themselves. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from specdec.pairing.create import pair_name
from specdec.pairing.errors import PairError
from specdec.pairing.registry import find_pair
from specdec.pairing.runnable import refusal
from specdec.pairing.schema import WITHOUT_MODEL, Draft, Drafting, Pair, Target, home_expanded
from specdec.shipped import DEFAULT_PAIR


def chosen_pair(
    pair: str | Path | None = None, target: str | None = None, draft: str | None = None, gguf_file: str | None = None
) -> Pair:
    """What `--pair`, `--target`, `--draft` and `--gguf-file` mean together, as a pair that this library runs.

    Args:
        pair: name, TOML file or folder with target/ and draft/; None: the target, or the default pair.
        target: folder, GGUF file or hub id; what drafts is then "ngram" unless `draft` says otherwise.
        draft: folder, hub id, "ngram", "suffix", "self" or "self:int8"; None: the pair's own, which alone comes with
            the pair's settings.
        gguf_file: name of a GGUF file in the target's folder or hub repository.

    Raises:
        PairError: contradictory options, a folder that does not exist, no such pair, or one that is not run here.
    """
    if target is not None and pair is not None:
        raise PairError("expected --target or --pair, got both")
    if gguf_file is not None and target is None:
        raise PairError("--gguf-file: expected the name of a file in the folder or repository that --target names")
    if target is None:
        found = find_pair(DEFAULT_PAIR if pair is None else pair)
        if draft is None:
            if (why := refusal(found)) is not None:
                raise PairError(why)
            return found
        return replace(found, draft=_draft(draft), drafting=Drafting(), vocabulary="shared")
    own = Target(**_place("--target", target))
    if gguf_file is not None:
        if own.path is not None and not (Path(own.path) / gguf_file).is_file():
            raise PairError(f"--gguf-file: expected a file in {target!r}, found no {gguf_file!r} there")
        own = replace(own, gguf_file=gguf_file)
    words = pair_name(own.gguf_file or target, draft or "ngram")
    return Pair(words, f"{draft or 'n-grams'} on {target}", own, _draft(draft or "ngram"), dtype="auto")


def _draft(name: str) -> Draft:
    if (word := Draft.named(name)) is not None:
        return word
    place = _place("--draft", name)
    if "model" in place and (meant := get_close_matches(name.partition(":")[0].lower(), WITHOUT_MODEL, 1, 0.8)):
        raise PairError(
            f"--draft: expected {', '.join(WITHOUT_MODEL)}, none, a folder or a hub id, got {name!r}; did you mean "
            f"{meant[0]}?"
        )
    return Draft("model", **place)


def _place(option: str, name: str) -> dict[str, Any]:
    """Where a model is: a folder that exists, a GGUF file, or something that can be a hub id (`owner/name`)."""
    folder = home_expanded(Path(name))
    if folder.is_dir():
        return {"path": str(folder.absolute())}
    if folder.suffix == ".gguf" and folder.is_file():
        return {"path": str(folder.parent.absolute()), "gguf_file": folder.name}
    if name.startswith((".", "~", "/")) or name.count("/") > 1 or folder.exists():
        raise PairError(f"{option}: expected a folder with a saved model, a .gguf file or a hub id, got {name!r}")
    return {"model": name}
