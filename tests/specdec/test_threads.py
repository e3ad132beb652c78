"""Threads that share one Speculator: calls take turns, each with the text, the settings and the rules of its own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import models
import pytest
import torch
from tiny_pair import byte_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specdec import Speculator, UnsupportedArgumentError

TARGET: Any = models.target("llama-gqa", "fp64", 0)
PROMPTS = [torch.tensor([[3, 5, 7, 11]]), torch.tensor([[8, 4, 9]]), torch.tensor([[20, 21], [22, 23]])]


def settings(number: int) -> dict[str, Any]:
    ids = PROMPTS[number % len(PROMPTS)]
    sampled = number % 2 == 1
    mine: dict[str, Any] = {"do_sample": True, "seed": number, "top_k": 0} if sampled else {"do_sample": False}
    return {"inputs": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "eos_token_id": None, **mine}


@pytest.mark.parametrize("hook", [False, True], ids=["generate", "custom_generate"])
def test_calls_of_many_threads_take_turns(hook: bool) -> None:
    spec = Speculator(TARGET, models.draft("near", "llama-gqa"), k=3)
    alone = [spec.generate(**settings(number)) for number in range(12)]
    together = threading.Barrier(4)

    def call(number: int) -> Any:
        if number < 4:
            together.wait(30)
        if hook:
            return TARGET.generate(**settings(number), custom_generate=spec)
        return spec.generate(**settings(number))

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(call, range(12)))
    for wanted, text in zip(alone, texts, strict=True):
        assert torch.equal(wanted, text)  # type: ignore[arg-type]


def beside(first: Callable[[Callable[[Any], None]], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    """Both results, where the second call comes while the first is in one of its steps and stays there for a while."""
    inside, come = threading.Event(), threading.Event()

    def wait(_: Any) -> None:
        inside.set()
        come.wait(0.3)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first, wait)
        assert inside.wait(60)
        two = pool.submit(second)
        return one.result(60), two.result(60)


def test_stop_strings_of_the_target_hold_for_every_call() -> None:
    """They are taken out of the target's generation config while a call runs; the next call must find them again."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    target: Any = models.build(LlamaForCausalLM, config, torch.float64, 3, "sdpa")
    ids = torch.tensor([[40, 41, 42]])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 10}
    text: Tensor = target.generate(ids, **options, eos_token_id=None)
    stop = tokenizer.decode(text[0, 6:7])
    target.generation_config.stop_strings = [stop]
    target.generation_config.eos_token_id = None
    wanted = target.generate(ids, **options, tokenizer=tokenizer)
    assert wanted.shape[1] < text.shape[1]
    spec = Speculator(target, "ngram", k=3, tokenizer=tokenizer)
    one, two = beside(
        lambda wait: spec.generate(ids, **options, on_step=wait),
        lambda: spec.generate(ids, **options),
    )
    assert torch.equal(one, wanted)
    assert torch.equal(two, wanted)
    assert target.generation_config.stop_strings == [stop]


def test_a_failed_call_lets_the_next_thread_in() -> None:
    spec = Speculator(TARGET, "ngram", k=3)
    wanted = spec.generate(**settings(0))

    def failing(wait: Callable[[Any], None]) -> str:
        def boom(trace: Any) -> None:
            wait(trace)
            raise RuntimeError("boom")

        with pytest.raises(RuntimeError, match="boom"):
            spec.generate(**settings(2), on_step=boom)
        return "failed"

    one, two = beside(failing, lambda: spec.generate(**settings(0)))
    assert one == "failed"
    assert torch.equal(two, wanted)  # type: ignore[arg-type]


def test_a_callback_is_refused_in_its_own_thread_only() -> None:
    spec = Speculator(TARGET, "ngram", k=3)
    refused = []

    def nested(_: Any) -> None:
        with pytest.raises(UnsupportedArgumentError, match="already decoding"):
            spec.generate(**settings(0))
        refused.append(True)

    out = spec.generate(**settings(2), on_step=nested)
    assert refused
    assert torch.equal(out, spec.generate(**settings(2)))  # type: ignore[arg-type]


def test_copies_take_turns_of_their_own() -> None:
    spec = Speculator(models.target("llama-gqa"), "ngram")
    other = copy.deepcopy(spec)
    prompt = torch.tensor([[3, 4, 5, 3, 4]])
    with spec._lock:
        thread = threading.Thread(target=lambda: other.generate(prompt, max_new_tokens=2, do_sample=False), daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    assert other.report is not None
