"""What becomes of a submitted prompt: a checked task, or a refusal before anybody else is touched."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from time import monotonic

import torch
from torch import Tensor

from specdec.drafters import FallbackGuard
from specdec.engine.handle import Driver, Handle
from specdec.engine.law import LaneLaw
from specdec.engine.params import Params, prepare, prompt_ids
from specdec.engine.task import LaneKey, Task
from specdec.kv import UnsupportedArgumentError
from specdec.preparation import Preparation
from specdec.request import Request
from specdec.stopping import StopRules
from specdec.verify import NoiseStream, Rows
from specdec.verify.purity import PREFIX_FREE, ROW_FREE, in_plain_order
from specdec.verify.rules import check_choice, check_order


class Intake:
    """Checks requests as `Speculator.generate` checks its arguments, by the same code, and makes tasks of them.

    One at a time: `transformers` sets and restores attributes of the target's generation config while it prepares.

    Args:
        drafters: by name, the default first. vocab, device: the target's.
    """

    def __init__(
        self,
        preparation: Preparation,
        drafters: Mapping[str, FallbackGuard | None],
        vocab: int,
        device: torch.device,
    ):
        self._preparation, self._drafters = preparation, drafters
        self._vocab, self._device = vocab, device
        self._numbers = itertools.count()

    def task(self, engine: Driver, prompt: Sequence[int] | Tensor, asked: Params, step: int) -> Task:
        """The request, ready to wait.

        Args:
            step: the engine's number of steps so far.

        Raises:
            UnsupportedArgumentError, ValueError: what cannot be decoded.
        """
        ids = prompt_ids(prompt, self._preparation.target, self._vocab)
        draft = next(iter(self._drafters)) if asked.draft is None else asked.draft
        if draft not in self._drafters:
            raise UnsupportedArgumentError(f"draft: expected one of {list(self._drafters)}, got {draft!r}")
        drafter = self._drafters[draft]
        check_choice(
            asked.rule,
            asked.lossy,
            None if drafter is None else drafter.name,
            None if drafter is None else drafter.kind,
        )
        request = prepare(self._preparation, torch.tensor([ids], device=self._device), asked)
        sampling = bool(request.config.do_sample)
        if asked.rule == "greedy" and sampling:
            raise UnsupportedArgumentError(
                "rule='greedy' keeps the argmax only, which is not what do_sample=True asks for"
            )
        ordered = in_plain_order(request.processors, request.criteria, 1)
        check_order(asked.rule, sampling, ordered)
        self._try(request)
        return Task(
            handle=Handle(engine, next(self._numbers), ids),
            params=asked,
            request=request,
            lane=LaneKey(draft, asked.rule, sampling, bool(ordered)),
            seed=request.seeds[0],
            tail=1 if drafter is None else drafter.tail_slots,
            nodes=1 if drafter is None else drafter.max_nodes + 1,
            pinned=sampling and asked.seed is not None and asked.rule != "coupled",
            submitted=monotonic(),
            entered=step,
            text=list(ids),
        )

    def _try(self, request: Request) -> None:
        """Make once, on trial, what the request's lane will make of it: what fails does so before anything has begun.

        `transformers`' own processors that look at token ids are called once as well, since some check those ids in
        their first call only. No other code of the request is called.
        """
        for what, things in (("logits processor", request.processors), ("stopping criterion", request.criteria)):
            for thing in things:
                if not callable(thing):
                    raise UnsupportedArgumentError(f"{what}: expected something to call, got {type(thing).__name__}")
        stop = StopRules(request.criteria, Rows.empty(self._device))
        LaneLaw().join(0, request.processors, stop.ends)
        NoiseStream([], [], self._device).join(0, request.seeds[0], 0)
        scores = torch.zeros(1, self._vocab, device=self._device)
        for processor in request.processors:
            if type(processor) in ROW_FREE - PREFIX_FREE:
                processor(request.input_ids, scores.clone())
            function = getattr(processor, "_prefix_allowed_tokens_fn", processor)
            if not callable(function):
                raise UnsupportedArgumentError(
                    f"prefix_allowed_tokens_fn: expected a function, got {type(function).__name__}"
                )
