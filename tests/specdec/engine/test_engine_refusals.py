"""`submit` refuses what `Speculator.generate` refuses, before anybody else is touched."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import models
import numpy as np
import pytest
import torch
from engine_cases import FAMILY, alone, asks, assert_clean, submit
from transformers import GenerationConfig

from specdec import Speculator
from specdec.engine import Engine
from specdec.kv import UnsupportedArgumentError

PROMPT = [5, 6, 7, 8]
NAN, INFINITE = float("nan"), float("inf")

VALUES: dict[str, list[Any]] = {
    "max_new_tokens": [0, -1, NAN, INFINITE, -INFINITE, 3.5, 4.0, "5", [4], 4, np.int64(4), torch.tensor(4)],
    "max_length": [2, NAN, INFINITE, 8.5, -3, "9", 9],
    "min_new_tokens": [-1, "2", 2],
    "temperature": [0.0, -1.0, "hot", 0.7],
    "top_k": [0, -1, "5", 5],
    "top_p": [-1.0, 2.0, NAN, "x", 0.9],
    "repetition_penalty": [0.0, -1.0, "x", 1.2],
    "no_repeat_ngram_size": [-1, "2", 2],
    "num_beams": [0, 2, 1],
    "seed": [-1, 2**62, np.int64(3), torch.tensor(3), 3],
    "bad_words_ids": [[], [[]], [[models.VOCAB]], [[-1]], "x", [[3]]],
    "sequence_bias": [{(models.VOCAB,): 1.0}, "x", {(3,): 2.0}],
    "logits_processor": ["x", [None], [3]],
    "stopping_criteria": ["x", [None], [3]],
    "prefix_allowed_tokens_fn": ["x", 3],
    "watermarking_config": ["x"],
    "use_cache": [False, True],
    "stop_strings": ["a"],
    "guidance_scale": [2.0, 1.0],
    "cache_implementation": ["paged"],
    "prompt_lookup_num_tokens": [3],
    "penalty_alpha": [0.6],
    "generation_config": [GenerationConfig(num_beams=3), GenerationConfig(max_new_tokens=NAN), "x"],
    "temprature": [1.0],
    "synced_gpus": [True],
    "token_healing": [True],
    "assistant_model": [object()],
}
RULES = [("auto", False), ("greedy", False), ("typical", False), ("typical", True), ("greedy", True), ("block", False),
         ("traversal", False), ("coupled", False), ("best", False), (None, False), ("auto", True)]  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Any:
    return Engine(models.target(FAMILY), models.draft("near", FAMILY), k=3, num_pages=100, page_size=4)


def of_generate(rule: str, lossy: bool, options: dict[str, Any]) -> Any:
    ids = torch.tensor([PROMPT])
    try:
        spec = Speculator(models.target(FAMILY), models.draft("near", FAMILY), k=3, rule=rule, lossy=lossy)
        out: Any = spec.generate(ids, attention_mask=torch.ones_like(ids), **options)
    except Exception as refusal:
        return type(refusal)
    return out[0, len(PROMPT) :].tolist()


def of_engine(served: Engine, rule: str, lossy: bool, options: dict[str, Any]) -> Any:
    try:
        handle = served.submit(PROMPT, rule=rule, lossy=lossy, **options)
    except Exception as refusal:
        return type(refusal)
    return handle.result().token_ids


def agree(served: Engine, options: dict[str, Any], rule: Any = "auto", lossy: bool = False) -> bool:
    """Whether it is refused by both (True) or by neither (False)."""
    theirs = of_generate(rule, lossy, dict(options))
    ours = of_engine(served, rule, lossy, dict(options))
    if isinstance(ours, list) or isinstance(theirs, list):
        assert ours == theirs, (options, rule)
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VALUES)
def test_both_refuse_the_same_arguments(served: Engine, name: str) -> None:
    refused = 0
    for value in VALUES[name]:
        for sampling in (False, True):
            options = {"max_new_tokens": 6, "do_sample": sampling, "seed": 3, "pad_token_id": 0, name: value}
            if name in ("max_length", "generation_config"):
                del options["max_new_tokens"]
            refused += agree(served, options)
    assert refused > 0 or name == "seed"
    assert_clean(served)


def test_both_refuse_the_same_rules(served: Engine) -> None:
    options = {"max_new_tokens": 6, "seed": 3, "pad_token_id": 0}
    refused = [agree(served, {**options, "do_sample": s}, *rule) for rule in RULES for s in (False, True)]
    assert 0 < sum(refused) < len(refused)
    assert_clean(served)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": NAN}, {"timeout": INFINITE}, {"timeout": 0}, {"timeout": -1.0}, {"timeout": "1"}, {"timeout": True},
        {"timeout": []}, {"timeout": 10**400}, {"priority": 1.0}, {"priority": "1"}, {"priority": True},
        {"priority": None}, {"seed": 3.7}, {"seed": "7"}, {"seed": True}, {"seed": [3]},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_the_engines_own_is_checked_as_well(served: Engine, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UnsupportedArgumentError, match=name):
        served.submit(PROMPT, max_new_tokens=4, **options)
    assert_clean(served)


def test_numbers_of_other_libraries_are_numbers(served: Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "pad_token_id": 0}
    plain = served.submit(PROMPT, seed=3, **options)
    other = served.submit(PROMPT, seed=np.int64(3), priority=np.int32(1), timeout=np.float32(60), **options)
    third = served.submit(PROMPT, seed=torch.tensor(3), timeout=Decimal(60), **options)
    assert plain.result().token_ids == other.result().token_ids == third.result().token_ids


def test_a_refusal_is_nobody_elses_loss(served: Engine) -> None:
    (ask,) = asks(1, seed=2)
    served = Engine(models.target(FAMILY), None, drafters={"chain": models.draft("near", FAMILY)}, num_pages=60)
    config = models.target(FAMILY).generation_config
    before = config.to_dict()
    going = submit(served, ask, draft="none", do_sample=False)
    for name in ("max_new_tokens", "bad_words_ids", "logits_processor", "stop_strings"):
        with pytest.raises((ValueError, TypeError)):
            served.submit(PROMPT, **{"max_new_tokens": 3, name: VALUES[name][2 % len(VALUES[name])]})
        served.step()
    assert config.to_dict() == before
    plain = type(ask)(ask.prompt, "none", ask.seed, ask.new_tokens, 0)
    assert going.result().token_ids == alone(plain)[0]
    assert_clean(served)
