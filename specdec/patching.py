"""Make whatever calls `target.generate` (pipelines, trainers, other libraries) speculate, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    tree: Sequence[int] | None = None,
    rule: str = "auto",
    tokenizer: Any = None,
) -> Iterator[Speculator]:
    """Inside the block `target.generate` is `Speculator(target, draft, ...).generate`; yields the Speculator.

    Only this one object is changed, and restored on the way out (also after an exception). A pipeline that passes
    `tokenizer=` or `streamer=` keeps working.
    """
    spec = Speculator(target, draft, k=k, tree=tree, rule=rule, tokenizer=tokenizer)
    had = target.__dict__.get("generate")
    target.generate = spec.generate  # type: ignore[method-assign]
    try:
        yield spec
    finally:
        if had is None:
            del target.generate
        else:
            target.generate = had  # type: ignore[method-assign]
