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
    "SpecReport": "specdec.report",
    "StepTrace": "specdec.trace",
    "SpecdecError": "specdec.kv.errors",
    "UnsupportedModelError": "specdec.kv.errors",
    "UnsupportedArgumentError": "specdec.kv.errors",
    "TargetFaultError": "specdec.kv.errors",
    "check": "specdec.lab.check",
    "pure": "specdec.verify.purity",
    "CheckReport": "specdec.lab.findings",
    "Drafter": "specdec.drafters",
    "ModelDrafter": "specdec.drafters",
    "NgramDrafter": "specdec.drafters",
}

__all__ = [
    "CheckReport",
    "Drafter",
    "Engine",
    "ModelDrafter",
    "NgramDrafter",
    "SpecReport",
    "SpecdecError",
    "Speculator",
    "StepTrace",
    "TargetFaultError",
    "UnsupportedArgumentError",
    "UnsupportedModelError",
    "__version__",
    "check",
    "generate",
    "patch",
    "pure",
]

if TYPE_CHECKING:
    from specdec.drafters import Drafter, ModelDrafter, NgramDrafter
    from specdec.engine import Engine
    from specdec.kv.errors import SpecdecError, TargetFaultError, UnsupportedArgumentError, UnsupportedModelError
    from specdec.lab.check import check
    from specdec.lab.findings import CheckReport
    from specdec.patching import patch
    from specdec.report import SpecReport
    from specdec.speculator import Speculator, generate
    from specdec.trace import StepTrace
    from specdec.verify.purity import pure


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
