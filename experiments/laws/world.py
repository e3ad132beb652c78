"""What is sampled: a tiny target and its draft, ragged prompts, two settings, and every (rule, drafter) pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from transformers import LlamaForCausalLM

from specdec.drafters import BestFirst, Drafter, DySpec, ModelDrafter, NgramDrafter
from specdec.kv import UnsupportedArgumentError
from specdec.lab.tiny import PAD, noisy_copy, tiny_llama
from specdec.verify.rules import RULES, make_rule

VOCAB = 4
NEW = 5
"""Tokens of every text: one more than any first step can emit, so that every text has a second step."""
JOINT = 4
"""Tokens whose joint law is judged."""
PROMPTS: tuple[tuple[int, ...], ...] = ((3, 1, 2, 3, 1, 0, 3), (2,), (1, 0, 1, 1))
"""Ragged; two repeat themselves, so that n-grams are found at once."""
SETTINGS: tuple[dict[str, Any], ...] = ({"top_k": 0}, {"top_k": 0, "temperature": 1.4, "top_p": 0.85})
COMMON: dict[str, Any] = {"do_sample": True, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": PAD}


@cache
def target() -> LlamaForCausalLM:
    return tiny_llama(3, vocab=VOCAB)


@cache
def draft(noise: float = 0.3) -> LlamaForCausalLM:
    return noisy_copy(target(), 4, noise)


Kind = type[ModelDrafter]


def chain(kind: Kind = ModelDrafter, temperature: float = 0.7, k: int = 3, noise: float = 0.3) -> Drafter:
    """Its own temperature makes the law it samples from another one than the raw one."""
    return kind(draft(noise), k=k, temperature=temperature)


def grown(tree: Any, children: str, kind: Kind = ModelDrafter) -> Drafter:
    return kind(draft(), tree=tree, children=children)


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "chain": chain,
    "sampled tree": lambda: grown((2, 2), "sampled"),
    "mixed tree": lambda: grown((2, 2), "mixed"),
    "top-k tree": lambda: grown((2, 2), "top"),
    "n-gram": lambda: NgramDrafter(k=3),
    "n-gram branches": lambda: NgramDrafter(k=2, branches=2),
    "DySpec": lambda: grown(DySpec(3, 5, 2), "sampled"),
    "BestFirst": lambda: grown(BestFirst(3, 2, 5), "top"),
}


HOME = {
    "rejection": "chain", "block": "chain", "naive": "top-k tree", "recursive_rejection": "sampled tree",
    "traversal": "sampled tree", "budget_flow": "mixed tree", "coupled": "mixed tree",
}  # fmt: skip
"""The drafts each rule is made for: where time is short, these are judged with the most samples."""


class Pair(NamedTuple):
    rule: str
    drafter: str

    @property
    def races(self) -> bool:
        """Is the text a function of target and seed?"""
        return RULES[self.rule].uses_race

    @property
    def has_step_law(self) -> bool:
        """Does the target's law hold given where a step ended (see `Drafter.looks_ahead`)?"""
        return not (self.races and DRAFTERS[self.drafter]().looks_ahead)

    @property
    def is_home(self) -> bool:
        return HOME.get(self.rule, self.drafter) == self.drafter


def pairs(rules: Sequence[str] = (), drafters: Sequence[str] = ()) -> list[Pair]:
    """Every lossless sampling rule with every drafter it takes; of those named, where some are.

    Raises:
        UnsupportedArgumentError: names that mean nothing here, or no rule that takes any of the drafters.
    """
    sampling = [name for name, rule in RULES.items() if rule.lossless and name != "greedy"]
    for what, given, known in (("rules", rules, sampling), ("drafters", drafters, list(DRAFTERS))):
        if unknown := set(given) - set(known):
            raise UnsupportedArgumentError(f"{what}: expected some of {known}, got {sorted(unknown)}")
    found = [
        Pair(rule, name)
        for rule in sampling
        for name, make in DRAFTERS.items()
        if (not rules or rule in rules) and (not drafters or name in drafters) and _takes(rule, make())
    ]
    if not found:
        raise UnsupportedArgumentError(f"expected a rule that takes one of the drafters, got {rules} and {drafters}")
    return found


def _takes(rule: str, drafter: Drafter) -> bool:
    kind = drafter.kind
    assert kind is not None, "these drafters say what they draft"
    return make_rule(rule).refusal(kind) is None
