"""The K/V cache of one call: made, given the prompts before the first step, and completed where it is returned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from specdec.drafters import FallbackGuard
from specdec.drafters.base import CACHE_NAME
from specdec.kv import KVCache, PagedKVCache, SharedKVCache
from specdec.kv.exchange import adopt
from specdec.kv.shared import INITIAL_SLOTS
from specdec.kv.support import num_cache_layers
from specdec.request import Request
from specdec.target import TARGET, TargetPasses
from specdec.verify import Rows
from specdec.verify.passes.forward import Reader


def make_cache(
    request: Request,
    target: PreTrainedModel,
    drafter: FallbackGuard | None,
    rows: Rows,
    tail: int,
    page_size: int | None,
) -> KVCache:
    """Room for the K/V of all models.

    Args:
        tail: slots behind a row's text that a step may write.
    """
    layers = {TARGET: num_cache_layers(target)}
    if drafter is not None and drafter.num_cache_layers:
        layers[CACHE_NAME] = drafter.num_cache_layers
    leaders = rows.batch_size // request.repeats
    borrows = {CACHE_NAME: TARGET} if drafter is not None and drafter.shares_target_kv else {}
    if page_size is not None:
        return PagedKVCache.fresh(layers, leaders, page_size, borrows)
    limit = request.criteria.max_length
    most = None if limit is None else limit + tail
    slots = max(rows.num_tokens) + max(INITIAL_SLOTS, tail)  # room to speak before the first growth
    return SharedKVCache(layers, leaders, slots if most is None else min(slots, most), most, borrows)


def read_prompts(passes: TargetPasses, rows: Rows, request: Request) -> None:
    """Everything but each row's last token goes into the target's K/V; equal prompts are run once.

    Rows that wait for equally many tokens are left to the first step, whose pass reads them along with its draft.
    """
    cache = passes.cache
    if request.cache is not None and request.cached:
        real = request.real
        if real is None:
            real = torch.ones_like(request.input_ids, dtype=torch.bool)
        adopt(cache, TARGET, request.cache, real[:, : request.cached])
    leaders = slice(None, None, request.repeats)
    lengths = [count - 1 for count in rows.num_tokens[leaders]]
    if request.repeats > 1 or not passes.target.forward.reads_prompts or len(set(passes.missing(lengths))) > 1:
        passes.read(rows.text[leaders], lengths)
    for row, length in enumerate(lengths):
        cache.set_length(row, length)
    if request.repeats > 1:
        cache.fork(request.repeats)


def fill_finished(
    passes: TargetPasses, rows: Rows, request: Request, storage: Mapping[int, int], reader: Reader | None
) -> None:
    """K/V of what plain decoding feeds rows that ended early: their last token, then padding.

    Only a returned cache shows them; a caller who continues from it may attend to them.

    Args:
        storage: for each row of the batch, where its K/V lies in the cache.
        reader: see `Forward.prefill`.
    """
    cache, width = passes.cache, max(rows.ends)
    if min(rows.ends) == width:
        return
    padding = request.config._pad_token_tensor
    assert padding is not None, "rows end apart only where finished rows are padded"
    text = torch.full((rows.batch_size, width), int(padding), device=rows.device)
    stops = [0] * rows.batch_size
    for row, place in storage.items():
        count = rows.num_tokens[row]
        text[place, :count] = rows.text[row, :count]
        stops[place] = count + width - rows.ends[row] - 1
    cache.revive()
    passes.target.forward.prefill(cache, text, cache.filled(TARGET), stops, reader=reader)
    for place, stop in enumerate(stops):
        cache.set_length(place, stop)
