"""Make whatever calls `target.generate` (pipelines, trainers, other libraries) speculate, for a while."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from specdec.kv import UnsupportedArgumentError
from specdec.speculator import Draft, Speculator


@contextmanager
def patch(
    target: PreTrainedModel,
    draft: Draft = None,
    *,
    k: int | None = None,
    tree: Any = None,
    rule: str = "auto",
    lossy: bool = False,
    tokenizer: Any = None,
) -> Iterator[Speculator]:
    """Inside the block `target.generate` is `Speculator(target, draft, ...).generate`; yields the Speculator.

    Only this one object is changed, and restored on the way out (also after an exception): a `PeftModel`, not the model
    inside; what `torch.compile(model)` returned shares its attributes with `model`. A pipeline that passes `tokenizer=`
    or `streamer=` keeps working, and a call with `custom_generate=` runs that, as it would outside.

    Raises:
        UnsupportedArgumentError: a path or hub id as target. UnsupportedModelError: as Speculator.
    """
    if isinstance(target, (str, Path)):
        raise UnsupportedArgumentError(
            f"target: expected a model object whose generate can be replaced, got {str(target)!r}. Load it first, or "
            "use Speculator(target, draft)."
        )
    spec = Speculator(target, draft, k=k, tree=tree, rule=rule, lossy=lossy, tokenizer=tokenizer)
    model: Any = target
    while hasattr(model, "_orig_mod"):  # a compiled model keeps no attributes of its own
        model = model._orig_mod
    had = vars(model).get("generate")
    model.generate = _either(spec, model.generate)
    try:
        yield spec
    finally:
        if had is None:
            del model.generate
        else:
            model.generate = had


def _either(spec: Speculator, plain: Any) -> Any:
    """`spec.generate`, but for calls that bring a decoding loop of their own."""
    signature = inspect.signature(spec.generate)

    @functools.wraps(spec.generate)
    def generate(*args: Any, **kwargs: Any) -> Any:
        own = signature.bind_partial(*args, **kwargs).arguments.get("custom_generate")
        return spec.generate(*args, **kwargs) if own is None else plain(*args, **kwargs)

    return generate
