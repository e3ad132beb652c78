"""What the planner may choose from: the options that a user's `draft` stands for."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.drafters import Drafter, ModelDrafter, NgramDrafter
from specdec.kv import UnsupportedArgumentError
from specdec.planner.options import Option, Options
from specdec.verify.rules import make_rule

MODEL_DEPTH = 12
"""Longest chain planned with a draft model."""
NGRAM_DEPTH = 10
"""Longest continuation planned with prompt lookup."""


def plan_options(drafters: Sequence[Drafter], rule: str, most_nodes: int | None) -> Options:
    """The options of `drafters`, those left out that the rule or the width of a strict pass forbids.

    Args:
        drafters: their own depth is the most that is planned. most_nodes: drafted tokens a pass has room for.

    Raises:
        UnsupportedArgumentError: nothing is left, with the reason.
    """
    options: list[Option] = []
    refused: list[str] = []
    for drafter in drafters:
        option = _option(drafter, [other.name for other in options])
        why = None if rule == "auto" or drafter.kind is None else make_rule(rule).refusal(drafter.kind)
        if why is None and most_nodes is not None and drafter.max_nodes > most_nodes:
            why = f"{option.name} drafts up to {drafter.max_nodes} tokens, a strict pass has room for {most_nodes}"
        if why is None:
            options.append(option)
        else:
            refused.append(why)
    if not options:
        raise UnsupportedArgumentError("draft: expected at least one usable drafter; " + "; ".join(refused))
    return Options(options)


def _option(drafter: Drafter, taken: Sequence[str]) -> Option:
    chain = drafter.kind is not None and drafter.kind.shape == "chain"
    name = drafter.name
    while name in taken:
        name += "'"
    empty = isinstance(drafter, NgramDrafter)
    return Option(name, name, drafter, (1,) * drafter.max_depth, chain, empty, drafter.num_positions)


def planned_chain(drafter: Drafter, most_nodes: int | None) -> Drafter:
    """The chains the planner may cut short where a user names a drafter and no length."""
    if isinstance(drafter, ModelDrafter):
        return ModelDrafter(drafter.model, k=min(MODEL_DEPTH, most_nodes or MODEL_DEPTH))
    if isinstance(drafter, NgramDrafter):
        return NgramDrafter(k=min(NGRAM_DEPTH, most_nodes or NGRAM_DEPTH))
    return drafter
