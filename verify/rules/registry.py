"""Rules by name, and the automatic choice. The one place where a rule's name is bound to its class."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.draft_kind import DraftKind
from specdec.verify.rules.base import AcceptanceRule
from specdec.verify.rules.block import Block
from specdec.verify.rules.budget_flow import BudgetFlow
from specdec.verify.rules.coupled import Coupled
from specdec.verify.rules.greedy import Greedy
from specdec.verify.rules.naive import Naive
from specdec.verify.rules.recursive_rejection import RecursiveRejection
from specdec.verify.rules.rejection import Rejection
from specdec.verify.rules.traversal import Traversal
from specdec.verify.rules.typical import Typical

RULES: dict[str, type[AcceptanceRule]] = {
    rule.name: rule
    for rule in (Greedy, Rejection, Block, Naive, RecursiveRejection, Traversal, BudgetFlow, Coupled, Typical)
}


def make_rule(name: str) -> AcceptanceRule:
    """The rule called `name`.

    Raises:
        UnsupportedArgumentError: unknown name.
    """
    if name not in RULES:
        raise UnsupportedArgumentError(f"rule: expected one of {['auto', *RULES]}, got {name!r}")
    return RULES[name]()


def auto_rule(kind: DraftKind, top_down: bool = False) -> AcceptanceRule:
    """The best lossless rule for drafts of a kind: naive without q, block for chains, budget_flow for trees that mix
    both, traversal where siblings are sampled; with `top_down` rejection for chains and recursive_rejection for trees.

    Ask with the drafter's own kind, not with that of the trees a batch happens to hold: a row's rule, and so its text,
    must not depend on the rows around it.
    """
    if kind.nodes == "deterministic":
        return make_rule("naive")
    if top_down:
        return make_rule("rejection" if kind.shape == "chain" else "recursive_rejection")
    if kind.shape == "chain":
        return make_rule("block")
    return make_rule("budget_flow" if kind.nodes == "mixed" else "traversal")


def choose_rule(name: str, do_sample: bool, kind: DraftKind | None, top_down: bool = False) -> AcceptanceRule | None:
    """The rule that decides a whole call; None when "auto" must look at each tree, because the drafter does not say
    what it proposes (`kind` None). `top_down`: see `auto_rule`.

    At temperature 0 every rule is greedy matching: `greedy`, which reads scores where the others need probabilities.
    """
    if not do_sample:
        return make_rule("greedy")
    if name != "auto":
        return make_rule(name)
    return None if kind is None else auto_rule(kind, top_down)


def check_choice(name: str, lossy: bool, drafter: str | None = None, kind: DraftKind | None = None) -> None:
    """Refuse what can be known to fail before any model runs.

    Args:
        name: the rule's, or "auto". lossy: whether the user agreed to a changed law.
        drafter: its name, None without one; kind: of its drafts, None when it does not say.

    Raises:
        UnsupportedArgumentError: an unknown rule, a lossy one that was not agreed to, agreement where nothing is
            lossy, or a rule that does not take such drafts.
    """
    if name != "auto" and not make_rule(name).lossless:
        if not lossy:
            raise UnsupportedArgumentError(
                f"rule={name!r} is lossy: it {make_rule(name).changes}. Pass lossy=True if that is what you want, or "
                "leave rule at 'auto'"
            )
    elif lossy:
        raise UnsupportedArgumentError(
            f"lossy=True: rule={name!r} keeps the target's law exactly, nothing is lossy. Leave lossy out"
        )
    why = None if name == "auto" or kind is None else make_rule(name).refusal(kind)
    if why is not None:
        raise UnsupportedArgumentError(f"{why} (the drafter {drafter!r} proposes {kind})")


def check_order(name: str, do_sample: bool, ordered: Sequence[str]) -> None:
    """Refuse a rule that would have to ask processors about whole drafts which only plain order may ask.

    Args:
        ordered: names of the processors and criteria that are called once per emitted token.

    Raises:
        UnsupportedArgumentError
    """
    if not ordered or not do_sample or name == "auto" or make_rule(name).top_down:
        return
    able = [rule.name for rule in RULES.values() if rule.top_down and rule is not Greedy]
    raise UnsupportedArgumentError(
        f"rule={name!r} needs the laws of a whole draft at once, but {', '.join(sorted(set(ordered)))} may keep state "
        f"and is called once per emitted token, as plain generate calls it: expected rule 'auto' or one of {able}. If "
        "it is a pure function of a row's text, declare that with specdec.pure(...)"
    )
