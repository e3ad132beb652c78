"""The target drafts for itself, by a cheaper copy of its own weights."""

from specdec.drafters.self_draft.drafter import SelfDrafter

__all__ = ["SelfDrafter"]
