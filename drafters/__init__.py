"""Everything that proposes draft trees."""

if __name__ != "specdec.drafters":
    raise ImportError(f"this package is imported as `specdec.drafters`, not as `{__name__}`: import specdec.drafters")

from specdec.drafters.base import Budget, Drafter, Session
from specdec.drafters.guard import DrafterFaultWarning, FallbackGuard
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter

__all__ = [
    "Budget",
    "Drafter",
    "DrafterFaultWarning",
    "FallbackGuard",
    "ModelDrafter",
    "NgramDrafter",
    "Session",
]
