"""Measuring what steps cost: the real decode loop on a scratch text, told what to draft at every step.

The scratch text goes on from the end of the caller's own prompt: how its drafts fare is what the first call believes.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter, process_time

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList

from specdec.drafters import Budget, Drafter, FallbackGuard, Session
from specdec.drafters.base import CACHE_NAME
from specdec.kv.support import text_config
from specdec.loop import DecodeLoop
from specdec.planner.base import Planning
from specdec.planner.costs import Costs
from specdec.planner.history import History
from specdec.planner.options import Option, Options, PlannedBudget
from specdec.report import StepTrace
from specdec.request import Request
from specdec.verify import DraftTree
from specdec.verify.kinds import DraftKind
from specdec.verify.strict_mode import StrictMode
from specdec.verify.topology import Topology

SECONDS = 0.7
"""Time to spend; models whose few necessary steps take longer get just those."""
MOST_ROUNDS = 6
PROMPT_TOKENS = 64
_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
_COARSE = (1, 4)
"""Depths measured where steps are so slow that few are affordable; the rest is interpolated."""

_MOST_PROMPT_TOKEN = 0.1
"""The first pass over the prompt also pays for what is done once. A prompt token costs at most this share of a step."""

_HARMLESS = frozenset(
    f"{name}Logits{kind}"
    for name, kind in (
        ("Temperature", "Warper"), ("TopK", "Warper"), ("TopP", "Warper"), ("TopH", "Warper"), ("MinP", "Warper"),
        ("Typical", "Warper"), ("Epsilon", "Warper"), ("Eta", "Warper"), ("RepetitionPenalty", "Processor"),
        ("NoRepeatNGram", "Processor"), ("MinLength", "Processor"), ("MinNewTokensLength", "Processor"),
        ("SuppressTokens", "Processor"),
    )
)  # fmt: skip
"""Processors that may see scratch text: stateless ones of the library's. Others are not called."""


_PLAIN, _FORGET = (-1, 0), (-2, 0)


class _Enough(Exception):
    """Ends the measuring loop."""


class _Filler(Drafter):
    """Proposes as many tokens as it is asked for, of no value: what judging deterministic drafts costs."""

    def __init__(self, depth: int):
        self.max_depth = self.max_nodes = depth

    @property
    def kind(self) -> DraftKind:
        return DraftKind("chain", "deterministic")

    def start(self, session: Session) -> None:
        self._session = session

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        roots = self._session.rows.roots()
        tokens = torch.arange(budget.max_depth, device=roots.device) % self._session.vocab
        return DraftTree.build(
            Topology.chain(budget.max_depth), torch.cat([roots[:, None], tokens.expand(len(roots), -1)], dim=1)
        )


class _Script(Planning):
    """Stands where the planner stands, and notes how long the steps took that it ordered.

    First three plain steps, then rounds of every order; the first round also pays for what is done once per process
    (kernels are chosen), and its times count only where there is no time for another.
    """

    def __init__(self, options: Options, rows: int, seconds: float, clock: Callable[[], float]):
        self.depths = [measured_depths(option) for option in options.options]
        self.loop: DecodeLoop | None = None
        self.ms: dict[tuple[int, int], list[float]] = {}
        self.catch_up_ms: list[tuple[float, int]] = []
        self._options, self._rows, self._seconds, self._clock = options, rows, seconds, clock
        self._queue: list[tuple[int, int]] = [_PLAIN] * 3
        self._pending: tuple[int, int] | None = None
        self._forgotten = 0
        self._rounds = 0
        self._begun = self._last = clock()
        self.history = {option.family: History(options.max_depth, 1) for option in options.options}

    def budget(self, live: Sequence[int], left: Sequence[int | None]) -> PlannedBudget:
        if self._pending is not None:
            self._note(1e3 * (self._clock() - self._last), self._pending)
        if not self._queue:
            self._next_round()
        order = self._queue.pop(0)
        if order == _FORGET:
            assert self.loop is not None
            self.loop.cache.forget(CACHE_NAME)
            self._forgotten = max(self.loop.rows.num_tokens)
            order = self._queue.pop(0)
        self._pending = order
        self._last = self._clock()
        option, depth = order
        if depth == 0:
            return PlannedBudget((0,) * self._rows, 0)
        return PlannedBudget((depth,) * self._rows, self._options.options[option].drafter.max_nodes, option)

    def _note(self, ms: float, order: tuple[int, int]) -> None:
        if self._forgotten:
            self.catch_up_ms.append((ms, self._forgotten))
            self._forgotten = 0
        else:
            self.ms.setdefault(order, []).append(ms)

    def _next_round(self) -> None:
        if self._rounds == 0:
            if 4 * self._plain_seconds() * sum(map(len, self.depths)) > self._seconds:
                self.depths = [[d for d in depths if d in _COARSE or len(depths) == 1] for depths in self.depths]
        elif self._rounds == 1:
            self._begun = self._clock()
            if 2 * self._plain_seconds() * sum(map(len, self.depths)) > 3 * self._seconds:
                raise _Enough
        else:
            spent = self._clock() - self._begun
            if self._rounds > MOST_ROUNDS or spent * self._rounds / (self._rounds - 1) > self._seconds:
                raise _Enough
        self._rounds += 1
        self._queue += [_PLAIN, _PLAIN]
        for option, depths in enumerate(self.depths):
            if self._options.options[option].drafter.num_cache_layers:
                self._queue += [_FORGET, (option, depths[0])]
            self._queue += [(option, depth) for depth in depths]

    def _plain_seconds(self) -> float:
        return min(self.ms[_PLAIN]) / 1e3

    def learn(self, trace: StepTrace, reached: Sequence[int]) -> None:
        """How the drafts fared; the clock is read between orders."""
        index, depth = self._pending or _PLAIN
        if depth > 0 and any(trace.drafted):
            option = self._options.options[index]
            if not isinstance(option.drafter, _Filler):
                self.history[option.family].add(option.widths, trace.rows, reached, trace.accepted)


