"""Ways to do what an experiment compares: what each is, which are asked for, and the ways to generate there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from specdec.kv import UnsupportedArgumentError
from specdec.report import SpecReport
from specdec.speculator import Speculator
from specdec.trace import StepTrace


@dataclass(frozen=True)
class Way:
    """One way to do it, with one setting.

    name: unique and stable. ready: from the models and the run's options to the call that is timed; everything that is
    done once goes there, outside the clock. family: the best of its settings counts (default: the name).
    refusal: from the options to why it cannot do this run, or None.
    calls_modules: whether the models' passes go through their modules, where hooks see them. optional: whether a run
    that does not ask for it goes on without a word where it cannot run. needs_model: whether it is for pairs with a
    draft model; other pairs go on without a word, too. facts: what results say of it.
    """

    name: str
    ready: Callable[..., Any]
    family: str = ""
    refusal: Callable[[Any], str | None] = lambda options: None
    calls_modules: bool = True
    optional: bool = False
    needs_model: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", self.family or self.name)


def select(ways: Sequence[Way], wanted: Sequence[str], always: str = "") -> list[Way]:
    """The ways whose name or family is wanted (all, if none is), and the one that is `always` there.

    Raises:
        UnsupportedArgumentError: a name that is neither.
    """
    known = {way.name for way in ways} | {way.family for way in ways}
    if unknown := sorted(set(wanted) - known):
        raise UnsupportedArgumentError(f"peers: unknown {', '.join(unknown)}; expected some of {', '.join(known)}")
    return [way for way in ways if not wanted or way.name == always or {way.name, way.family} & set(wanted)]


class Passes(NamedTuple):
    """Forward passes of a target in one call, the prefill included, and the seconds inside them."""

    num_passes: int
    seconds: float


class Output(NamedTuple):
    """int64 `[batch, prompt + new]` ids, the report of ways that have one, and the passes of a target that is not the
    pair's own module (whose passes are counted where they happen)."""

    ids: Tensor
    report: SpecReport | None = None
    passes: Passes | None = None


class Generate(Protocol):
    """A way to generate, ready to be timed: prompts (int64 `[batch, prompt]`), a seed, and who hears of every step (if
    the way has steps)."""

    def __call__(self, ids: Tensor, seed: int, on_step: Callable[[StepTrace], None] | None = None) -> Output: ...


def sampling(temperature: float, top_k: int = 0, top_p: float = 1.0) -> dict[str, Any]:
    """The arguments of `generate` that decide the law; temperature 0 is greedy. (Without top_k=0 transformers would cut
    every law to its default of 50 tokens.)"""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}


def transformers_own(target: Any, new_tokens: int, temperature: float = 0.0, **arguments: Any) -> Generate:
    """`target.generate(...)`, with `arguments` of its own such as an assistant."""

    def generate(ids: Tensor, seed: int, on_step: object = None) -> Output:
        torch.manual_seed(seed)
        mask = torch.ones_like(ids)
        settings = {**sampling(temperature), **arguments}
        return Output(target.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **settings))

    return generate


def assisted(target: Any, draft: Any, k: int, new_tokens: int, temperature: float = 0.0) -> Generate:
    """`target.generate(..., assistant_model=draft)` with a constant number of assistant tokens."""
    generate = transformers_own(target, new_tokens, temperature, assistant_model=draft)

    def with_k(ids: Tensor, seed: int, on_step: object = None) -> Output:
        # transformers reads these three from the assistant's own generation config and ignores them as arguments of the
        # target's generate (where 20 tokens and a threshold of 0.4 would stay in force).
        config = draft.generation_config
        config.num_assistant_tokens = k
        config.num_assistant_tokens_schedule = "constant"
        config.assistant_confidence_threshold = 0.0
        return generate(ids, seed)

    return with_k


def speculating(
    spec: Speculator, new_tokens: int, temperature: float = 0.0, seeded: bool = True, **cuts: Any
) -> Generate:
    """`Speculator.generate(...)`.

    Args:
        seeded: by `seed=`, with which every row of a sampled call is planned by itself; else by the global generator.
        cuts: `top_k`, `top_p` of the law.
    """

    def generate(ids: Tensor, seed: int, on_step: Callable[[StepTrace], None] | None = None) -> Output:
        if not seeded:
            torch.manual_seed(seed)
        out = spec.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, seed=seed if seeded else None,
            on_step=on_step, **sampling(temperature, **cuts),
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return Output(out, spec.report)

    return generate
