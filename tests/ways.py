"""Forwards that run a model in one given way, for tests that compare them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from specdec.verify.passes.choose import every_way
from specdec.verify.passes.forward import Forward
from specdec.verify.passes.graphed import Graphed
from specdec.verify.passes.inputs import Inputs
from specdec.verify.passes.modules import Modules
from specdec.verify.passes.native import NativePass, native_pass
from specdec.verify.passes.parameters import Parameters


def graphed_forward(model: Any, name: str, capture: Any, min_uses: int) -> Forward:
    """Captured by `capture` (None: static buffers, nothing recorded), else through the modules."""
    inputs = Inputs(model)
    modules = Modules(model, inputs, by_plan=True)
    return Forward(model, name, [Graphed(model, inputs, modules, capture, min_uses), modules])


class Prepared(Forward):
    """Prepared from the beginning, until it is dropped."""

    def __init__(self, model: Any, runners: Any):
        super().__init__(model, "target", runners)
        self._stack = ExitStack()
        self._stack.enter_context(self.prepared())


def forward_by(model: Any, way: str) -> Forward:
    """`way`: native, direct or modules (fitted); without another to fall back on."""
    return Prepared(model, every_way(model)[way])


def native_of(model: Any) -> NativePass | None:
    own = Parameters.of(model)
    assert own is not None
    return native_pass(own, Inputs(model))
