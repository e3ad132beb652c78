"""The ways to call `generate`: plain's positions, a patched model's own loops, and failed calls that change nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

import specdec
from specdec import Speculator, UnsupportedArgumentError
from specdec.kv.versions import CACHE_KEYWORD, cache_of

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14, "attention_mask": MASK}
OWN_LOOP = 10
"""Place of `custom_generate` among plain's positional arguments."""


@pytest.fixture
def target() -> Any:
    """One that a test may change."""
    return copy.deepcopy(models.target("llama-gqa", "fp64"))


def has_run(spec: Speculator) -> bool:
    return spec.report is not None


class Avoid(LogitsProcessor):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.token] = -30.0
        return scores


def test_positions_are_those_of_plain_generate(target: Any) -> None:
    config = GenerationConfig(max_new_tokens=6, do_sample=False)
    avoid = LogitsProcessorList([Avoid(int(target.generate(IDS, config)[0, 4]))])
    seen: list[list[int]] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            seen[-1].extend(value.flatten().tolist())

        def end(self) -> None:
            pass

    with specdec.patch(target, "ngram", k=3) as spec:
        for stop in range(OWN_LOOP + 1):
            everything: tuple[Any, ...] = (
                config,
                avoid,
                None,
                lambda row, text: list(range(3, 30)),
                False,
                None,
                Streamer(),
                IDS,
                None,
                None,
            )
            arguments = everything[:stop]
            rows = IDS[:1] if stop >= 7 else IDS
            spec.report = None
            texts = []
            for generate in (target.generate, lambda *a, **k: type(target).generate(target, *a, **k)):
                seen.append([])
                texts.append(generate(rows, *arguments, **({} if arguments else {"generation_config": config})))
            assert torch.equal(*texts)
            assert seen[-1] == seen[-2]
            assert has_run(spec)
    assert max(map(len, seen)) == 10


