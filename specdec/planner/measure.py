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

from specdec.drafters import Drafter, FallbackGuard
from specdec.kv.support import text_config
from specdec.kv.wrappers import bytes_moved_by_a_pass
from specdec.loop import DecodeLoop
from specdec.planner.costs import Costs
from specdec.planner.measuring_planner import PLAIN, EnoughMeasured, FillingDrafter, MeasuringPlanner
from specdec.planner.options import Option, Options
from specdec.request import Request
from specdec.verify.positions import usable_positions
from specdec.verify.purity import PREFIX_FREE
from specdec.verify.strict_mode import StrictMode

SECONDS = 0.7
"""Time to spend; models whose few necessary steps take longer get just those."""
PROMPT_TOKENS = 64
_MOST_PROMPT_TOKEN = 0.1
"""The first pass over the prompt also pays for what is done once. A prompt token costs at most this share of a step."""


def kept_processors(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Those that may be run on scratch text: of transformers' own classes that look at nothing but scores. All others
    read prefixes, count rows or keep a state, and belong to the call: they are never asked about anything else."""
    return LogitsProcessorList([one for one in processors if type(one) in PREFIX_FREE])


def measure(
    request: Request,
    target: PreTrainedModel,
    options: Options,
    rule: str,
    rows: int,
    strict: StrictMode | None = None,
    seconds: float = SECONDS,
    make_loop: Callable[..., DecodeLoop] = DecodeLoop,
) -> Costs:
    """Cost table of steps of `rows` rows, with the caller's own sampling settings.

    Nothing of the call is touched: the text is random tokens, the cache its own, drafters are clones, and no global
    random state is used. Nothing of the caller's runs: no processor of his, no criterion, streamer or monitor.

    Args:
        make_loop: what decodes (see `DecodeLoop`).

    Raises:
        RuntimeError: the drafter failed, or nothing could be measured. Faults of the target: TargetFaultError.
    """
    start = perf_counter()
    most_nodes = None if strict is None else strict.width - 1
    scratch = Options([replace(option, drafter=_scratch_drafter(option)) for option in options.options])
    guard = FallbackGuard(scratch, most_nodes)
    room = _room(target, options)
    prompt = _scratch_prompt(request, target, rows, room)
    # One thread's own time does not count what other processes do meanwhile; but waiting for a disk or for other ranks
    # is a cost.
    alone = prompt.device.type == "cpu" and torch.get_num_threads() == 1
    alone = alone and not bytes_moved_by_a_pass(target) and make_loop is DecodeLoop
    script = MeasuringPlanner(scratch, rows, seconds, process_time if alone else perf_counter, room)
    loop = make_loop(scratch_request(request, prompt), target, guard, rule, strict=strict, planner=script)
    script.batch = loop
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loop.run()
    except EnoughMeasured:
        pass
    if guard.num_faults:
        raise RuntimeError(f"the drafter failed: {guard.last_fault}")
    if not all((i, depth) in script.ms for i, depths in enumerate(script.depths) for depth in depths):
        raise RuntimeError("the text grew too long before every step was timed")
    prompt_ms, *script.ms[PLAIN] = script.ms[PLAIN]
    plain = _typical(script.ms[PLAIN])
    steps = {option.name: {depth: _typical(script.ms[i, depth]) for depth in script.depths[i]}
             for i, option in enumerate(scratch.options)}  # fmt: skip
    draft_token = 0.0
    for option in scratch.options:
        if option.drafter.keeps_kv and script.catch_up_ms:
            usual = steps[option.name][min(steps[option.name])]
            draft_token = max(0.0, min((ms - usual) / tokens for ms, tokens in script.catch_up_ms))
            break
    first = loop.ms.get("prefill", 0.0) + prompt_ms - plain
    prompt_token = max(0.0, min(first / prompt.shape[1], plain * _MOST_PROMPT_TOKEN))
    beliefs = {family: history.belief for family, history in script.history.items() if history.num_decisions}
    found = {name: sum(shares) / len(shares) for name, shares in script.asked.items()}
    if min(plain, *(ms for table in steps.values() for ms in table.values())) <= 0:
        raise RuntimeError("the clock is too coarse")
    return Costs(rows, plain, steps, draft_token, prompt_token, beliefs, found, perf_counter() - start)


def _scratch_drafter(option: Option) -> Drafter:
    drafter = option.drafter.clone()
    return FillingDrafter(drafter) if option.may_be_empty else drafter


def _typical(times: Sequence[float]) -> float:
    """The lower third; the first time is left out where there are more: it paid for what is done once."""
    times = sorted(times[1:] if len(times) > 1 else times)
    return times[len(times) // 3]


_SCRATCH_REQUEST = 1 << 31
"""Rows of scratch texts begin here, where no call's rows get to: what they were drafted with is never used again."""


def _room(target: PreTrainedModel, options: Options) -> int | None:
    """Tokens a scratch text may have, so that both models can read it to its end."""
    known = [usable_positions(text_config(target)), *(option.positions for option in options.options)]
    return min((positions for positions in known if positions is not None), default=None)


def _scratch_prompt(request: Request, target: PreTrainedModel, rows: int, room: int | None) -> Tensor:
    """The ends of the caller's prompts, again and again where there are fewer than `rows`; random tokens before those
    that are shorter than a scratch prompt."""
    config = text_config(target)
    room = room or getattr(config, "max_position_embeddings", None) or 4 * PROMPT_TOKENS
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


def scratch_request(request: Request, prompt: Tensor) -> Request:
    """A call like `request` on another text, with nothing of the caller's own in it."""
    config = copy.copy(request.config)
    config.return_dict_in_generate = False
    rows = prompt.shape[0]
    return Request(
        input_ids=prompt, real=None, processors=kept_processors(request.processors),
        criteria=StoppingCriteriaList([MaxLengthCriteria(prompt.shape[1] + math.floor(1e6))]), config=config,
        cache=None, cached=0, cache_is_callers=False, repeats=1, seeds=[0] * rows,
        requests=[_SCRATCH_REQUEST + row for row in range(rows)],
    )  # fmt: skip
