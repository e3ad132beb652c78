"""K/V of earlier weights is never given to a later request, however the weights came to be others."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from engine_cases import FAMILY, assert_clean
from torch import nn
from weight_changes import ADAPTERS, CHANGES, PROMPT, Change, adapted, change_of, target

from specdec import Speculator
from specdec.drafters import FallbackGuard, ModelDrafter, NgramDrafter
from specdec.engine import Engine
from specdec.engine.setup import models_of
from specdec.verify import weights as weights_module
from specdec.verify.weights import PATIENCE, SAMPLES, Weights


def plain(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


def ask(served: Engine, prompt: list[int] = PROMPT, count: int = 8) -> Any:
    return served.submit(prompt, do_sample=False, max_new_tokens=count, eos_token_id=None)


def before_and_after(model: Any, change: Change) -> tuple[list[int], list[int], int, Engine]:
    """An engine's text after a change, plain decoding's, and the tokens the engine found cached."""
    served = Engine(model, None, num_pages=40, page_size=4)
    ask(served).result()
    again = ask(served).result()
    assert again.num_cached_tokens == 28
    assert again.token_ids == plain(model, PROMPT, 8)
    change(model)
    result = ask(served).result()
    return result.token_ids, plain(model, PROMPT, 8), result.num_cached_tokens, served


@pytest.mark.parametrize("name", [*CHANGES, *(f"adapters {name}" for name in [*ADAPTERS, "taken out"])])
def test_a_prompt_is_read_again_after_a_change(name: str) -> None:
    got, wanted, cached, served = before_and_after(target(name.startswith("adapters ")), change_of(name))
    assert got == wanted
    assert cached == 0
    assert ask(served).result().num_cached_tokens == 28  # and is known again from then on
    served.close()
    assert_clean(served)


@pytest.mark.parametrize("name", ["in place", "data copied into"])
def test_an_engine_that_does_not_look_reuses_old_prompts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(Weights, "changed", lambda self: False)
    got, wanted, cached, _ = before_and_after(target(), CHANGES[name])
    assert cached == 28
    assert got != wanted


@pytest.mark.parametrize("change", ["in place", "data assigned", "another dtype"])
@pytest.mark.parametrize("seeded", [False, True])
def test_a_drafters_new_weights(change: str, seeded: bool) -> None:
    """Drafts of old K/V would make other steps, and with a seed another text."""
    model, draft = target(), copy.deepcopy(models.draft("near", FAMILY))
    served = Engine(model, draft, k=3, num_pages=60, page_size=4, adaptive=False)
    options: dict[str, Any] = {"do_sample": True, "seed": 4} if seeded else {"do_sample": False}
    options |= {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    served.submit(PROMPT, **options).result()
    CHANGES[change](draft)
    result = served.submit(PROMPT, **options).result()
    assert result.num_cached_tokens == 0
    spec, ids = Speculator(model, draft, k=3), torch.tensor([PROMPT])
    out: Any = spec.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert spec.report is not None
    assert result.token_ids == out[0, len(PROMPT) :].tolist()
    assert (result.num_steps, result.num_accepted_tokens) == (spec.report.num_steps, spec.report.num_accepted_tokens)
    served.close()
    assert_clean(served)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks may take all the time: there is one before every step."""
    monkeypatch.setattr(weights_module, "SHARE", 1e9)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", ["in place", "data assigned", "another dtype"])
def test_requests_in_flight_go_on_from_their_text(name: str) -> None:
    """What was emitted stands; the rest is what the new weights say after it, however far each request had come."""
    model = target()
    served = Engine(model, "ngram", num_pages=60, page_size=4, max_rows=2, max_step_tokens=16)
    handles = [ask(served, PROMPT[i:], 12) for i in range(4)]
    for _ in range(4):
        served.step()
    had = [handle.token_ids for handle in handles]
    assert any(had)
    assert not all(had)
    CHANGES[name](model)
    served.run()
    for i, (handle, emitted) in enumerate(zip(handles, had, strict=True)):
        wanted = plain(model, PROMPT[i:] + emitted, 12 - len(emitted))
        assert handle.result().token_ids == emitted + wanted
    assert ask(served).result().token_ids == plain(model, PROMPT, 8)
    served.close()
    assert_clean(served)


