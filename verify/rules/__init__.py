"""Acceptance rules: pure functions from (tree, target law, noise) to a verdict."""

from specdec.verify.rules.base import AcceptanceRule, UnsupportedTreeError
from specdec.verify.rules.registry import RULES, auto_rule, check_choice, check_order, choose_rule, make_rule

__all__ = [
    "RULES",
    "AcceptanceRule",
    "UnsupportedTreeError",
    "auto_rule",
    "check_choice",
    "check_order",
    "choose_rule",
    "make_rule",
]
