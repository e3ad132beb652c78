"""Rows that sit a pass out keep what they have, in both layouts of the cache."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch

from specdec import ModelDrafter
from specdec.drafters.base import CACHE_NAME
from specdec.kv import CacheStateError, PagedKVCache, SharedKVCache
from specdec.kv.idle import IdleRows


@pytest.mark.parametrize("paged", [False, True])
def test_idle_rows_keep_what_they_have(paged: bool) -> None:
    """K/V of a pass over three rows, the middle one idle: the others get theirs, the idle one's stays as it was."""
    model = models.draft("random", "llama-gqa")
    layers = {CACHE_NAME: 1}
    cache: Any = PagedKVCache.fresh(layers, 3, 4) if paged else SharedKVCache(layers, 3, 16)
    drafter = ModelDrafter(model, k=1)
    text = torch.arange(3, 3 + 3 * 9).view(3, 9) % models.VOCAB
    drafter._forward.prefill(cache, text, [0, 0, 0], [5, 3, 5], 8)
    for row, length in enumerate((5, 7, 5)):
        cache.set_length(row, length)
    before = [[t.clone() for pair in cache.layers(CACHE_NAME, row) for t in pair] for row in range(3)]
    idle = IdleRows(cache, CACHE_NAME, [False, True, False])
    assert idle.lengths == [5, 3, 5]
    drafter._forward.causal(idle, text[:, 5:7], idle.lengths, None, keep=0)
    assert cache.filled(CACHE_NAME) == [7, 3, 7]
    for row in range(3):
        after = [t for pair in cache.layers(CACHE_NAME, row) for t in pair]
        for old, new in zip(before[row], after, strict=True):
            assert torch.equal(old, new[:, : old.shape[1]])
    with pytest.raises(CacheStateError, match="hole"), cache.writing(CACHE_NAME, [7, 7, 7], 2, [2, 1, 2]):
        pass
    with cache.writing(CACHE_NAME, [7, 7, 7], 2, [2, 0, 2]):
        pass
    assert cache.filled(CACHE_NAME) == [9, 3, 9]
