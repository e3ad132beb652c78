"""Smoke: greedy text of every family, a sampled law, a cache that is used again, patch() and the engine."""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

import pytest
import torch
import transformers as tf
from exact_law import joint_law
from families import NAMES, small_model
from law_checks import NEW, counts_of, draw, must_be_caught
from models import draft, noisy_copy, prompts, target
from stats import g_test, judge
from transformers.utils import logging

import specdec
from specdec.kv import versions
from specdec.lab.tiny import noisy_copy as noisy_llama
from specdec.lab.tiny import tiny_llama

IDS = torch.tensor([[0, 0, 0, 5, 9, 23, 41, 9, 23], [33, 8, 17, 52, 8, 17, 40, 8, 17]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
GREEDY: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
BOTH_WAYS = ("MegatronBertForCausalLM", "RemBertForCausalLM")
KNOWN = [name for name in NAMES if name in frozenset(dir(tf))]


def test_this_version_was_tested() -> None:
    said = versions.tested_range()
    if os.environ.get("SPECDEC_SMOKE_WHEEL"):
        newest = [int(part) for part in versions.NEWEST_TESTED.split(".")]
        assert [int(part) for part in tf.__version__.split(".")[:2]] >= newest, f"not the newest there is: {said}"
    if said.endswith(("newer", "older")):
        pytest.skip(f"{said}: run the whole suite on it, then move the range in kv/versions.py")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # GPTBigCode before 5.18
@pytest.mark.parametrize("name", KNOWN)
def test_greedy_text_is_plain_generates(name: str) -> None:
    model = small_model(name)
    if name in BOTH_WAYS and not hasattr(sys.modules[type(model).__module__], "create_causal_mask"):
        pytest.skip("its masks are not causal in this version, so it is refused")
    spec: Any = specdec.Speculator(model, "ngram", k=3)
    assert torch.equal(spec.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))


def test_the_comparison_sees_another_models_text() -> None:
    """Negative control: a model a short way off the target writes something else."""
    model = small_model("LlamaForCausalLM")
    other: Any = specdec.Speculator(noisy_copy(model, 0.15), "ngram", k=3).generate(IDS, **GREEDY)
    assert not torch.equal(other, model.generate(IDS, **GREEDY))


def test_a_deprecated_name_would_be_noticed(deprecations: list[str]) -> None:
    """Negative control: every test fails that leaves something in this list."""
    logging.get_logger("transformers.generation").warning("`past_key_values` is deprecated.")
    assert len(deprecations) == 1
    deprecations.clear()


def test_sampled_text_follows_the_targets_law() -> None:
    model, prompt = tiny_llama(seed=3), torch.tensor([[1, 5, 2]])
    mask = torch.ones_like(prompt)
    drawn = draw(
        specdec.Speculator(model, noisy_llama(model, seed=4), k=2), prompt, mask, 8000, seed=1, temperature=0.8
    )
    counts = counts_of(drawn[0], vocab=8)
    judge(g_test(counts, joint_law(model, prompt, mask, NEW, temperature=0.8).numpy().ravel()), "tokens 1-3")
    with must_be_caught():
        judge(g_test(counts, joint_law(model, prompt, mask, NEW, temperature=0.9).numpy().ravel()), "another law")


def test_a_cache_is_continued_and_returned_as_plain_does() -> None:
    """Two turns each, the second on the first one's cache, under the installed version's name and read by it."""
    name = "cache" if "cache" in inspect.signature(tf.LlamaForCausalLM.forward).parameters else "past_key_values"
    model: Any = target("llama-gqa")
    ids, _ = prompts((6,), 41, seed=2)
    more, _ = prompts((3,), 41, seed=5)
    ends = []
    spec: Any = specdec.Speculator(model, draft("near", "llama-gqa"), k=3)
    for generate in (model.generate, spec.generate):
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
        mine = tf.DynamicCache()
        first = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **{name: mine}, **options)
        assert getattr(first, name) is first[name] is mine
        turn = torch.cat([first.sequences, more], dim=1)
        second = generate(
            turn, attention_mask=torch.ones_like(turn), max_new_tokens=6, **{name: getattr(first, name)}, **options
        )
        ends.append((type(second), list(second), second.sequences, getattr(second, name).layers[0].keys))
    assert ends[0][:2] == ends[1][:2]
    assert torch.equal(ends[0][2], ends[1][2])
    torch.testing.assert_close(ends[0][3], ends[1][3])


def test_inside_patch_the_models_own_generate_speculates() -> None:
    model: Any = target("qwen2")
    ids, mask = prompts((5, 3), 41, seed=1)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **options)
    with specdec.patch(model, draft("near", "qwen2"), k=3) as spec:
        assert torch.equal(model.generate(ids, **options), plain)
    assert spec.report is not None
    assert spec.report.num_steps < 8
    assert torch.equal(model.generate(ids, **options, custom_generate=spec), plain)


def test_the_engine_gives_each_request_plains_text() -> None:
    model: Any = target("llama-gqa")
    texts = [prompts((length,), 41, seed=length)[0] for length in (3, 7, 5)]
    with specdec.Engine(model, draft("near", "llama-gqa"), k=3, num_bytes=1 << 22) as engine:
        handles = [engine.submit(ids[0].tolist(), max_new_tokens=8, do_sample=False) for ids in texts]
        found = [handle.result().token_ids for handle in handles]
    for ids, tokens in zip(texts, found, strict=True):
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert tokens == plain[0, ids.shape[1] :].tolist()
