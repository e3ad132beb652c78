"""What no call may change: the target, torch's global state, the user's arguments, the objects that served it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from fuzz.call import Call
from fuzz.log import Log
from fuzz.refusals import documented
from fuzz.subjects import Subjects

_KEPT_BY_TRANSFORMERS = {"_previous_max_cache_length"}  # its own preparation of a static cache sets it


def state_of(model: Any) -> dict[str, Any]:
    """Everything of a model that a call could leave changed, weights excepted."""
    return {
        "generation_config": (
            id(model.generation_config),
            repr(sorted(vars(model.generation_config).items(), key=str)),
        ),
        "attention": model.config._attn_implementation,
        "training": [module.training for module in model.modules()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
            for module in model.modules()
        ],
        "attributes": [
            sorted(name for name in vars(module) if name in ("generate", "forward", "__call__"))
            for module in model.modules()
        ],
        "classes": [type(module) for module in model.modules()],
        "names": set(vars(model)) - _KEPT_BY_TRANSFORMERS,
    }


def state_of_torch(greedy: bool) -> dict[str, Any]:
    return {
        "threads of torch": torch.get_num_threads(),
        "threads": threading.active_count(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default type": torch.get_default_dtype(),
        "functions": (torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention),
        "generator": torch.random.get_rng_state().tolist() if greedy else None,
    }


def state_of_arguments(positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A copy to compare with: a user's tensors, lists and configurations are theirs."""

    def kept(value: Any) -> Any:
        if isinstance(value, Tensor):
            return str(value.tolist())  # as text: NaN is not equal to itself
        if isinstance(value, GenerationConfig):
            return repr(value)
        if isinstance(value, (list, tuple)):
            return [kept(part) for part in value]
        return copy.copy(value) if isinstance(value, (dict, set)) else id(value)

    return {name: kept(value) for name, value in [*enumerate(positional), *named.items()]}


def assert_same(before: dict[str, Any], after: dict[str, Any], whose: str) -> None:
    for name, value in before.items():
        told = (
            str(value ^ after[name])
            if isinstance(value, set)
            else f"was {str(value)[:200]}, is {str(after[name])[:200]}"
        )
        assert after[name] == value, f"{whose}: {name} {told}"


@contextmanager
def unharmed(call: Call, positional: tuple[Any, ...], named: dict[str, Any]) -> Iterator[None]:
    """Nothing is left changed, whether the call returns or raises.

    Raises:
        AssertionError: something was.
    """
    greedy = not call.samples and not named.get("do_sample")
    before = state_of(call.model), state_of_torch(greedy), state_of_arguments(positional, named)
    try:
        yield
    finally:
        assert_same(before[0], state_of(call.model), "the target")
        assert_same(before[1], state_of_torch(greedy), "torch")
        assert_same(before[2], state_of_arguments(positional, named), "the user's arguments")


def still_works(call: Call, subjects: Subjects) -> None:
    """The object that served this call gives the known text of another one.

    Raises:
        AssertionError: it does not.
    """
    engine = call.form == "engine"
    simple = Call(
        name="reference", family=call.family, form=call.form, draft=call.draft, options=call.options,
        lengths=(5,) if engine else (5, 3), prompt_seed=11, period=2,
        arguments={"max_new_tokens": 9, "repetition_penalty": 1.2},
    )  # fmt: skip
    positional, named = simple.built(Log())
    wanted = call.model.generate(*positional, **named)
    try:
        found = subjects.run(simple, positional, named)
    except Exception as error:
        if documented(simple, error):  # the same object cannot do this at all
            return
        raise AssertionError(f"afterwards the same object fails at a simple call: {error!r}") from error
    wanted, found = (wanted[0, 5:].tolist(), found) if engine else (wanted.tolist(), found.tolist())
    assert found == wanted, f"afterwards the same object gives {found} where plain gives {wanted}"
