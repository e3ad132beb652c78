"""An engine whose K/V is in 8 bits: another law, the same with drafts and without, whatever happens in the pool."""

from __future__ import annotations

import random
from typing import Any

import models
import pytest
import torch
from pool_calls import OfAPass

from specdec import Engine
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.drafters.self_draft import SelfDrafter
from specdec.kv import UnsupportedArgumentError, quantised
from specdec.kv.quantised import QUANTISED
from specdec.verify.native import library

FAMILY = "llama-gqa"
NATIVE = library.why_not() is None
HEAD = list(range(3, 17))
"""Begins every other prompt."""
SETTINGS: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": True, "rule": "coupled"},
    {"do_sample": False, "repetition_penalty": 1.2},
    {"do_sample": True, "rule": "coupled", "temperature": 0.8, "top_k": 12},
)


def drafters(dtype: str) -> dict[str, Any]:
    target = models.target(FAMILY, dtype)
    found: dict[str, Any] = {
        "chain": ModelDrafter(models.draft("near", FAMILY, dtype), k=4),
        "tree": ModelDrafter(models.draft("far", FAMILY, dtype), tree=(2, 2)),
        "ngram": NgramDrafter(k=5, branches=2),
    }
    if dtype == "fp32":
        found["self"] = SelfDrafter(target, "int8", k=3)
    return found


def served(dtype: str, **options: Any) -> Engine:
    given: dict[str, Any] = {"kv_dtype": "int8", "lossy": True, "page_size": 4, "adaptive": False, **options}
    return Engine(models.target(FAMILY, dtype), drafters=drafters(dtype), **given)


def crowd(dtype: str, count: int = 16, kv_dtype: str = "int8") -> tuple[list[list[int]], list[list[int]], Engine]:
    """Texts of requests that draft, in a crowd that preempts and shares; and of each alone, without a draft."""
    rng = random.Random(4)
    engine = served(dtype, num_pages=22, max_rows=5, max_step_tokens=40, kv_dtype=kv_dtype)
    asked = []
    for i in range(count):
        prompt = (HEAD if i % 2 else []) + [rng.randrange(3, models.VOCAB) for _ in range(rng.randrange(1, 12))]
        options = {**SETTINGS[i % len(SETTINGS)], "max_new_tokens": rng.randrange(8, 24), "pad_token_id": 0, "seed": i}
        asked.append((prompt, options, engine.submit(prompt, draft=rng.choice(engine.drafters[1:]), **options)))
        for _ in range(rng.randrange(3)):
            engine.step()
    engine.run()
    found = [handle.result().token_ids for _, _, handle in asked]
    alone = []
    for prompt, options, _ in asked:
        single = served(dtype, num_pages=64, max_rows=1, kv_dtype=kv_dtype)
        handle = single.submit(prompt, draft="none", **options)
        single.run()
        alone.append(handle.result().token_ids)
    return found, alone, engine


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        ("fp64", "int8"), ("fp64", "fp8"),
        pytest.param("fp32", "int8", marks=pytest.mark.skipif(not NATIVE, reason="bits of modules depend on the pass")),
    ],
)  # fmt: skip
def test_texts_with_drafts_are_those_without(dtype: str, kv_dtype: str) -> None:
    """In double precision through the modules; natively in float32, whose bits do not depend on the pass."""
    found, alone, engine = crowd(dtype, kv_dtype=kv_dtype)
    assert found == alone
    metrics = engine.metrics()
    assert metrics.num_accepted_tokens > 20
    assert metrics.num_preemptions > 0
    assert metrics.num_prefix_hit_tokens > 0
    assert metrics.lossy == f"K/V in {kv_dtype}"
    engine.pool.check_integrity()
    assert engine.pool.num_held_pages == 0


def test_texts_would_differ_if_rounding_looked_beyond_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    how = OfAPass("int8", torch.int8, 127.0, native=0)
    monkeypatch.setitem(quantised.QUANTISED, "int8", how)
    found, alone, _ = crowd("fp64", 8)
    assert found != alone


def test_another_text_than_with_whole_states() -> None:
    """That it is lossy is no mere word: some greedy text of this model is another one."""
    prompts = [[3 + i, 9, 30 - i, 12] for i in range(8)]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": None}
    texts = []
    for kept in ({}, {"kv_dtype": "int8", "lossy": True}, {"kv_dtype": "fp8", "lossy": True}):
        engine = Engine(models.target(FAMILY), page_size=4, **kept)  # type: ignore[arg-type]
        handles = [engine.submit(prompt, **options) for prompt in prompts]
        engine.run()
        texts.append([handle.result().token_ids for handle in handles])
        assert engine.metrics().lossy == (f"K/V in {kept['kv_dtype']}" if kept else None)
    assert texts[0] != texts[1]
    assert texts[0] != texts[2]


def test_many_more_pages_for_the_same_bytes() -> None:
    """Target and draft model alike: heads of 8 numbers take 8 bytes and a scale instead of 64 in double precision."""
    whole, small = (served("fp64", num_bytes=200_000, **kept) for kept in ({"kv_dtype": None, "lossy": False}, {}))
    assert whole.pool.num_pages is not None
    assert small.pool.num_pages == pytest.approx(whole.pool.num_pages * 64 / 10, rel=0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_dtype": "int8"}, r"kv_dtype='int8' is lossy: .*Pass lossy=True"),
        ({"lossy": True}, "nothing is lossy"),
        ({"kv_dtype": "int4", "lossy": True}, r"expected one of \['int8', 'fp8'\] or None, got 'int4'"),
        ({"kv_dtype": torch.int8, "lossy": True}, "got torch.int8"),
    ],
)
def test_nobody_gets_another_law_without_asking_for_it(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=said):
        Engine(models.target(FAMILY), **options)


def test_every_format_is_named() -> None:
    assert all(name == how.name for name, how in QUANTISED.items())
