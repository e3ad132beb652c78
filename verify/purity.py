"""Which of the caller's code may be asked about drafts: processors, criteria, and what hangs on the model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel
from transformers.generation import logits_process as hf
from transformers.generation import stopping_criteria as criteria

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.stock import is_trainers, original

T = TypeVar("T")

_MARK = "_specdec_pure"
_OFFLOADING = f"{os.sep}accelerate{os.sep}"


def _named(home: Any, *names: str) -> frozenset[type]:
    return frozenset(kind for name in names if (kind := getattr(home, name, None)) is not None)


PREFIX_FREE = _named(
    hf,
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "LogitNormalization",
    "InfNanRemoveLogitsProcessor",
    "SuppressTokensLogitsProcessor",
)
"""Processors that never look at `input_ids`: one call serves all nodes of all rows. Exact types, not subclasses."""

ROW_FREE = PREFIX_FREE | _named(
    hf,
    "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
)
"""Processors that read a prefix but not its place in the batch: nodes of one prefix length share a call."""

_ROW_BY_ROW = _named(
    criteria, "EosTokenCriteria", "MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria"
)  # fmt: skip
"""Stopping criteria that decide a row by its own text (or by the time)."""


def pure(thing: T) -> T:
    """Declare a logits processor, a `prefix_allowed_tokens_fn` or a stopping criterion of your own pure; returns it.

    Pure means: what it says of a row is a function of that row's ids (and scores, and place in the batch) alone. It
    keeps nothing from one call to the next, minds neither order nor number of calls, and can answer for text that is
    never emitted. Then it is asked about whole drafts at once instead of once per emitted token. Nothing checks the
    claim; a false one changes the text.

    Args:
        thing: a class (its own objects are meant, not those of subclasses), one object, or a function.

    Raises:
        UnsupportedArgumentError: it cannot be marked (a built-in, an object with slots).

    Example:
        @specdec.pure
        class NoDigits(LogitsProcessor): ...
    """
    try:
        setattr(thing, _MARK, thing)  # itself: functools.wraps hands attributes on to wrappers, which promise nothing
    except (AttributeError, TypeError) as fault:
        raise UnsupportedArgumentError(
            f"pure: expected a class, a function or an object that takes attributes, got {type(thing).__name__}: wrap "
            "it into a function of your own"
        ) from fault
    return thing


def _declared(thing: object) -> bool:
    """Marked itself, or its very class; a bound method counts as its function."""
    function = getattr(thing, "__func__", thing)
    return any(getattr(owner, "__dict__", {}).get(_MARK) is owner for owner in (function, type(thing)))


def is_pure(processor: object) -> bool:
    """Whether a processor may be asked about nodes of a draft, in any order and number."""
    if type(processor) is hf.PrefixConstrainedLogitsProcessor:
        return _declared(processor._prefix_allowed_tokens_fn)
    return type(processor) in ROW_FREE or _declared(processor)


def decides_by_row(criterion: object) -> bool:
    """Whether a stopping criterion may be asked about the rows of a batch one by one."""
    return type(criterion) in _ROW_BY_ROW or _declared(criterion)


def in_plain_order(processors: Iterable[object], criteria: Iterable[object], rows: int) -> list[str]:
    """Names of what must be called exactly as plain decoding calls it: once per emitted token, with the whole batch.

    A batch of one shows a criterion nothing but what plain decoding would.
    """
    found = [processor for processor in processors if not is_pure(processor)]
    if rows > 1:
        found += [criterion for criterion in criteria if not decides_by_row(criterion)]
    return [type(one).__name__ for one in found]


def callers_code(model: PreTrainedModel) -> str | None:
    """What the caller has put on a model and every pass of it runs: a hook, or a forward in place of a module's own.

    Those of torch, transformers and accelerate (offloading, sharding, compilation), and TRL's, are theirs.
    """
    everywhere = torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks
    if any(not _known(hook) for hooks in everywhere for hook in hooks.values()):
        return "a global forward hook"
    for name, part in model.named_modules():
        own, where = part.__dict__, f"on module {name!r}" if name else f"on {type(model).__name__}"
        if any(
            not _known(hook) for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]) for hook in hooks.values()
        ):
            return f"a forward hook {where}"
        if (
            "forward" in own
            and "_hf_hook" not in own
            and not _known(own["forward"])
            and not is_trainers(own["forward"], part)
        ):
            return f"another forward {where}"
    return None


def _known(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return original(function) or (code is not None and _OFFLOADING in code.co_filename)
