"""specdec: faster generation for Hugging Face causal LMs with exactly the same output law.

Names are loaded on first use, so that `import specdec` and `specdec --help` do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from specdec.version import __version__

_EXPORTS = {
    "Speculator": "specdec.speculator",
    "generate": "specdec.speculator",
    "Engine": "specdec.engine",
    "patch": "specdec.patching",
    "load_pair": "specdec.pairing.loading",
    "SpecReport": "specdec.report",
    "StepTrace": "specdec.trace",
    "Monitor": "specdec.monitor",
    "check": "specdec.lab.check",
    "CheckReport": "specdec.lab.findings",
    "pure": "specdec.verify.purity",
    "Drafter": "specdec.drafters",
    "ModelDrafter": "specdec.drafters",
    "NgramDrafter": "specdec.drafters",
    "BestFirst": "specdec.drafters",
    "DySpec": "specdec.drafters",
    "Budget": "specdec.drafters",
    "SelfDrafter": "specdec.drafters",
    "Session": "specdec.drafters",
    "SuffixDrafter": "specdec.drafters",
    "SuffixStore": "specdec.drafters",
    "DraftKind": "specdec.verify.draft_kind",
    "DraftTree": "specdec.verify.tree",
    "Topology": "specdec.verify.topology",
    "SpecdecError": "specdec.kv.errors",
    "UnsupportedModelError": "specdec.kv.errors",
    "UnsupportedArgumentError": "specdec.kv.errors",
    "TargetFaultError": "specdec.kv.errors",
    "LeadingRankError": "specdec.kv.errors",
    "EngineClosedError": "specdec.engine",
    "EngineFaultError": "specdec.engine",
    "QueueFullError": "specdec.engine",
    "RequestFaultError": "specdec.engine",
}

__all__ = [
    "BestFirst",
    "Budget",
    "CheckReport",
    "DraftKind",
    "DraftTree",
    "Drafter",
    "DySpec",
    "Engine",
    "EngineClosedError",
    "EngineFaultError",
    "LeadingRankError",
    "ModelDrafter",
    "Monitor",
    "NgramDrafter",
    "QueueFullError",
    "RequestFaultError",
    "SelfDrafter",
    "Session",
    "SpecReport",
    "SpecdecError",
    "Speculator",
    "StepTrace",
    "SuffixDrafter",
    "SuffixStore",
    "TargetFaultError",
    "Topology",
    "UnsupportedArgumentError",
    "UnsupportedModelError",
    "__version__",
    "check",
    "generate",
    "load_pair",
    "patch",
    "pure",
    "serve",
]

if TYPE_CHECKING:
    from specdec.drafters import (
        BestFirst,
        Budget,
        Drafter,
        DySpec,
        ModelDrafter,
        NgramDrafter,
        SelfDrafter,
        Session,
        SuffixDrafter,
        SuffixStore,
    )
    from specdec.engine import Engine, EngineClosedError, EngineFaultError, QueueFullError, RequestFaultError
    from specdec.kv.errors import (
        LeadingRankError,
        SpecdecError,
        TargetFaultError,
        UnsupportedArgumentError,
        UnsupportedModelError,
    )
    from specdec.lab.check import check
    from specdec.lab.findings import CheckReport
    from specdec.monitor import Monitor
    from specdec.pairing.loading import load_pair
    from specdec.patching import patch
    from specdec.report import SpecReport
    from specdec.speculator import Speculator, generate
    from specdec.trace import StepTrace
    from specdec.verify.draft_kind import DraftKind
    from specdec.verify.purity import pure
    from specdec.verify.topology import Topology
    from specdec.verify.tree import DraftTree


def __getattr__(name: str) -> Any:
    if name == "serve":  # a package by itself: what it needs is an extra
        return import_module("specdec.serve")
    if name not in _EXPORTS:
        raise AttributeError("; ".join([f"module 'specdec' has no attribute {name!r}", *_namesake()]))
    try:
        return getattr(import_module(_EXPORTS[name]), name)
    except ImportError as error:
        for line in _namesake():
            error.add_note(line)
        raise


def _namesake() -> list[str]:
    from specdec.namesake import namesake

    return namesake()


def __dir__() -> list[str]:
    return __all__
