"""The target drafts for itself: a lean copy of it reads the target's own K/V and writes behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.base import CACHE_NAME, Budget, Session
from specdec.drafters.model import ModelDrafter
from specdec.drafters.self_draft.forms import PREFIX, Form
from specdec.drafters.self_draft.lean import LeanCopy
from specdec.kv.support import num_cache_layers


class SelfDrafter(ModelDrafter):
    """A `ModelDrafter` whose model is a cheaper copy of the target, without K/V of its own.

    The copy shares embeddings and norms with the target, and reads the target's K/V of the text: no prompt is read
    twice. Behind the text it writes K/V of its own drafts, which the target's pass over them overwrites.

    Args:
        target: the model that is drafted for.
        form: "int8" or "int4" (linear layers in so many bits), "exit8" (the first 8 layers), "skip8-20" (without those
            layers), "hot30" (30 % of the neurons of every MLP), "wanda50" (half of every weight pruned).
        k, tree, temperature, children: see ModelDrafter.
        calibration: texts, each int64 `[tokens]`, on which "int4", "hot" and "wanda" choose; by default what the target
            itself writes.

    Raises:
        UnsupportedArgumentError: an unknown form, or one that does not fit the target. UnsupportedModelError: a target
            of which no copy can be made.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        form: str = "int8",
        k: int | None = None,
        tree: Any = None,
        temperature: float = 1.0,
        children: str | None = None,
        calibration: Sequence[Tensor] | None = None,
    ):
        self.form = Form.parse(form)
        self.copy = LeanCopy(target, self.form, calibration)
        super().__init__(self.copy.model, k, tree, temperature, children)
        self.name = PREFIX + self.form.name
        self._layers = num_cache_layers(self.copy.target)

    @property
    def num_cache_layers(self) -> int:
        return self._layers  # a layer of the copy reads the K/V of the target's layer of that number

    @property
    def shares_target_kv(self) -> bool:
        return True

    @contextmanager
    def running(self) -> Iterator[None]:
        self.copy.refresh()
        with super().running():
            yield

    def _readable(self, budget: Budget, session: Session) -> tuple[list[bool], Budget]:
        """Rows whose text the target itself has yet to read get no draft."""
        idle, budget = super()._readable(budget, session)
        cache = session.cache
        lengths = cache.lengths[: cache.num_rows]
        behind = [have < length for have, length in zip(cache.filled(CACHE_NAME), lengths, strict=True)]
        if any(behind):
            idle = [out or late for out, late in zip(idle, behind, strict=True)]
            depths = tuple(0 if late else depth for late, depth in zip(behind, budget.depths, strict=True))
            budget = replace(budget, depths=depths)
        return idle, budget
