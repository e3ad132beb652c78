"""Rules by name, and the automatic choice. The one place where a rule's name is bound to its class."""

from __future__ import annotations

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.rules.base import AcceptanceRule
from specdec.verify.rules.block import Block
from specdec.verify.rules.budget_flow import BudgetFlow
from specdec.verify.rules.greedy import Greedy
from specdec.verify.rules.naive import Naive
from specdec.verify.rules.recursive_rejection import RecursiveRejection
from specdec.verify.rules.rejection import Rejection
from specdec.verify.rules.traversal import Traversal
from specdec.verify.tree import DraftTree

RULES: dict[str, type[AcceptanceRule]] = {
    rule.name: rule for rule in (Greedy, Rejection, Block, Naive, RecursiveRejection, Traversal, BudgetFlow)
}


def make_rule(name: str) -> AcceptanceRule:
    """The rule called `name`.

    Raises:
        UnsupportedArgumentError: unknown name.
    """
    if name not in RULES:
        raise UnsupportedArgumentError(f"rule: expected one of {['auto', *RULES]}, got {name!r}")
    return RULES[name]()


def auto_rule(tree: DraftTree, do_sample: bool) -> AcceptanceRule:
    """The best lossless rule for this kind of tree: greedy at temperature 0, naive without q, else block for chains and
    budget_flow for trees.

    Decided by the drafter's kind of proposal, not by the shapes a batch happens to hold: a row's rule, and so its
    text, must not depend on the rows around it. (On a chain budget_flow *is* block, coin for coin.)
    """
    if not do_sample:
        return Greedy()
    if tree.q is None:
        return Naive()
    return Block() if tree.is_chain else BudgetFlow()
