"""The public object: a target, a drafter, and a `generate` that means what plain `generate` means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput

from specdec.arguments import Draft, Target, make_draft, make_page_size, make_strict
from specdec.call_lock import CallLock
from specdec.described import drafter_words, model_words
from specdec.drafters import FallbackGuard
from specdec.kv import UnsupportedArgumentError
from specdec.loop import DecodeLoop
from specdec.monitor import AcceptanceMonitor, Monitor
from specdec.pairing.loading import open_pair
from specdec.pairing.schema import Pair
from specdec.planner.factory import PlannerFactory
from specdec.planner.options import Options
from specdec.preparation import Preparation
from specdec.ranks.channel import ranks_of
from specdec.ranks.fitting import described, refuse_sharded
from specdec.ranks.loops import LeadingLoop, following
from specdec.report import SpecReport
from specdec.trace import StepTrace
from specdec.verify.purity import in_plain_order
from specdec.verify.rules import check_choice, check_order


class Speculator:
    """Speculative decoding of `target` with `draft`; the output law is the target's own.

    Args:
        target: any decoder-only `transformers` causal LM with a rollback-capable K/V cache, also as a `PeftModel` or
            as what `torch.compile(model)` returns (the model inside runs, uncompiled), or a path or hub id to load.
        draft: a causal LM with the same tokenizer, a `Drafter`, "ngram" (prompt lookup), "suffix" (the same
            with matches of any length, as a tree; see SuffixDrafter), "self" (the target itself, as
            a cheaper copy; "self:int8" and others name its form, docs/self-drafts.md), a path or hub id to load, a list
            of such (at most one model), or None (plain decoding on the same loop).
        k: length of drafted chains. Left out (or "auto", for a `Drafter` object), every step is planned: with which
            drafter, how deep, or plainly where drafts do not pay (docs/planner.md).
        tree: instead of k, children per level, e.g. `(3, 2, 1)`, a `Topology`, a list of paths, or a growth policy
            such as `BestFirst(...)` (see ModelDrafter).
        rule: acceptance rule; "auto" takes greedy at temperature 0, naive for deterministic drafts (n-grams, best-first
            trees), block for sampled chains, budget_flow for trees that mix both, traversal where siblings are
            sampled. By name also rejection, recursive_rejection; coupled, with which sampled text is a function of
            target and seed alone, the same for every drafter, tree, k and draft=None; and typical, which is lossy.
        lossy: must be True for a rule that changes the law ("typical"); such a rule is never chosen by "auto".
        tokenizer: needed only for `stop_strings`; a target that is loaded brings its own.
        exactness: "distribution" (the exact law with respect to the verification pass's own logits), or "strict": every
            pass of the target is computed so that a token's logits are the same bits whatever was drafted around it.
            Greedy texts (and those of rule "coupled") are then identical for every drafter, tree, k and draft=None.
        strict_width: nodes per pass in strict mode, the root included; larger drafts are cut to it. (Native passes need
            no such width and are not padded to it.)
        cache: layout of the K/V cache: "contiguous", or "paged" (pages of `page_size` slots, which several rows of one
            prompt share; see KVPool). The layout changes no result.
        monitor: True holds the acceptance of sampling calls against theory (`report.acceptance_z`); a `Monitor` object
            of your own watches every step of every call.

    One Speculator decodes one call at a time: a call from another thread waits for its turn (no callback may wait for
    such a call), one from a callback is refused. Meanwhile the target's attention function and few-row linear layers
    are exchanged: several Speculators on one target, or its own `generate`, must not run in several threads at once.

    Attributes:
        report: `SpecReport` of the last finished call, of whichever thread; None before the first.

    Raises:
        UnsupportedModelError: a model that cannot be rolled back; UnsupportedArgumentError: contradictory options.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft = None,
        *,
        k: int | str | None = None,
        tree: Any = None,
        rule: str = "auto",
        lossy: bool = False,
        tokenizer: Any = None,
        monitor: bool | Monitor = False,
        exactness: str = "distribution",
        strict_width: int | None = None,
        cache: str = "contiguous",
        page_size: int | None = None,
    ):
        check_choice(rule, lossy)
        self._preparation = Preparation(target, tokenizer)
        self.target, self.tokenizer = self._preparation.target, self._preparation.tokenizer
        self.rule = rule
        refuse_sharded(self.target, draft, exactness == "strict")
        self.strict = make_strict(self.target, exactness, strict_width)
        self.page_size = make_page_size(cache, page_size)
        if not isinstance(monitor, (bool, Monitor)):
            raise UnsupportedArgumentError(f"monitor: expected True, False or a Monitor, got {type(monitor).__name__}")
        self.monitor = monitor
        most_nodes = None if self.strict is None else self.strict.width - 1
        drafter = make_draft(draft, self.target, k, tree, rule, most_nodes)
        self.drafter = None if drafter is None else FallbackGuard(drafter, most_nodes)
        self.planners = (
            PlannerFactory(self.target, drafter, rule, self.strict) if isinstance(drafter, Options) else None
        )
        if drafter is not None:
            check_choice(rule, lossy, drafter.name, drafter.kind)
        self.report: SpecReport | None = None
        self._lock = CallLock()

    def __repr__(self) -> str:
        drafter = None if self.drafter is None else self.drafter.inner
        pages = "" if self.page_size is None else f", pages of {self.page_size}"
        exactness = "distribution" if self.strict is None else f"strict, width {self.strict.width}"
        return (
            f"Speculator(target: {model_words(self.target)}; draft: {drafter_words(drafter)}; rule: {self.rule}; "
            f"exactness: {exactness}{pages})"
        )

    @classmethod
    def from_pair(cls, pair: str | Path | Pair, *, dtype: Any = None, device: Any = None, **options: Any) -> Speculator:
        """A Speculator on a pair's models, e.g. `Speculator.from_pair("smollm2-1.7b-135m")`.

        pair: a name (`specdec pairs list`), a TOML file, or a folder with `target/` and `draft/`. dtype, device and
        what is raised: see `specdec.pairing.loading.open_pair`. options: of Speculator, instead of the pair's own.
        """
        target, draft, settings = open_pair(pair, dtype, device, options)
        return cls(target, draft, **settings)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        custom_generate: Any = None,
        *,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
        on_step: Callable[[StepTrace], None] | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """`target.generate(...)`, faster: the same arguments in the same places, the same returns, the same law.

        Extra arguments:
            seed: makes sampling reproducible without touching torch's global generator. An int keys every row by
                its index; a sequence gives each row its own seed, so that its text does not depend on its place.
            generator: a `torch.Generator` to take the seed from instead.
            on_step: called with a `StepTrace` after every step.

        Raises:
            UnsupportedArgumentError: beams, `use_cache=False` and others that cannot be honoured, by name.
            TargetFaultError: the target failed; the tokens emitted so far are in the error.
            ValueError: whatever plain `generate` refuses (unknown arguments included).
        """
        ways = {"assistant_model": assistant_model, "custom_generate": custom_generate, "synced_gpus": synced_gpus}
        self._preparation.check(inputs, generation_config, kwargs, ways)

        def decode(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> Tensor | GenerateDecoderOnlyOutput:
            return self._decode(
                input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs,
                seed=seed, generator=generator, streamer=streamer, on_step=on_step,
            )  # fmt: skip

        kwargs |= {"logits_processor": logits_processor, "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn}
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        with self._lock:
            return self._preparation.run(decode, inputs, generation_config, stopping_criteria, tokenizer, kwargs)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        spec_streamer: Any = None,
        on_step: Callable[[StepTrace], None] | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """The hook form: `target.generate(**inputs, custom_generate=spec)`.

        `transformers` drops `streamer` and `tokenizer` before it calls a custom method: pass `spec_streamer=`, and
        use `Speculator.generate` for `stop_strings`.
        """
        if model is not self.target:
            raise UnsupportedArgumentError(
                "custom_generate: this Speculator was built for another model; build one for the model you call"
            )
        return self._decode(
            input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs,
            seed=seed, generator=generator, streamer=spec_streamer, on_step=on_step,
        )  # fmt: skip

    def _decode(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        **options: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        if self.rule == "greedy" and config.do_sample:
            raise UnsupportedArgumentError(
                "rule='greedy' keeps the argmax only, which is not what do_sample=True asks for: leave rule at 'auto'"
            )
        request = self._preparation.request(input_ids, processors, criteria, config, model_kwargs, **options)
        ordered = in_plain_order(request.processors, request.criteria, request.input_ids.shape[0])
        check_order(self.rule, bool(config.do_sample), ordered)
        ranks = ranks_of(self.target)
        with self._lock.alone(), ExitStack() as together:
            watching = self.monitor
            monitor = watching if isinstance(watching, Monitor) else AcceptanceMonitor() if watching else None
            cost = None if self.strict is None else self.strict.cost(request.input_ids.device)
            together.enter_context(nullcontext() if ranks is None else ranks.call(described(request, self.rule)))
            planner = None
            if ranks is not None and not ranks.leads:
                loop: DecodeLoop = following(ranks, request, self.target, self.rule, self.page_size)
            else:
                make_loop: Callable[..., DecodeLoop] = DecodeLoop
                scratch_loop = make_loop
                if ranks is not None:
                    make_loop, scratch_loop = partial(LeadingLoop, ranks), partial(LeadingLoop, ranks, scratch=True)
                if self.planners is not None:
                    planner = self.planners.planner_for(request, scratch_loop)
                loop = make_loop(
                    request, self.target, self.drafter, self.rule, monitor, self.strict, self.page_size, planner
                )
            if request.note is not None:
                loop.report.notes.append(request.note)
            if self.strict is not None and cost is not None:
                loop.report.exactness, loop.report.strict_width = "strict", self.strict.width
                loop.report.ms_strict_pass, loop.report.ms_plain_pass = cost
            out = loop.run()
            self.report = loop.report if planner is None else planner.tell(loop.report)
            if isinstance(monitor, AcceptanceMonitor):
                self.report.acceptance_z = monitor.z
        if isinstance(out, Tensor):
            return out.to(input_ids.device)
        return out


def generate(
    target: Target,
    draft: Draft = None,
    inputs: Tensor | None = None,
    *,
    k: int | str | None = None,
    tree: Any = None,
    rule: str = "auto",
    lossy: bool = False,
    exactness: str = "distribution",
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """One-shot form of `Speculator(target, draft, ...).generate(inputs, ...)`."""
    return Speculator(target, draft, k=k, tree=tree, rule=rule, lossy=lossy, exactness=exactness).generate(
        inputs, **kwargs
    )
