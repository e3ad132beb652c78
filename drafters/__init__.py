"""Everything that proposes draft trees."""

if __name__ != "specdec.drafters":
    raise ImportError(f"this package is imported as `specdec.drafters`, not as `{__name__}`: import specdec.drafters")

from specdec.drafters.base import Budget, Drafter, Session
from specdec.drafters.best_first import BestFirst
from specdec.drafters.dyspec import DySpec
from specdec.drafters.guard import DrafterFaultWarning, DrafterNoteWarning, FallbackGuard
from specdec.drafters.lookup.store import SuffixStore
from specdec.drafters.lookup.suffix import SuffixDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.self_draft import SelfDrafter
from specdec.drafters.sequoia import best_tree, sequoia_tree
from specdec.drafters.shapes import TreeShape

__all__ = [
    "BestFirst",
    "Budget",
    "Drafter",
    "DrafterFaultWarning",
    "DrafterNoteWarning",
    "DySpec",
    "FallbackGuard",
    "ModelDrafter",
    "NgramDrafter",
    "SelfDrafter",
    "Session",
    "SuffixDrafter",
    "SuffixStore",
    "TreeShape",
    "best_tree",
    "sequoia_tree",
]
