"""Versions: the cache under the installed transformers' name and under another model's own, and what refusals say."""

from __future__ import annotations

import inspect
import re
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers as tf
from packaging.requirements import Requirement
from packaging.version import Version

import specdec
from specdec.cli.doctor import run_checks
from specdec.kv import versions
from specdec.kv.support import check_model

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[5, 9, 23, 31, 9, 23, 31, 9], [7, 7, 8, 11, 7, 7, 8, 11]])
GREEDY: dict[str, Any] = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 9, "do_sample": False}
RENAMED = Version(tf.__version__) >= Version("5.24")
OWN = "cache" if RENAMED else "past_key_values"


class TakesCache(tf.LlamaForCausalLM):
    """A user's model that was written for the newer name."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: Any = None,
        **rest: Any,
    ) -> Any:
        return plain_forward(self, input_ids, attention_mask, position_ids, cache, rest)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = prepared_inputs(self, *args, **kwargs)
        return {"cache": inputs.pop(versions.CACHE_KEYWORD, None), **inputs}


class TakesPastKeyValues(tf.LlamaForCausalLM):
    """A user's model that was written for the older name."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        **rest: Any,
    ) -> Any:  # fmt: skip
        return plain_forward(self, input_ids, attention_mask, position_ids, past_key_values, rest)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = prepared_inputs(self, *args, **kwargs)
        return {"past_key_values": inputs.pop(versions.CACHE_KEYWORD, None), **inputs}


class TakesNeither(tf.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **rest: Any) -> Any:
        return plain_forward(self, input_ids, attention_mask, position_ids, tf.DynamicCache(), rest)


def prepared_inputs(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    found: dict[str, Any] = tf.LlamaForCausalLM.prepare_inputs_for_generation(model, *args, **kwargs)
    return found


def plain_forward(model: Any, ids: Any, mask: Any, positions: Any, cache: Any, rest: dict[str, Any]) -> Any:
    assert cache is not None, "the cache came under another name"
    named = {versions.CACHE_KEYWORD: cache}
    return tf.LlamaForCausalLM.forward(model, ids, mask, positions, **named, **rest)


def built(kind: type[Any], seed: int = 0) -> Any:
    config = models.target("llama-gqa").config
    return models.build(kind, config, torch.float64, seed, "sdpa")


def encoder_decoder() -> Any:
    return tf.T5Model(tf.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1))


