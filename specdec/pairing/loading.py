"""From a pair to loaded models, with one clear error for each thing that can go wrong. Imports torch."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import errors as hub
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from specdec.kv.errors import SpecdecError, UnsupportedArgumentError
from specdec.pairing.copies import kept_copy
from specdec.pairing.errors import PairError
from specdec.pairing.packaged import packaged_file
from specdec.pairing.registry import checked, find_pair
from specdec.pairing.runnable import refusal
from specdec.pairing.schema import Draft, Pair, Target
from specdec.pairing.tables import one_line

MIN_SHARED_IDS = 0.9
"""Share of token ids that must mean the same in both vocabularies. Families differ in a few control tokens."""


def open_pair(
    pair: str | Path | Pair,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedModel | str, dict[str, Any]]:
    """What a Speculator on `pair` is made of: target, draft, and its other arguments.

    Args:
        dtype: of both models; None: the pair's on an accelerator, float32 on a CPU.
        device: None: the first CUDA device, a CPU where there is none.
        options: of Speculator; `k` or `tree` here replaces the pair's k and tree, `rule` its rule.

    Raises:
        UnsupportedArgumentError: no such pair, mistakes in its file, a kind of draft that is not run here, or
            mismatched vocabularies.
        SpecdecError: a model or tokenizer that cannot be loaded, saying what to do.
    """
    found = runnable_pair(pair)
    settings = dict(options or {})
    target, draft, tokenizer = load_pair(found, dtype, device)
    if "k" not in settings and "tree" not in settings:
        settings |= {"k": found.drafting.k, "tree": found.drafting.tree}
    return target, draft, {"rule": found.drafting.rule, "tokenizer": tokenizer, **settings}


def runnable_pair(pair: str | Path | Pair) -> Pair:
    """The pair, if this library can run it.

    Raises:
        UnsupportedArgumentError: no such pair, a file with mistakes, a kind of draft that is not run here, or two
            vocabularies.
    """
    try:
        found = checked(pair) if isinstance(pair, Pair) else find_pair(pair)
    except PairError as error:
        raise UnsupportedArgumentError(str(error)) from None
    why = refusal(found)
    if why is not None:
        raise UnsupportedArgumentError(why)
    return found


def load_pair(
    pair: str | Path | Pair, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedModel | str, Any]:
    """Load `(target, draft, tokenizer)`; the draft of a pair without a draft model is a word: "ngram", "self:int8".

    Arguments and errors are those of `Speculator.from_pair`.
    """
    found = runnable_pair(pair)
    where = default_device() if device is None else torch.device(device)
    width = pair_dtype(found, where) if dtype is None else dtype
    tokenizer = pair_tokenizer(found)
    if found.draft.word is not None:
        return load_part(found, "target", width, where), found.draft.word, tokenizer
    check_vocabularies(found, tokenizer)
    return load_part(found, "target", width, where), load_part(found, "draft", width, where), tokenizer


def default_device() -> torch.device:
    """Where models are loaded to: the first CUDA device, a CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pair_dtype(pair: Pair, device: torch.device) -> torch.dtype | str:
    """Half precision is slower than float32 on most CPUs, so a pair's dtype is for accelerators."""
    if device.type == "cpu":
        return torch.float32
    return "auto" if pair.dtype == "auto" else getattr(torch, pair.dtype)


def load_part(pair: Pair, role: str, dtype: torch.dtype | str, device: torch.device) -> PreTrainedModel:
    """The pair's "target" or "draft"; errors as in load_model."""
    place = found_at(pair, role)
    return load_model(role, place.name, dtype, device, place.revision, place.gguf_file)


def pair_tokenizer(pair: Pair, role: str = "target") -> Any:
    """The tokenizer of the pair's "target" or "draft"; errors as in load_model."""
    place = found_at(pair, role)
    return load_tokenizer(place.name, place.revision, role, place.gguf_file)


class Place(NamedTuple):
    """Where a model is: hub id or folder, revision on the hub, and the GGUF file there if it is in one."""

    name: str
    revision: str | None = None
    gguf_file: str | None = None


def found_at(pair: Pair, role: str) -> Place:
    """Where the pair's "target" or "draft" is. What a Python package brings as a GGUF file is read once: a copy in the
    cache folder, in float32 safetensors, is what later starts load.

    Raises:
        SpecdecError: the package is not installed, or its file cannot be read.
    """
    part: Target | Draft = getattr(pair, role)
    if part.package is None:
        return Place(pair.location(part), part.revision, part.gguf_file)
    try:
        file = packaged_file(part)
    except PairError as error:
        raise SpecdecError(f"pair {pair.name!r}: {role}: {error}") from None
    read = Place(str(file.parent), None, file.name)

    def write(folder: Path) -> None:
        load_tokenizer(*read[:2], role, read.gguf_file).save_pretrained(folder)
        load_model(role, read.name, torch.float32, torch.device("cpu"), *read[1:]).save_pretrained(folder)

    copied = kept_copy(file, f"float32, transformers {transformers.__version__}", write)
    return read if copied is None else Place(str(copied))


