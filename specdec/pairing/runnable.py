"""Which pairs this library runs itself. Imports no torch."""

from __future__ import annotations

from specdec.pairing.registry import pair_names, read_pair
from specdec.pairing.schema import RUNNABLE, Pair


def refusal(pair: Pair) -> str | None:
    """Why this library cannot run the pair, and what to do instead; None if it can."""
    if pair.draft.kind not in RUNNABLE:
        others = [name for name in pair_names() if name != pair.name and _same_target(name, pair)]
        instead = f"use {' or '.join(others)}" if others else "use a pair with a draft model"
        return (
            f"pair {pair.name!r}: specdec does not run {pair.draft.kind} heads as drafters yet; {instead}, or an "
            f"engine that runs them: `specdec pairs export {pair.name} --to vllm`"
        )
    if pair.vocabulary != "shared":
        return (
            f"pair {pair.name!r}: mismatched vocabularies: specdec needs one tokenizer for both models; use a draft of "
            f"the target's family, or an engine that translates: `specdec pairs export {pair.name} --to vllm`"
        )
    return None


def _same_target(name: str, pair: Pair) -> bool:
    other = read_pair(name)
    return other.target.model == pair.target.model is not None and other.draft.kind in RUNNABLE