def measured_depths(option: Option) -> list[int]:
    """Depths of `option` whose cost is measured."""
    deepest = len(option.widths)
    return [*(d for d in _DEPTHS if d < deepest), deepest] if option.any_depth else [deepest]


def kept_processors(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Those that may be run on scratch text."""
    return LogitsProcessorList([one for one in processors if type(one).__name__ in _HARMLESS
                                and type(one).__module__.startswith("transformers.")])  # fmt: skip


def measure(
    request: Request,
    target: PreTrainedModel,
    options: Options,
    rule: str,
    rows: int,
    strict: StrictMode | None = None,
    seconds: float = SECONDS,
) -> Costs:
    """Cost table of steps of `rows` rows, with the caller's own sampling settings.

    Nothing of the call is touched: the text is random tokens, the cache its own, and no global random state is used.

    Raises:
        RuntimeError: the drafter failed, or nothing could be measured. Faults of the target: TargetFaultError.
    """
    start = perf_counter()
    most_nodes = None if strict is None else strict.width - 1
    scratch = Options([replace(option, drafter=_Filler(option.drafter.max_nodes)) if option.may_be_empty else option
                       for option in options.options])  # fmt: skip
    guard = FallbackGuard(scratch, most_nodes)
    prompt = _scratch_prompt(request, target, rows)
    # One thread's own time does not count what other processes do meanwhile.
    alone = prompt.device.type == "cpu" and torch.get_num_threads() == 1
    script = _Script(scratch, rows, seconds, process_time if alone else perf_counter)
    loop = DecodeLoop(_scratch_request(request, prompt), target, guard, rule, strict=strict, planner=script)
    script.loop = loop
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loop.run()
    except _Enough:
        pass
    if guard.num_faults:
        raise RuntimeError(f"the drafter failed: {guard.last_fault}")
    if not all((i, depth) in script.ms for i, depths in enumerate(script.depths) for depth in depths):
        raise RuntimeError("the text grew too long before every step was timed")
    prompt_ms, *script.ms[_PLAIN] = script.ms[_PLAIN]
    plain = _typical(script.ms[_PLAIN])
    steps = {option.name: {depth: _typical(script.ms[i, depth]) for depth in script.depths[i]}
             for i, option in enumerate(scratch.options)}  # fmt: skip
    draft_token = 0.0
    for option in scratch.options:
        if option.drafter.num_cache_layers and script.catch_up_ms:
            usual = steps[option.name][min(steps[option.name])]
            draft_token = max(0.0, min((ms - usual) / tokens for ms, tokens in script.catch_up_ms))
            break
    first = loop.watch.ms.get("prefill", 0.0) + prompt_ms - plain
    prompt_token = max(0.0, min(first / prompt.shape[1], plain * _MOST_PROMPT_TOKEN))
    beliefs = {family: history.belief for family, history in script.history.items() if history.num_decisions}
    return Costs(rows, plain, steps, draft_token, prompt_token, beliefs, perf_counter() - start)


def _typical(times: Sequence[float]) -> float:
    """The lower third; the first time is left out where there are more: it paid for what is done once."""
    times = sorted(times[1:] if len(times) > 1 else times)
    return times[len(times) // 3]


_SCRATCH_REQUEST = 1 << 31
"""Rows of scratch texts begin here, where no call's rows get to: what they were drafted with is never used again."""


def _scratch_prompt(request: Request, target: PreTrainedModel, rows: int) -> Tensor:
    """The ends of the caller's prompts, again and again where there are fewer than `rows`; random tokens before those
    that are shorter than a scratch prompt."""
    config = text_config(target)
    room = getattr(config, "max_position_embeddings", None) or 4 * PROMPT_TOKENS
    length = max(2, min(PROMPT_TOKENS, room // 4))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(int(config.vocab_size), (rows, length), generator=generator).to(request.input_ids.device)
    for row in range(rows):
        source = row % request.input_ids.shape[0]
        own = request.input_ids[source]
        own = own if request.real is None else own[request.real[source].bool()]
        own = own[-length:]
        prompt[row, length - len(own) :] = own
    return prompt


def _scratch_request(request: Request, prompt: Tensor) -> Request:
    config = copy.copy(request.config)
    config.return_dict_in_generate = False
    rows = prompt.shape[0]
    return Request(
        input_ids=prompt, real=None, processors=kept_processors(request.processors),
        criteria=StoppingCriteriaList([MaxLengthCriteria(prompt.shape[1] + math.floor(1e6))]), config=config,
        cache=None, cached=0, cache_is_callers=False, repeats=1, seeds=[0] * rows,
        requests=[_SCRATCH_REQUEST + row for row in range(rows)],
    )  # fmt: skip