@pytest.mark.parametrize("kind", [TakesCache, TakesPastKeyValues])
@pytest.mark.parametrize("drafts", [{"k": 3}, {"tree": (2, 2)}], ids=["chain", "tree"])
def test_a_model_gets_its_cache_under_its_own_name(kind: type[Any], drafts: dict[str, Any]) -> None:
    model = built(kind)
    spec: Any = specdec.Speculator(model, models.noisy_copy(model, 0.05), **drafts)
    assert torch.equal(spec.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0
    with specdec.Engine(model, "ngram", k=2, num_bytes=1 << 20) as engine:
        found = engine.submit(IDS[0].tolist(), max_new_tokens=9, do_sample=False).result().token_ids
    alone = model.generate(IDS[:1], **{**GREEDY, "attention_mask": None})[0, IDS.shape[1] :]
    assert found == alone.tolist()


@pytest.mark.parametrize("kind", [TakesCache, TakesPastKeyValues])
def test_under_a_wrong_name_it_would_not_arrive(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    wrong = "past_key_values" if kind is TakesCache else "cache"
    monkeypatch.setattr("specdec.verify.passes.modules.cache_argument", lambda model: wrong)
    with pytest.raises(specdec.TargetFaultError, match="under another name"):
        specdec.Speculator(built(kind), "ngram", k=2).generate(IDS, **GREEDY)


def test_a_model_that_takes_no_cache_is_refused() -> None:
    with pytest.raises(specdec.UnsupportedModelError) as refusal:
        specdec.Speculator(built(TakesNeither), "ngram")
    said = str(refusal.value)
    assert "TakesNeither.forward takes neither `cache` nor `past_key_values`" in said
    assert f"tested with transformers 5.17 to 5.24, installed is {tf.__version__}" in said
    assert "newer" not in said
    assert "older" not in said


@pytest.mark.parametrize(("installed", "side"), [("5.25.0", "newer"), ("6.1.0.dev0", "newer"), ("5.16.3", "older")])
def test_outside_of_the_tested_range_every_refusal_of_a_model_says_so(
    installed: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions.transformers, "__version__", installed)
    said = []
    for model in (
        built(TakesNeither),
        tf.T5Model(tf.T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1)),
    ):
        with pytest.raises(specdec.UnsupportedModelError) as refusal:
            check_model(model, "target")
        said.append(str(refusal.value))
    assert all(text.count(f"5.17 to 5.24, installed is {installed}, which is {side}") == 1 for text in said)
    assert check_model(built(TakesCache), "target") is not None, (
        "a version that nobody tested is not refused for itself"
    )


@pytest.mark.parametrize("installed", ["5.17.0", "5.20.1", "5.24.0", "5.24.7", "5.24.0.dev0"])
def test_inside_of_the_tested_range_nothing_is_said(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.transformers, "__version__", installed)
    assert versions.tested_range() == f"tested with transformers 5.17 to 5.24, installed is {installed}"
    with pytest.raises(specdec.UnsupportedModelError) as refusal:
        check_model(encoder_decoder(), "target")
    assert "tested with" not in str(refusal.value)


@pytest.mark.parametrize(("installed", "end"), [(None, ""), ("5.31.2", ", which is newer")])
def test_the_doctor_names_the_tested_range(installed: str | None, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.cli.doctor.check_pair", lambda *choice: iter(()))
    if installed is not None:
        monkeypatch.setattr(versions.transformers, "__version__", installed)
    found = {check.name: (check.status, check.detail) for check in run_checks("none", "cpu", 1)}
    expected = f"tested with transformers 5.17 to 5.24, installed is {installed or tf.__version__}{end}"
    assert found["tested versions"] == ("info", expected)


def turns(model: Any, generate: Callable[..., Any], name: str) -> tuple[Any, list[str]]:
    """Two turns on one cache, passed as `name`; the second answer, and the categories of what was warned of."""
    ids, more = IDS[:1, :5], IDS[:1, 5:]
    options: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        first = generate(ids, attention_mask=torch.ones_like(ids), **{name: tf.DynamicCache()}, **options)
        turn = torch.cat([first.sequences, more], dim=1)
        second = generate(turn, attention_mask=torch.ones_like(turn), **{name: first[name]}, **options)
    return second, [warning.category.__name__ for warning in heard]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_callers_cache_under_either_name(name: str) -> None:
    model: Any = models.target("llama-gqa")
    spec = specdec.Speculator(model, models.draft("near", "llama-gqa"), k=3)
    if name not in (OWN, "past_key_values"):
        for generate in (model.generate, spec.generate):
            with pytest.raises(ValueError, match="cache"):
                generate(IDS, **GREEDY, cache=tf.DynamicCache())
        return
    (plain, heard), (ours, heard_too) = (turns(model, generate, name) for generate in (model.generate, spec.generate))
    assert heard == heard_too == (["FutureWarning"] * 2 if name != OWN else [])
    assert type(plain) is type(ours)
    assert list(plain) == list(ours)
    assert torch.equal(plain.sequences, ours.sequences)
    assert plain[name].get_seq_length() == ours[name].get_seq_length()
    assert ours[name] is ours[OWN] is getattr(ours, OWN) is getattr(ours, name) is versions.cache_of(ours)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_an_engine_takes_a_cache_under_no_name(name: str) -> None:
    with specdec.Engine(models.target("llama-gqa"), "ngram", k=2, num_bytes=1 << 20) as engine:
        with pytest.raises(specdec.UnsupportedArgumentError, match=f"^{name} is not taken by an engine"):
            engine.submit([3, 4, 5], None, max_new_tokens=2, **{name: tf.DynamicCache()})


def test_the_cache_of_an_output_is_found_or_missed_by_name() -> None:
    model: Any = models.target("llama-gqa")
    out = model(IDS, use_cache=True)
    assert versions.cache_of(out) is out[OWN]
    assert versions.cache_of(model(IDS, use_cache=False)) is None
    with pytest.raises(AttributeError, match="Tensor"):
        versions.cache_of(IDS)


def test_the_name_is_the_one_in_transformers() -> None:
    assert versions.CACHE_KEYWORD == OWN
    assert versions.cache_argument(models.target("gpt2")) == OWN
    assert OWN in inspect.signature(tf.LlamaForCausalLM.forward).parameters


def test_the_range_is_that_of_the_environments() -> None:
    def pinned(name: str) -> Version:
        found = re.search(r"^transformers==(\S+)$", (ROOT / name).read_text(), re.M)
        assert found is not None
        return Version(found.group(1))

    oldest, newest = Version(versions.OLDEST_TESTED), Version(versions.NEWEST_TESTED)
    assert pinned("constraints-min.txt").release[:2] == oldest.release
    assert oldest <= pinned("constraints.txt") < Version(f"{newest}.99")
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = next(Requirement(line) for line in needed if line.startswith("transformers")).specifier
    assert oldest in allowed
    assert newest in allowed
    assert Version("5.99") in allowed, "newer releases are tried by `make smoke`, not shut out"
    assert not allowed.contains("5.16.0")
