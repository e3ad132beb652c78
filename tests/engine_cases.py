"""What the engine tests share: random requests, the text each of them has alone, and a crowd of them in one engine."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import models
import torch

import specdec
from specdec.drafters import BestFirst, DySpec, ModelDrafter, NgramDrafter
from specdec.engine import Engine, Handle

FAMILY = "llama-gqa"
DRAFTERS: dict[str, Any] = {
    "chain": lambda: ModelDrafter(models.draft("near", FAMILY), k=4),
    "tree": lambda: ModelDrafter(models.draft("far", FAMILY), tree=(2, 2)),
    "best": lambda: ModelDrafter(models.draft("near", FAMILY), tree=BestFirst(depth=3, top_k=3, num_nodes=6)),
    "dyspec": lambda: ModelDrafter(models.draft("near", FAMILY), tree=DySpec(3, 5, 2)),
    "ngram": lambda: NgramDrafter(k=5, branches=2),
    "none": lambda: None,
}
SETTINGS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 9},
    {"do_sample": True, "top_p": 0.8},
    {"do_sample": True, "repetition_penalty": 1.3},
    {"do_sample": True, "rule": "coupled"},
    {"do_sample": False, "no_repeat_ngram_size": 3},
]


@dataclass(frozen=True)
class Ask:
    """One request, plain data."""

    prompt: tuple[int, ...]
    draft: str
    seed: int
    new_tokens: int
    setting: int
    family: str = FAMILY
    extra: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def options(self) -> dict[str, Any]:
        out = dict(SETTINGS[self.setting], max_new_tokens=self.new_tokens, eos_token_id=[2, 9], pad_token_id=0)
        return {**out, "seed": self.seed, **self.extra}


@lru_cache(maxsize=64)
def speculator(draft: str, rule: str, family: str = FAMILY) -> specdec.Speculator:
    return specdec.Speculator(models.target(family), DRAFTERS[draft](), rule=rule)


@lru_cache(maxsize=4096)
def alone(ask: Ask) -> tuple[list[int], int, int]:
    """Tokens, steps and accepted tokens of `Speculator.generate` for this request by itself."""
    options = dict(ask.options)
    spec = speculator(ask.draft, options.pop("rule", "auto"), ask.family)
    prompt = torch.tensor([ask.prompt])
    out = spec.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert spec.report is not None
    assert isinstance(out, torch.Tensor)
    return out[0, len(ask.prompt) :].tolist(), spec.report.num_steps, spec.report.num_accepted_tokens


def asks(count: int, seed: int, longest: int = 24, shared: int = 0) -> list[Ask]:
    """Random requests; `shared` tokens begin every other prompt."""
    rng = random.Random(seed)
    head = [rng.randrange(3, models.VOCAB) for _ in range(shared)]
    out = []
    for i in range(count):
        tail = [rng.randrange(3, models.VOCAB) for _ in range(rng.randrange(1, longest))]
        prompt = (head if i % 2 else []) + tail
        out.append(
            Ask(
                tuple(prompt),
                rng.choice(list(DRAFTERS)),
                rng.randrange(2**62),
                rng.randrange(1, 20),
                rng.randrange(len(SETTINGS)),
            )
        )
    return out


def engine(family: str = FAMILY, **options: Any) -> Engine:
    """An engine with every drafter."""
    settings: dict[str, Any] = {"num_pages": 60, "page_size": 4, "max_rows": 6, "max_step_tokens": 64}
    drafters = {name: make() for name, make in DRAFTERS.items() if name != "none"}
    return Engine(models.target(family), None, **{**settings, "drafters": drafters, **options})


def submit(target: Engine, ask: Ask, **more: Any) -> Handle:
    return target.submit(ask.prompt, **{"draft": ask.draft, **ask.options, **more})


def assert_clean(target: Engine) -> None:
    """Nothing is left of any request."""
    target.pool.check_integrity()
    assert target.pool.num_held_pages == 0
    metrics = target.metrics()
    assert (metrics.num_requests_running, metrics.num_requests_waiting, metrics.kv_cache_usage) == (0, 0, 0.0)


def assert_as_alone(ask: Ask, handle: Handle) -> None:
    """Same tokens; where drafts are not shared out, the same steps and acceptance, too."""
    result = handle.result()
    tokens, steps, accepted = alone(ask)
    assert result.token_ids == tokens, ask
    sampled = ask.options["do_sample"] and ask.options.get("rule") != "coupled"
    if sampled:
        assert (result.num_steps, result.num_accepted_tokens) == (steps, accepted), ask


def random_life(served: Engine, crowd: list[Ask], seed: int, cancel: float) -> list[tuple[Ask, Handle, bool]]:
    """Submit in random order at random times between steps; now and then somebody cancels."""
    rng = random.Random(seed)
    coming = rng.sample(crowd, len(crowd))
    known: list[tuple[Ask, Handle, bool]] = []
    cancelled: set[int] = set()
    while coming or not all(handle.done for _, handle, _ in known):
        for _ in range(min(len(coming), rng.choice([0, 0, 1, 3]))):
            ask = coming.pop()
            known.append((ask, submit(served, ask, priority=rng.choice([0, 0, 1])), False))
        if rng.random() < cancel and known:
            _, handle, _ = rng.choice(known)
            if not handle.done:
                handle.cancel()
                cancelled.add(handle.id)
        served.step()
    return [(ask, handle, handle.id in cancelled) for ask, handle, _ in known]


def check_life(served: Engine, life: list[tuple[Ask, Handle, bool]]) -> None:
    for ask, handle, was_cancelled in life:
        if was_cancelled:
            got = handle.result().token_ids
            assert got == alone(ask)[0][: len(got)], ask
            assert handle.result().finish_reason in ("cancelled", "length", "stop")
        else:
            assert_as_alone(ask, handle)
    assert_clean(served)