@pytest.mark.parametrize("positional", [False, True])
def test_a_loop_of_the_users_own_runs_in_a_patched_model(target: Any, positional: bool) -> None:
    def mine(model: Any, input_ids: Tensor, **kwargs: Any) -> str:
        assert model is target
        return f"mine, {input_ids.shape[0]} rows"

    def inside(model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        return model.generate(input_ids, **GREEDY)  # which speculates

    def call(loop: Any) -> Any:
        given = (*(None,) * (OWN_LOOP - 1), loop) if positional else ()
        return target.generate(IDS, *given, **GREEDY, **({} if positional else {"custom_generate": loop}))

    plain = target.generate(IDS, **GREEDY)
    with specdec.patch(target, "ngram", k=3) as spec:
        assert call(mine) == "mine, 2 rows"
        assert not has_run(spec)
        assert torch.equal(call(inside), plain)
        assert has_run(spec)
        assert torch.equal(call(Speculator(target, "ngram", k=2)), plain)
        with pytest.raises(UnsupportedArgumentError, match="assistant_model: the drafter is given"):
            target.generate(IDS, None, None, None, None, None, target, **GREEDY)
        with pytest.raises(ValueError, match="max_new_token"):
            target.generate(IDS, max_new_token=3)
    with pytest.raises(UnsupportedArgumentError, match="custom_generate"):
        Speculator(target, "ngram").generate(IDS, custom_generate=mine, **GREEDY)


def test_patches_nest_and_give_back_what_they_found(target: Any) -> None:
    def found(*args: Any, **kwargs: Any) -> str:
        return "the user's own generate"

    target.generate = found
    plain = type(target).generate(target, IDS, **GREEDY)
    with specdec.patch(target, "ngram", k=3) as outer:
        with specdec.patch(target, "ngram", k=2) as inner:
            assert torch.equal(target.generate(IDS, **GREEDY), plain)
            assert not has_run(outer)
            assert has_run(inner)
        assert torch.equal(target.generate(IDS, **GREEDY), plain)
        assert has_run(outer)
        assert target.generate(IDS, custom_generate=found) == found()
    assert target.generate is found


def test_a_path_has_no_generate_to_patch() -> None:
    with pytest.raises(UnsupportedArgumentError, match="expected a model object"), specdec.patch("some/model", "ngram"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("hook", [False, True], ids=["generate", "custom_generate"])
@pytest.mark.filterwarnings("ignore")
def test_what_plain_collects_and_throws_away_is_not_refused(target: Any, name: str, hook: bool) -> None:
    spec = Speculator(target, "ngram", k=3)

    def call(**asked: Any) -> Any:
        arguments = {**GREEDY, **asked}
        return target.generate(IDS, custom_generate=spec, **arguments) if hook else spec.generate(IDS, **arguments)

    plain = target.generate(IDS, **GREEDY, **{name: True})
    assert torch.equal(call(**{name: True}), plain)
    setattr(target.generation_config, name, True)
    assert torch.equal(call(), plain)
    if name == "output_attentions":
        with pytest.raises(UnsupportedArgumentError, match=name):
            call(return_dict_in_generate=True)
    else:
        assert len(call(return_dict_in_generate=True).hidden_states) == plain.shape[1] - IDS.shape[1]


class Interrupt(LogitsProcessor):
    """Raises from the third call on."""

    def __init__(self, error: BaseException):
        self.error, self.calls = error, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls >= 3:
            raise self.error
        return scores


def faults() -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Name, arguments, expected error."""
    for error in (ValueError("boom"), KeyboardInterrupt()):

        def raises(*_: Any, error: BaseException = error) -> Any:
            raise error

        name = type(error).__name__
        yield f"on_step-{name}", {"on_step": raises}, type(error)
        yield f"processor-{name}", {"logits_processor": LogitsProcessorList([Interrupt(error)])}, type(error)
        yield f"prefix-{name}", {"prefix_allowed_tokens_fn": raises}, type(error)
        yield f"stop-{name}", {"stopping_criteria": [raises]}, type(error)
    for arguments in (
        {"num_beams": 2}, {"bogus": 1}, {"cache_implementation": "static", "return_dict_in_generate": True},
        {"attention_mask": MASK * 3}, {"max_new_tokens": 0}, {"stop_strings": ["x"]}, {"assistant_model": object()},
        {"token_type_ids": IDS}, {"max_length": 2, "max_new_tokens": None}, {"cache_implementation": "nonsense"},
    ):  # fmt: skip
        yield "-".join(map(str, arguments)), arguments, Exception


@pytest.mark.parametrize(("arguments", "error"), [case[1:] for case in faults()], ids=[case[0] for case in faults()])
@pytest.mark.parametrize("hold", [False, True], ids=["no cache", "cache"])
@pytest.mark.filterwarnings("ignore")
def test_a_call_that_fails_leaves_everything_as_it_was(target: Any, arguments: Any, error: Any, hold: bool) -> None:
    target.generation_config.stop_strings = None
    target.generation_config.repetition_penalty = 1.1
    target.generate = target.generate  # an attribute of the user's
    spec: Any = Speculator(target, models.draft("near", "llama-gqa"), k=3)
    config = GenerationConfig(max_new_tokens=9, do_sample=False, top_k=7, mine=3)

    def attributes() -> dict[str, Any]:
        own = {name: value for name, value in vars(target).items() if name != "_previous_max_cache_length"}
        hooks = [part._forward_pre_hooks.copy() for part in target.modules()]
        forwards = [vars(part).get("forward") for part in target.modules()]
        settings = (target.generation_config.to_dict(), config.to_dict(), target.config.to_dict())
        return {**own, "all": (hooks, forwards, settings, target.config._attn_implementation, target.training)}

    plain = target.generate(IDS, config, attention_mask=MASK)
    cache = cache_of(target.generate(IDS, attention_mask=MASK, max_new_tokens=1, return_dict_in_generate=True))
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    held = {CACHE_KEYWORD: cache} if hold and "cache_implementation" not in arguments else {}
    text = torch.cat([IDS, IDS[:, :1]], dim=1) if held else IDS
    mask = {"attention_mask": torch.cat([MASK, MASK[:, 1:2]], dim=1) if held else MASK}
    before = attributes()
    with pytest.raises(error):
        spec.generate(text, config, **{**mask, **held, **arguments})
    after = attributes()
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items() if name != "all")
    assert after["all"] == before["all"]
    assert all(
        torch.equal(layer.keys, k) and torch.equal(layer.values, v)
        for layer, (k, v) in zip(cache.layers, kept, strict=True)
    )
    assert torch.equal(spec.generate(IDS, config, attention_mask=MASK), plain)