def test_the_cache_can_be_cleared() -> None:
    model = target()
    served = Engine(model, None, num_pages=60, page_size=4)
    ask(served).result()
    served.clear_prefix_cache()
    assert served.pool.num_resting_pages == 0
    assert ask(served).result().num_cached_tokens == 0
    going = [ask(served, PROMPT[i:], 20) for i in range(3)]
    for _ in range(3):
        served.step()
    served.clear_prefix_cache()  # in the middle: texts stay what they are
    assert [handle.result().token_ids for handle in going] == [plain(model, PROMPT[i:], 20) for i in range(3)]
    with served:
        served.clear_prefix_cache()
        assert ask(served).result(60).num_cached_tokens == 0
    assert_clean(served)


@pytest.mark.usefixtures("eager")
def test_weights_that_never_rest_end_sharing_and_nothing_else() -> None:
    model = target()
    part = model.model.layers[0].mlp

    def touch(*_: Any) -> None:
        with torch.no_grad():
            part.up_proj.weight.mul_(1.0)  # the same numbers, written again in every pass

    part.register_forward_hook(touch)
    served = Engine(model, None, num_pages=60, page_size=4)
    for _ in range(3):
        result = ask(served, count=PATIENCE).result()
        assert result.token_ids == plain(model, PROMPT, PATIENCE)
        assert result.num_cached_tokens == 0
    assert not served.pool.sharing
    served.close()
    assert_clean(served)


def test_what_a_look_sees() -> None:
    model = target(with_adapters=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")  # not equal to itself
    weights = Weights([model])
    assert not weights.changed()
    largest = max(model.parameters(), key=lambda weight: weight.numel())
    assert largest.numel() > SAMPLES**2
    for change, seen in (
        (lambda: largest.data.mul_(1.5), True),
        (lambda: None, False),
        (lambda: largest.data.view(-1)[:1].mul_(1.5), False),  # a single number is not among those that are looked at
        (lambda: adapted(model)[0].scaling.clear(), True),
        (lambda: delattr(adapted(model)[0], "scaling"), True),
        (lambda: model.train(), True),
        (lambda: setattr(adapted(model)[0], "note", "new"), True),
        (lambda: setattr(adapted(model)[0], "note", largest), True),
        (lambda: None, False),
        (lambda: model.lm_head.register_parameter("bias", nn.Parameter(torch.zeros(models.VOCAB))), True),
        (lambda: model.lm_head.register_buffer("more", torch.zeros(2)), True),
        (lambda: model.lm_head.add_module("inner", nn.Linear(2, 2)), True),
        (lambda: None, False),
    ):
        change()
        assert weights.changed() is seen


def test_looks_take_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that took a second is not due again for a hundred."""
    now = [10.0]
    monkeypatch.setattr(weights_module, "perf_counter", lambda: now[0])
    weights: Any = Weights([target()])

    def look() -> bool:
        now[0] += 1.0
        return True

    monkeypatch.setattr(weights, "same", look)
    assert now[0] >= weights.next_look
    assert not weights.changed()
    assert weights.next_look == pytest.approx(111.0)


def test_every_model_of_a_drafter_is_watched() -> None:
    draft = models.draft("near", FAMILY)
    both = NgramDrafter()
    both.inner = [ModelDrafter(draft, k=2), {"more": nn.Linear(2, 2)}]  # type: ignore[attr-defined]
    assert [type(model) for model in models_of(FallbackGuard(both))] == [type(draft), nn.Linear]
    assert models_of(None) == []