def load_model(
    role: str,
    name: str,
    dtype: torch.dtype | str,
    device: torch.device,
    revision: str | None = None,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """A causal language model from a folder or the hub.

    Raises:
        SpecdecError: not found, not reachable, not allowed, or not a causal language model with all of its weights in
            safetensors files.
    """
    _check_folder(role, name, gguf_file)
    form: dict[str, Any] = {"use_safetensors": True} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, revision=revision or "main", trust_remote_code=False,
            local_files_only=Path(name).is_dir(), output_loading_info=True, **form,
        )  # fmt: skip
        model, found = loaded
        lacking = sorted(found["missing_keys"])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # odd files make transformers fail anywhere, in any way
        raise SpecdecError(_explained(f"{role}: could not load a causal language model", name, error)) from error
    if lacking:  # transformers draws them at random
        raise SpecdecError(
            f"{role}: could not load a causal language model from {name!r}: its files lack {len(lacking)} of its "
            f"weights, such as {one_line(lacking[0])}"
        )
    return (model if gguf_file is None else _plain(model)).to(device).eval()


def _plain(model: Any) -> Any:
    """A model read from a GGUF file as one of its class that knows nothing of the file: its weights are ordinary ones,
    but it takes itself for quantised, and could not be saved, copied or moved like others."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)._from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def load_tokenizer(name: str, revision: str | None = None, role: str = "target", gguf_file: str | None = None) -> Any:
    """The tokenizer saved beside a model, or in its GGUF file; errors as in load_model."""
    _check_folder(role, name, gguf_file)
    form = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=False, local_files_only=Path(name).is_dir(), **form
        )
    except Exception as error:  # as above
        raise SpecdecError(_explained(f"{role}: could not load a tokenizer", name, error)) from error


def shared_ids(one: dict[str, int], other: dict[str, int]) -> float:
    """Share of the larger vocabulary's ids that stand for the same token in both."""
    same = sum(1 for token, index in one.items() if other.get(token) == index)
    return same / max(len(one), len(other), 1)


def check_vocabularies(pair: Pair, tokenizer: Any) -> None:
    """A draft saved without a tokenizer is trusted.

    Raises:
        UnsupportedArgumentError: target and draft number their tokens differently.
    """
    try:
        other = pair_tokenizer(pair, "draft")
    except SpecdecError as error:
        if _hub_error(error) is not None:
            raise  # the model itself will not be found, either
        return
    share = shared_ids(tokenizer.get_vocab(), other.get_vocab())
    if share < MIN_SHARED_IDS:
        raise UnsupportedArgumentError(
            f"pair {pair.name!r}: mismatched vocabularies: target and draft agree on {share:.0%} of their token ids; "
            'use a draft of the target\'s family, or draft kind = "ngram"'
        )


def _check_folder(role: str, name: str, gguf_file: str | None = None) -> None:
    """What is certainly neither a model's folder nor an id of the hub."""
    try:
        folder = Path(name)
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except OSError as error:  # a name no file can have
        raise SpecdecError(f"{role}: expected a folder or a hub id, got {name[:40]!r}...: {error.strerror}") from None
    what = f"{role}: could not load a causal language model from {name!r}"
    if gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise SpecdecError(f"{what}: reading {gguf_file!r} needs the gguf package: `pip install gguf`")
    if is_folder and gguf_file is None and not (folder / "config.json").is_file():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        raise SpecdecError(f"{what}: no config.json in it" + (f"; name its GGUF file: {ggufs[0]}" if ggufs else ""))
    if is_file:
        raise SpecdecError(f"{what}: it is a file; give the folder that holds it and config.json")
    if not is_folder and (folder.is_absolute() or name.count("/") > 1 or name.startswith((".", "~"))):
        raise SpecdecError(f"{what}: no such folder")


def _explained(what: str, name: str, error: BaseException) -> str:
    """What to do about the usual causes; otherwise what transformers says, on one line."""
    cause = _hub_error(error)
    if isinstance(cause, hub.GatedRepoError):
        why = "the hub gives it only to accounts that accepted its licence: do that on its page, then `hf auth login`"
    elif isinstance(cause, hub.RevisionNotFoundError):
        why = "the hub has no such revision of it: check `revision`"
    elif isinstance(cause, hub.RepositoryNotFoundError):
        why = "the hub has no such model, or it is private: check the name, or log in with `hf auth login`"
    elif isinstance(cause, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)):
        why = (
            f"it is not on this machine and the hub cannot be reached (HF_HUB_OFFLINE is set, or no network): run "
            f"`hf download {name}` where there is one, or give a folder"
        )
    else:
        said = one_line(" ".join(str(error).split()))
        why = (
            said
            if isinstance(error, (ImportError, OSError, ValueError)) and said
            else f"{type(error).__name__}: {said}"
        )
    return f"{what} from {name!r}: {why}"


def _hub_error(error: BaseException | None) -> BaseException | None:
    """The hub's own error behind what transformers raises, if there is one."""
    while error is not None:
        if isinstance(error, (hub.HfHubHTTPError, hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)):
            return error
        error = error.__cause__ or error.__context__
    return None
