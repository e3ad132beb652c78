"""Make whatever calls `target.generate` (pipelines, trainers, other libraries) speculate, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

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

    Only this one object is changed, and restored on the way out (also after an exception). A pipeline that passes
    `tokenizer=` or `streamer=` keeps working.
    """
    spec = Speculator(target, draft, k=k, tree=tree, rule=rule, lossy=lossy, tokenizer=tokenizer)
    model: Any = target
    had = model.__dict__.get("generate")
    model.generate = spec.generate
    try:
        yield spec
    finally:
        if had is None:
            del model.generate
        else:
            model.generate = had
