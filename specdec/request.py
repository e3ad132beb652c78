"""One generate call after `transformers` has prepared it: what to decode, checked before any model runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.generation.stopping_criteria import MaxLengthCriteria

from specdec.inputs import check_forced_ids, check_positions, checked_ids, real_columns, refuse_unknown
from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.exchange import cached_tokens, check_adoptable
from specdec.kv.limits import shown
from specdec.kv.versions import CACHE_KEYWORD, cache_in
from specdec.trace import StepTrace

SAME_TEXT_CACHES = frozenset(ALL_STATIC_CACHE_IMPLEMENTATIONS) | {"offloaded"}
"""Names of `cache_implementation` that choose where K/V lies, not what it is: a call that does not return its cache has
the same text with each of them."""


@dataclass(frozen=True)
class Request:
    """Everything the decode loop needs.

    input_ids: int64 `[rows, columns]`, pads included. real: bool, same shape, or None when nothing is padded.
    cache: the caller's (or `generate`'s empty) DynamicCache to extend and hand back; cached: columns already in it.
    repeats: each prompt occurs this many times in a row (`num_return_sequences`): prefilled once, then forked.
    """

    input_ids: Tensor
    real: Tensor | None
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    cache: DynamicCache | None
    cached: int
    cache_is_callers: bool
    repeats: int
    seeds: list[int]
    requests: list[int]
    seeded: bool = False
    """Whether the caller gave a seed, and so expects a row's text to be a function of it."""
    streamer: Any = None
    on_step: Callable[[StepTrace], None] | None = None
    note: str | None = None
    """For the report: what was asked for and made no difference."""

    @property
    def wants_dict(self) -> bool:
        return bool(self.config.return_dict_in_generate)

    @property
    def keeps_scores(self) -> bool:
        return self.wants_dict and bool(self.config.output_scores)

    @property
    def keeps_logits(self) -> bool:
        return self.wants_dict and bool(self.config.output_logits)

    @property
    def prompt_columns(self) -> int:
        """Columns of the prompt in plain decoding's last pass over it: none that the caller's cache holds, and the last
        chunk of `prefill_chunk_size` only."""
        columns, chunk = self.input_ids.shape[1] - self.cached, getattr(self.config, "prefill_chunk_size", None)
        return columns if chunk is None else (columns - 1) % chunk + 1

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens of all rows, padding not counted, whose K/V the caller's cache holds."""
        if self.real is None:
            return self.input_ids.shape[0] * self.cached
        return int(self.real[:, : self.cached].sum())

    @property
    def keeps_hidden_states(self) -> bool:
        return self.wants_dict and bool(self.config.output_hidden_states)


def refuse_config(config: GenerationConfig) -> str | None:
    """Name what cannot be honoured, before any work is done.

    Returns:
        a note for the report about settings that are accepted but change nothing, if there are any.

    Raises:
        UnsupportedArgumentError
    """

    def refuse(argument: str, why: str) -> None:
        raise UnsupportedArgumentError(f"{argument} cannot be combined with speculative decoding: {why}")

    mode = config.get_generation_mode()
    if config.num_beams in (None, 1) and mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        if config.prompt_lookup_num_tokens is None:
            refuse(f"generation mode {mode.value!r}", "only greedy decoding and sampling are verified token by token.")
    if config.num_beams not in (None, 1):
        refuse(f"num_beams={config.num_beams}", "beams share no single text to draft for. Use num_beams=1.")
    if config.use_cache is False:
        refuse("use_cache=False", "drafts are verified on a KV cache. Leave use_cache at True.")
    chunk = getattr(config, "prefill_chunk_size", None)
    if chunk is not None and not (isinstance(chunk, int) and chunk > 0):
        refuse(f"prefill_chunk_size={chunk!r}", "a prompt is read in chunks of at least one token. Leave it out.")
    if config.prompt_lookup_num_tokens is not None:
        refuse("prompt_lookup_num_tokens", 'it is another drafter. Use Speculator(target, "ngram") instead.')
    if config.guidance_scale is not None and config.guidance_scale != 1:
        refuse(f"guidance_scale={config.guidance_scale}", "its processor runs the model itself, once per token.")
    if getattr(config, "token_healing", None):
        refuse("token_healing=True", "it rewrites the prompt with the model. Heal the prompt first.")
    if config.return_dict_in_generate:
        if config.output_attentions:
            refuse("output_attentions=True", "weights of attention over drafts are nobody's. Run the model once more.")
        if config.output_hidden_states not in (None, False, True):
            refuse(f"output_hidden_states={config.output_hidden_states!r}", "all layers or none are given. Pass True.")
    kind = config.cache_implementation
    if kind in (None, "dynamic"):
        return None
    if kind not in SAME_TEXT_CACHES:
        refuse(
            f"cache_implementation={kind!r}",
            "drafts are verified on exact K/V, whose text may be another. Leave it out.",
        )
    if config.return_dict_in_generate:
        refuse(
            f"cache_implementation={kind!r} with return_dict_in_generate=True",
            f"{CACHE_KEYWORD} would not be of that kind. Leave one of them out.",
        )
    return f"cache_implementation={kind!r} made no difference: drafts are verified on a cache of the library's own"


