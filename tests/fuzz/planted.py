"""Faults that the fuzz must find: what is planted, among which calls it must show, and as what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fuzz import bugs
from fuzz.callbacks import AvoidsLast, Remembers, criterion, prefix_function, processor, streamer
from specdec.batch import Batch
from specdec.call_lock import CallLock
from specdec.engine.handle import Handle
from specdec.kv import SharedKVCache
from specdec.loop import DecodeLoop
from specdec.outputs import Collector
from specdec.speculator import Speculator
from specdec.stopping import StopRules
from specdec.verify import Rows, SamplingLaw
from specdec.verify.race import RaceStream

CHAIN: dict[str, Any] = {"draft": "near", "options": {"k": 4}, "seed": None, "form": "speculator", "cached": None}
LONG = {"max_new_tokens": 14}


class Fault(NamedTuple):
    """plant: into the library; calls: fields of the calls among which it must show; kinds: as what it is found."""

    plant: Callable[[bugs.Patch], None]
    calls: dict[str, Any]
    kinds: tuple[str, ...]


def _chain(arguments: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**CHAIN, "arguments": {**LONG, **arguments}, **fields}


_TEXT = ("other text", "broken afterwards")
_SEEN = ("other text", "callbacks saw something else")
_KEPT: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True}
FAULTS: dict[str, Fault] = {
    "processors are skipped below the root": Fault(
        bugs.wrapped(SamplingLaw, "__call__", bugs.skips_below_the_root), _chain({"repetition_penalty": 1.4}), _TEXT
    ),
    "processors see a node without its path": Fault(
        bugs.wrapped(SamplingLaw, "__call__", bugs.forgets_the_path), _chain({"no_repeat_ngram_size": 2}), _TEXT
    ),
    "an end of text inside a run is missed": Fault(
        bugs.wrapped(StopRules, "scan", bugs.last_token_only), _chain({"eos_token_id": [2, 4, 6, 8, 10, 12]}), _TEXT
    ),
    "a commit keeps wrong slots": Fault(
        bugs.wrapped(SharedKVCache, "commit", bugs.no_gather), _chain({}, options={"tree": (3, 2, 1)}), _TEXT
    ),
    "a pad is read as text": Fault(bugs.wrapped(Rows, "__init__", bugs.reads_a_pad), _chain({}, lengths=(3, 6)), _TEXT),
    "the repetition penalty sees pads": Fault(
        bugs.other_request(bugs.penalised_pads),
        _chain({"repetition_penalty": 1.9, "pad_token_id": 0, **_KEPT}, lengths=(2, 8)),
        ("other text", "other scores"),
    ),
    "scores of another step are returned": Fault(
        bugs.wrapped(Collector, "record", bugs.shifted_scores), _chain(_KEPT), ("other scores",)
    ),
    "the streamer misses a token": Fault(
        bugs.wrapped(Collector, "__init__", bugs.lossy_streamer),
        _chain({"streamer": streamer()}),
        ("callbacks saw something else",),
    ),
    "the prefix function is asked about another row": Fault(
        bugs.other_request(bugs.wrong_row),
        _chain({"prefix_allowed_tokens_fn": prefix_function("by row")}, lengths=(4, 4)),
        _SEEN,
    ),
    "a criterion is not asked at first": Fault(
        bugs.other_request(bugs.deaf_criterion),
        _chain({"stopping_criteria": [criterion("pair%7")]}, lengths=(5,)),
        _SEEN,
    ),
    "the global generator is used by a greedy call": Fault(
        bugs.other_request(bugs.uses_the_global_generator), _chain({}), ("harm or internal error",)
    ),
    "noise follows calls instead of positions": Fault(
        bugs.wrapped(RaceStream, "__call__", bugs.noise_by_call),
        _chain({}, seed=3, options={"k": 4, "rule": "coupled"}),
        ("coupled text depends on the draft",),
    ),
    "a user's error becomes an internal one": Fault(
        bugs.wrapped(Batch, "decide", bugs.swallows),
        _chain(
            {"logits_processor": [processor(Remembers)], "prefix_allowed_tokens_fn": prefix_function("raises later")},
            lengths=(5,),
            options={"k": 1},
        ),
        ("unclear error: KeyError",),
    ),
    "a call never ends": Fault(
        bugs.wrapped(DecodeLoop, "run", bugs.spins), _chain({"streamer": streamer()}), ("hang",)
    ),
    "the object is broken after an error": Fault(
        bugs.wrapped(CallLock, "alone", bugs.stays_busy),
        _chain({"prefix_allowed_tokens_fn": prefix_function("raises later")}, lengths=(5,)),
        ("broken afterwards",),
    ),
    "the model's own configuration is changed": Fault(
        bugs.wrapped(Speculator, "_decode", bugs.changes_the_config), _chain({}), ("harm or internal error",)
    ),
    "the user's list is changed": Fault(
        bugs.wrapped(Speculator, "generate", bugs.appends_to_the_users_list),
        _chain({"logits_processor": [processor(AvoidsLast)]}, lengths=(3,)),
        ("harm or internal error",),
    ),
    "an engine drops the last token": Fault(
        bugs.wrapped(Handle, "finish", bugs.drops_the_last), _chain({}, form="engine", lengths=(4,)), ("other text",)
    ),
    "generate stays patched": Fault(bugs.leaves_generate, _chain({}, form="patch"), ("harm or internal error",)),
}
"""Every one is a loss that users have met somewhere; the calls are the narrowest that leave the finding to chance."""
