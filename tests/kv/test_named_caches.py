"""Caches that users name or hand in: each is served with plain `generate`'s text and cache, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS, ALL_STATIC_CACHE_IMPLEMENTATIONS

from specdec import Speculator, UnsupportedArgumentError
from specdec.kv.versions import CACHE_KEYWORD, cache_of

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14, "attention_mask": MASK}
SERVED = (*ALL_STATIC_CACHE_IMPLEMENTATIONS, "offloaded", "dynamic")


@pytest.fixture
def target() -> Any:
    """One that a test may change."""
    return copy.deepcopy(models.target("llama-gqa", "fp64"))


@pytest.mark.parametrize("family", ["llama-gqa", "mistral-window"])
@pytest.mark.parametrize("where", ["argument", "config", "target"])
@pytest.mark.parametrize("name", ALL_CACHE_IMPLEMENTATIONS)
@pytest.mark.filterwarnings("ignore")
def test_every_cache_that_can_be_named_is_served_or_refused(family: str, where: str, name: str) -> None:
    """Also beyond a sliding window. The text of a quantised cache is another; others only lie elsewhere."""
    target: Any = models.target(family, "fp64")
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}
    plain = target.generate(IDS, attention_mask=MASK, **settings)
    own = target.generation_config
    try:
        target.generation_config = copy.deepcopy(own)
        if where == "target":
            target.generation_config.cache_implementation = name
        else:
            settings["cache_implementation"] = name

        def call(**more: Any) -> Any:
            asked = {**settings, **more}
            asked = {"generation_config": GenerationConfig(**asked)} if where == "config" else asked
            return spec.generate(IDS, attention_mask=MASK, **asked)

        spec = Speculator(target, "ngram", k=3)
        kind = f"cache_implementation='{name}'"
        if name not in SERVED:
            with pytest.raises((ValueError, ImportError), match=f"{kind}|quanto|[Qq]uantized"):
                call()
            return
        assert torch.equal(call(), plain)
        assert spec.report is not None
        silent = name in ("dynamic", "hybrid")  # the latter stands for no name at all in transformers 5
        assert any(kind in note for note in spec.report.notes) != silent
        if silent:
            assert type(cache_of(call(return_dict_in_generate=True))) is DynamicCache
        else:
            with pytest.raises(UnsupportedArgumentError, match=f"{kind} with return_dict_in_generate"):
                call(return_dict_in_generate=True)
    finally:
        target.generation_config = own


def _replaced_layer(target: Any) -> DynamicCache:
    class Rounded(DynamicLayer):
        """Holds something else than it was given, as quantised layers do."""

    cache = DynamicCache()
    cache.layers = [Rounded(), Rounded()]
    return cache


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda target: StaticCache(config=target.config, max_cache_len=32), "got StaticCache"),
        (lambda target: type("Mine", (DynamicCache,), {})(), "got Mine"),
        (_replaced_layer, "layer 0 is a Rounded"),
    ],
    ids=["static", "a user's own", "other layers"],
)
def test_caches_that_are_not_plain_kv_are_refused_as_objects_too(target: Any, make: Any, match: str) -> None:
    spec: Any = Speculator(target, "ngram", k=3)
    cache = make(target)
    with pytest.raises(UnsupportedArgumentError, match=match):
        spec.generate(IDS, **{CACHE_KEYWORD: cache}, **GREEDY)
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(spec.generate(IDS, **{CACHE_KEYWORD: DynamicCache()}, **GREEDY), target.generate(IDS, **GREEDY))
