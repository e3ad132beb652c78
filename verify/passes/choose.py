"""Which runners a model gets, the fastest first. The only place where that is decided."""

from __future__ import annotations

import os
from collections.abc import Sequence

from transformers import PreTrainedModel

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.attention.choose import VARIABLE as BACKEND
from specdec.verify.passes.base import Runner
from specdec.verify.passes.direct import Direct
from specdec.verify.passes.graphed import Capture, Graphed, cuda_capture
from specdec.verify.passes.inputs import Inputs
from specdec.verify.passes.modules import Modules
from specdec.verify.passes.native import Native
from specdec.verify.passes.strict import Strict

GRAPHS = "SPECDEC_GRAPHS"
"""Environment variable: "1" turns CUDA graphs on. They are off until they have been measured on a GPU."""


def runners_for(model: PreTrainedModel) -> Sequence[Runner]:
    """Native, direct, then the modules, unless the environment asks for what is faster where it was measured.

    An attention backend (see `attention/choose.py`; "auto", the fastest of all, on GPUs only) makes the modules attend
    by a plan. Nothing that has not been measured on a GPU is on there by default.

    Raises:
        UnsupportedArgumentError: the environment asks for something else than "0" or "1" graphs.
    """
    asked = os.environ.get(GRAPHS, "0")
    if asked not in ("0", "1"):
        raise UnsupportedArgumentError(f"expected {GRAPHS} to be 0 or 1, got {asked!r}")
    inputs, cuda = Inputs(model), next(model.parameters()).is_cuda
    if cuda and asked == "1" and not hasattr(model, "_hf_hook") and len({w.device for w in model.parameters()}) == 1:
        modules = Modules(model, inputs, by_plan=True)
        return Graphed(model, inputs, modules), modules
    backend = os.environ.get(BACKEND)
    if backend and (cuda or backend != "auto"):
        return (Modules(model, inputs, by_plan=True),)
    direct = Direct(model, inputs)
    return Native(inputs, direct), direct, Modules(model, inputs)


def every_way(model: PreTrainedModel, capture: Capture | None = cuda_capture) -> dict[str, Sequence[Runner]]:
    """Each way to run a model by itself, by name, for whoever compares them.

    Args:
        capture: see `Graphed`.
    """
    inputs = Inputs(model)
    direct, planned = Direct(model, inputs), Modules(model, inputs, by_plan=True)
    return {
        "native": (Native(inputs, direct, any_text=True),),
        "direct": (direct,),
        "modules": (Modules(model, inputs),),
        "planned": (planned,),
        "graphed": (Graphed(model, inputs, planned, capture, min_uses=1), planned),
    }


def runs_natively(model: PreTrainedModel) -> bool:
    """Whether `model`, as it is now, has a native pass."""
    inputs = Inputs(model)
    return Native(inputs, Direct(model, inputs)).serves


def strict_runners_for(model: PreTrainedModel, width: int) -> Sequence[Runner]:
    """The one runner whose bits do not depend on the draft, without another to fall back on: native where the model has
    such a pass, which needs no padding; else `Strict`, row by row, `width` tokens at a time."""
    inputs = Inputs(model)
    native = Native(inputs, Direct(model, inputs), any_text=True, most_nodes=width)
    return (native if native.serves else Strict(model, inputs, width),)
