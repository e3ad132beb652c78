"""What happens to the arguments of `generate` before the first forward pass, `transformers`' own part included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from specdec.arguments import Target, make_target
from specdec.fitting import refuse_mixing, refuse_unfit
from specdec.inputs import check_call
from specdec.kv.wrappers import carry_settings
from specdec.request import Request, build_request
from specdec.stopping import FROM_CONFIG, own_stop_strings
from specdec.verify.selfcheck import check_text

Output = Tensor | GenerateDecoderOnlyOutput


class Preparation:
    """Prepares calls of one target as plain `generate` prepares them.

    One call at a time: `transformers` changes the target's generation config meanwhile.

    Args:
        target, tokenizer: see Speculator.

    Raises:
        UnsupportedModelError, UnsupportedArgumentError: as Speculator.
    """

    def __init__(self, target: Target, tokenizer: Any = None):
        self.target, self.tokenizer = make_target(target, tokenizer)
        refuse_mixing(self.target)
        check_text(self.target, "target")
        self._given = target

    def check(self, inputs: Any, config: Any, kwargs: Mapping[str, Any], ways: Mapping[str, Any]) -> None:
        """Refuse what no call can mean (see `check_call`), and let the target see its owner's latest settings."""
        check_call(inputs, config, kwargs, ways)
        carry_settings(self._given, self.target)

    def run(
        self,
        decode: Callable[..., Output],
        inputs: Tensor | None,
        config: GenerationConfig | None,
        criteria: StoppingCriteriaList | None,
        tokenizer: Any,
        kwargs: dict[str, Any],
    ) -> Output:
        """Plain `generate` with `decode` in the place of its decoding loop.

        Args:
            decode: a custom generation method of `transformers`.
            tokenizer: for stop strings. kwargs: further arguments of `generate`.
        """
        strings = kwargs.pop("stop_strings", FROM_CONFIG)
        with own_stop_strings(self.target, config, strings) as (own_config, found):
            own_criteria = StoppingCriteriaList(criteria or [])
            if found is not None:
                own_criteria.insert(0, _stop_string_criteria(found, tokenizer))
            # The class's own method: an instance may have been patched to call a Speculator.
            plain: Any = type(self.target)
            out: Output = plain.generate(
                self.target,
                inputs,
                generation_config=own_config,
                stopping_criteria=own_criteria,
                custom_generate=decode,
                **kwargs,
            )
            return out

    def request(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        **options: Any,
    ) -> Request:
        """What `decode` is given, checked: by `build_request`, which takes the options, and for this target."""
        request = build_request(input_ids, processors, criteria, config, model_kwargs, target=self.target, **options)
        refuse_unfit(self.target, request)
        return request


def _stop_string_criteria(strings: Any, tokenizer: Any) -> StopStringCriteria:
    if tokenizer is None:
        raise ValueError(
            "stop_strings needs the tokenizer: pass tokenizer= to generate or to Speculator(target, draft, "
            "tokenizer=tokenizer)"
        )
    return StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
