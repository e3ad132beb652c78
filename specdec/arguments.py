"""What the Speculator's arguments stand for: the drafter meant by `draft`, the mode meant by `exactness`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from specdec.drafters import Drafter, ModelDrafter, NgramDrafter, SelfDrafter, SuffixDrafter
from specdec.drafters.self_draft.forms import PREFIX
from specdec.forks import settle
from specdec.kv import SpecdecError, UnsupportedArgumentError, check_model
from specdec.kv.limits import MOST_NODES, checked_count
from specdec.kv.pool_size import DEFAULT_PAGE_SIZE, checked_page_size
from specdec.kv.wrappers import bytes_moved_by_a_pass, unwrapped
from specdec.pairing.loading import default_device, load_model, load_tokenizer
from specdec.planner.options import make_options, planned_shapes
from specdec.verify.strict_mode import DEFAULT_WIDTH, StrictMode

SELF = "self"
"""The target drafts for itself, in whichever form."""
PLANNED_FORMS = ("self:int8", "self:int4")
"""Forms the planner chooses from where none is named; without a planner it is the first."""

OneDraft = PreTrainedModel | Drafter | str | Path
Draft = OneDraft | Sequence[OneDraft] | None
Target = PreTrainedModel | str | Path


def make_target(target: Any, tokenizer: Any = None) -> tuple[PreTrainedModel, Any]:
    """The model a user means by `target`, checked, and the tokenizer: the given one, else the one saved beside a model
    that is loaded here (in the dtype it was saved in, on the first CUDA device where there is one).

    Raises:
        UnsupportedModelError: see check_model. SpecdecError: a path or hub id that cannot be loaded (see load_model).
    """
    settle()
    if isinstance(target, (str, Path)):
        name = str(target)
        target = load_model("target", name, "auto", default_device())
        if tokenizer is None:
            with suppress(SpecdecError):  # a model saved alone; whatever needs a tokenizer will ask for one
                tokenizer = load_tokenizer(name)
    return check_model(target, "target"), tokenizer


def make_strict(target: PreTrainedModel, exactness: str, width: int | None) -> StrictMode | None:
    """Strict mode for `target`, None for "distribution" (see Speculator)."""
    if exactness == "strict":
        return StrictMode(target, DEFAULT_WIDTH if width is None else width)
    if exactness != "distribution":
        raise UnsupportedArgumentError(f"exactness: expected 'distribution' or 'strict', got {exactness!r}")
    if width is not None:
        raise UnsupportedArgumentError(f"strict_width={width} needs exactness='strict'; leave it out otherwise")
    return None


def make_page_size(cache: str, page_size: int | None) -> int | None:
    """Slots per page of the K/V cache, None for the contiguous layout (see Speculator)."""
    if cache not in ("contiguous", "paged"):
        raise UnsupportedArgumentError(f"cache: expected 'contiguous' or 'paged', got {cache!r}")
    if cache == "contiguous":
        if page_size is not None:
            raise UnsupportedArgumentError(f"page_size={page_size} needs cache='paged'; leave it out otherwise")
        return None
    return checked_page_size(DEFAULT_PAGE_SIZE if page_size is None else page_size)


def make_draft(
    draft: Draft, target: PreTrainedModel, k: int | str | None, tree: Any, rule: str, most_nodes: int | None
) -> Drafter | None:
    """The drafter a user means by `draft`, `k` and `tree`: `Options` where every step is to be planned.

    Args:
        rule, most_nodes: what options must suit (see `make_options`).
    """
    if isinstance(k, str) and k != "auto":
        raise UnsupportedArgumentError(f"k: expected a number of tokens or 'auto', got {k!r}")
    if k is not None and not isinstance(k, str):
        k = checked_count("k", k, 1, MOST_NODES, "'auto' plans it")
    several = isinstance(draft, (list, tuple))
    if several and (tree is not None or isinstance(k, int)):
        raise UnsupportedArgumentError(
            "k and tree describe one drafter's drafts: leave them out, or give one drafter instead of a list"
        )
    if not several and (draft is None or tree is not None or isinstance(k, int) or _as_it_is(draft, k)):
        return make_drafter(draft, target, k, tree)
    chosen_from: Any = draft if several else [draft]
    given: Any = [form for one in chosen_from for form in _forms(one)]
    drafters = [make_drafter(one, target, None, None) for one in given]
    fetches = bytes_moved_by_a_pass(target) > 0
    chosen = [
        shape
        for source, one in zip(given, drafters, strict=True)
        if one is not None
        for shape in ([one] if isinstance(source, Drafter) else planned_shapes(one, most_nodes, fetches))
    ]
    return make_options(chosen, rule, most_nodes)


def _forms(draft: Any) -> Sequence[Any]:
    """What a planner chooses from where it is given `draft`."""
    return PLANNED_FORMS if isinstance(draft, str) and draft == SELF else [draft]


def _as_it_is(draft: Any, k: Any) -> bool:
    """A single Drafter object has its own settings; only `k="auto"` lets the planner go below them. Suffixes decide by
    themselves how much is worth drafting."""
    return k is None and (isinstance(draft, Drafter) or (isinstance(draft, str) and draft == SuffixDrafter.name))


def make_drafter(draft: Any, target: PreTrainedModel, k: Any, tree: Any) -> Drafter | None:
    """The one drafter a user means by `draft`, with `k` and `tree` or the usual ones (see Speculator)."""
    if draft is None:
        if k is not None or tree is not None:
            raise UnsupportedArgumentError(
                "k and tree describe drafts, but draft is None: give a drafter, or leave them out"
            )
        return None
    if isinstance(draft, Drafter):
        if k is not None or tree is not None:
            raise UnsupportedArgumentError("k and tree belong to the Drafter object that was passed; set them there")
        if isinstance(draft, SelfDrafter) and draft.copy.target is not target:
            raise UnsupportedArgumentError(
                f"draft: expected a SelfDrafter of this target, whose keys and values it reads, got {draft.name!r} of "
                f"another {type(draft.copy.target).__name__}: make one of this target, or pass draft={draft.name!r}"
            )
        return draft
    if draft == "ngram":
        if tree is not None:
            raise UnsupportedArgumentError("tree: an n-gram drafter has no static tree; use NgramDrafter(branches=...)")
        return NgramDrafter() if k is None else NgramDrafter(k=k)
    if draft == "suffix":
        if tree is not None:
            raise UnsupportedArgumentError("tree: suffixes grow their own; use SuffixDrafter(nodes=...)")
        return SuffixDrafter() if k is None else SuffixDrafter(nodes=k)
    if isinstance(draft, str) and (draft == SELF or draft.startswith(PREFIX)):
        return SelfDrafter(target, PLANNED_FORMS[0] if draft == SELF else draft, k=k, tree=tree)
    if isinstance(draft, (str, Path)):
        draft = load_model("draft", str(draft), target.dtype, target.device)
    draft = unwrapped(draft, "draft")
    if not isinstance(draft, PreTrainedModel):
        raise UnsupportedArgumentError(
            "draft: expected a PreTrainedModel, a Drafter, 'ngram', 'suffix', 'self', a path or hub id, a list of "
            f"such, or None, got {type(draft).__name__}"
        )
    return ModelDrafter(draft, k=k, tree=tree)
