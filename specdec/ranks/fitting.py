"""What ranks that hold one target together cannot do, and what must be the same in their calls."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from specdec.arguments import SELF
from specdec.drafters import Drafter, ModelDrafter
from specdec.drafters.self_draft.forms import PREFIX
from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.versions import CACHE_KEYWORD
from specdec.ranks.channel import ranks_of
from specdec.request import Request
from specdec.verify.purity import in_plain_order


def refuse_sharded(target: PreTrainedModel, draft: Any, strict: bool) -> None:
    """Refuse what works on a target in one process only, where `target` is held by several.

    Args:
        draft: as Speculator is given it. strict: whether strict mode is asked for.

    Raises:
        UnsupportedArgumentError: strict mode, or a drafter that itself runs on all ranks. UnsupportedModelError: the
            target is sharded in another way than by tensor parallelism.
    """
    sharded = ranks_of(target) is not None
    if sharded and strict:
        raise UnsupportedArgumentError(
            "exactness='strict': the target is sharded over several ranks, whose sums may be taken in another order in "
            "a longer pass: use exactness='distribution'"
        )
    for one in draft if isinstance(draft, (list, tuple)) else [draft]:
        name = one if isinstance(one, str) else getattr(one, "name", type(one).__name__)
        itself = isinstance(one, Drafter) and one.shares_target_kv
        itself = itself or (isinstance(one, str) and (one == SELF or one.startswith(PREFIX)))
        model: Any = one.model if isinstance(one, ModelDrafter) else one
        if (sharded and itself) or (isinstance(model, PreTrainedModel) and ranks_of(model) is not None):
            raise UnsupportedArgumentError(
                f"draft: {name} runs on all ranks that hold the model, but the first rank alone drafts: give a draft "
                "model that is loaded whole, or 'ngram'"
            )


def refuse_several(target: PreTrainedModel, who: str) -> None:
    """Raises:
    UnsupportedArgumentError: the target is held by several ranks, and `who` runs in one process."""
    if ranks_of(target) is not None:
        raise UnsupportedArgumentError(
            f"{who}: expected a target that this process holds whole, got {type(target).__name__} sharded over several "
            "ranks; use Speculator.generate, which every rank calls"
        )


def described(request: Request, rule: str) -> dict[str, Any]:
    """What decides which passes a call makes, and what is asked on every rank, by the user's own words."""
    config, stops = request.config, [criterion for criterion in request.criteria]
    return {
        "inputs": request.input_ids.tolist(),
        "attention_mask": None if request.real is None else request.real.tolist(),
        CACHE_KEYWORD: [request.cached, request.cache_is_callers],
        "num_return_sequences": request.repeats,
        "max_new_tokens and max_length": request.criteria.max_length,
        "do_sample": bool(config.do_sample),
        "prefill_chunk_size": getattr(config, "prefill_chunk_size", None),
        "output_scores, output_logits and output_hidden_states": [
            request.wants_dict, request.keeps_scores, request.keeps_logits, request.keeps_hidden_states
        ],
        "logits_processor": [type(one).__name__ for one in request.processors],
        "stopping_criteria and eos_token_id": [
            [type(one).__name__, str(getattr(one, "eos_token_id", ""))] for one in stops
        ],
        "what is called once per token (specdec.pure)": in_plain_order(
            request.processors, stops, request.input_ids.shape[0]
        ),
        "rule": rule,
    }  # fmt: skip
