"""Requests whose target drafts for itself share its pages: prefix hits and preemption leave no trace in their texts."""

from __future__ import annotations

import random
from typing import Any

import models
import torch
from transformers import DynamicCache

from specdec import Engine, Speculator
from specdec.drafters.self_draft import SelfDrafter
from specdec.kv.versions import cached

TARGET = models.target("llama-gqa")
TEXTS = list(models.prompts((16, 16), models.VOCAB, 9)[0])
DRAFTERS: dict[str, Any] = {
    "int8": SelfDrafter(TARGET, "int8", k=4),
    "int4": SelfDrafter(TARGET, "int4", tree=(2, 2), calibration=TEXTS),
    "exit": SelfDrafter(TARGET, "exit1", k=3),
}
SETTINGS: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": True},
    {"do_sample": True, "rule": "coupled"},
)
HEAD = list(range(3, 22))


def engine(**options: Any) -> Engine:
    settings: dict[str, Any] = {"num_pages": 24, "page_size": 4, "max_rows": 6, "max_step_tokens": 64}
    return Engine(TARGET, None, drafters=DRAFTERS, **{**settings, **options})


def alone(prompt: list[int], draft: str, setting: dict[str, Any], new: int, seed: int) -> list[int]:
    options = dict(setting)
    spec: Any = Speculator(TARGET, DRAFTERS[draft], rule=options.pop("rule", "auto"))
    ids = torch.tensor([prompt])
    seeded = {"seed": seed} if options["do_sample"] else {}
    out = spec.generate(ids, max_new_tokens=new, **options, **seeded)
    assert isinstance(out, torch.Tensor)
    return out[0, len(prompt) :].tolist()


def test_texts_of_a_crowd_are_those_of_each_request_alone() -> None:
    rng = random.Random(1)
    served = engine()
    asked = []
    for i in range(14):
        prompt = (HEAD if i % 2 else []) + [rng.randrange(3, models.VOCAB) for _ in range(rng.randrange(1, 12))]
        draft, setting = rng.choice(list(DRAFTERS)), SETTINGS[i % 3]
        new = rng.randrange(4, 24)
        handle = served.submit(prompt, draft=draft, max_new_tokens=new, seed=i, pad_token_id=0, **setting)
        asked.append((prompt, draft, setting, new, i, handle))
        for _ in range(rng.randrange(3)):
            served.step()
    served.run()
    metrics = served.metrics()
    assert metrics.num_preemptions > 0
    assert metrics.num_prefix_hit_tokens > 0
    assert metrics.num_drafter_faults == 0
    assert metrics.num_accepted_tokens > 20
    for prompt, draft, setting, new, seed, handle in asked:
        assert handle.result().token_ids == alone(prompt, draft, setting, new, seed), (draft, setting)
    served.pool.check_integrity()
    served.close()


def test_a_self_drafter_takes_no_pages_of_its_own() -> None:
    with_one, without = engine(), Engine(TARGET, None, num_pages=24, page_size=4, max_rows=6)
    assert list(with_one.pool.stores) == list(without.pool.stores) == ["target"]
    sized = Engine(TARGET, "self:int8", k=3, num_bytes=1 << 20, page_size=4)
    plain = Engine(TARGET, None, num_bytes=1 << 20, page_size=4)
    assert sized.pool.num_pages == plain.pool.num_pages


def test_published_pages_hold_the_targets_own_kv() -> None:
    """Drafts wrote behind the text in pages that later requests are given."""
    served = engine(num_pages=60)
    first = served.submit(HEAD, draft="exit", max_new_tokens=13, seed=0, do_sample=False)
    text = HEAD + first.result().token_ids
    row = served.pool.open(text[:-1])
    held = served.pool.length(row)
    assert held >= len(HEAD)
    pages = served.pool.sequence(row).pages
    cache: Any = DynamicCache()
    with torch.no_grad():
        TARGET(input_ids=torch.tensor([text[:held]]), **cached(TARGET, cache))
    layers = served.pool.stores["target"].read(pages, held)
    for (keys, values), fresh in zip(layers, cache.layers, strict=True):
        torch.testing.assert_close(keys, fresh.keys[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(values, fresh.values[0], rtol=1e-10, atol=1e-10)
    served.pool.close(row)
    served.close()


def test_an_engines_copies_follow_the_targets_weights() -> None:
    target: Any = models.llama(seed=1, num_key_value_heads=2)
    served = Engine(target, SelfDrafter(target, "int8", k=3), num_pages=40, page_size=4)
    served.submit(HEAD, max_new_tokens=6).result()
    target.load_state_dict(models.llama(seed=2, num_key_value_heads=2).state_dict())
    found = served.submit(HEAD, max_new_tokens=12).result().token_ids
    wanted: Any = target.generate(torch.tensor([HEAD]), max_new_tokens=12, do_sample=False)
    assert found == wanted[0, len(HEAD) :].tolist()
    assert served.metrics().num_drafter_faults == 0
    served.close()