def build_request(
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *,
    target: PreTrainedModel,
    seed: int | Sequence[int] | None,
    generator: torch.Generator | None,
    streamer: Any,
    on_step: Callable[[StepTrace], None] | None,
) -> Request:
    """Check the prepared arguments of one call (see `refuse_config`) and bundle them."""
    note = refuse_config(config)
    _check_limits(criteria)
    check_forced_ids(config, target)
    refuse_unknown(model_kwargs, input_ids, target)
    input_ids = checked_ids(input_ids, target)
    rows = input_ids.shape[0]
    real = real_columns(input_ids, model_kwargs.get("attention_mask"))
    cache, cached = _caller_cache(cache_in(model_kwargs), input_ids)
    check_positions(model_kwargs.get("position_ids"), real, input_ids)
    repeats = max(1, config.num_return_sequences or 1)
    if cached and repeats > 1:
        raise UnsupportedArgumentError(
            f"{CACHE_KEYWORD} with num_return_sequences > 1: repeat the prompt and cache first"
        )
    seeds, requests = _noise_keys(seed, generator, rows, bool(config.do_sample))
    return Request(
        input_ids=input_ids,
        real=real,
        processors=processors,
        criteria=criteria,
        config=config,
        cache=cache,
        cached=cached,
        cache_is_callers=cached > 0 or getattr(cache, "_is_user_defined", False),
        repeats=repeats if cached == 0 else 1,
        seeds=seeds,
        requests=requests,
        seeded=seed is not None,
        streamer=streamer,
        on_step=on_step,
        note=note,
    )


def _check_limits(criteria: StoppingCriteriaList) -> None:
    for criterion in criteria:
        limit = getattr(criterion, "max_length", None) if isinstance(criterion, MaxLengthCriteria) else None
        if isinstance(limit, (bool, float)) or (isinstance(limit, Tensor) and limit.is_floating_point()):
            raise UnsupportedArgumentError(
                f"max_new_tokens, max_length: expected a whole number, got a limit of {limit} columns. Round it."
            )


def _caller_cache(cache: Any, input_ids: Tensor) -> tuple[DynamicCache | None, int]:
    if cache is None:
        return None, 0
    columns = cached_tokens(cache)
    if columns == 0 and not getattr(cache, "_is_user_defined", False):
        return (cache if isinstance(cache, DynamicCache) else None), 0
    if columns >= input_ids.shape[1]:
        raise UnsupportedArgumentError(
            f"{CACHE_KEYWORD} holds {columns} tokens but input_ids only {input_ids.shape[1]}: pass the whole text, the "
            "cached part included, and at least one token that is not cached."
        )
    return check_adoptable(cache, input_ids.shape[0]), columns  # an empty cache of the caller's is filled for them


def _noise_keys(
    seed: int | Sequence[int] | None, generator: torch.Generator | None, rows: int, do_sample: bool
) -> tuple[list[int], list[int]]:
    """Per row (seed, request). One seed for all keys rows by their index; a seed per row makes rows independent."""
    if seed is not None and generator is not None:
        raise UnsupportedArgumentError("expected seed or generator, got both")
    if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)):
        if len(seed) != rows:
            raise UnsupportedArgumentError(f"seed: expected one seed per row ({rows}), got {len(seed)}")
        return [_whole(value) for value in seed], [0] * rows
    if seed is None:
        # As plain sampling does, take randomness from torch's global generator: torch.manual_seed works.
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device)) if do_sample else 0
    return [_whole(seed)] * rows, list(range(rows))


def _whole(seed: Any) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise UnsupportedArgumentError(f"seed: expected an int, or one per row, got {shown(seed)}") from None
