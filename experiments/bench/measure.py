"""The clock: every peer on the same prompts, alternating, in one process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import Tensor

from specdec.experiments.bench.equality import Difference, differences
from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.bench.pair import Pair
from specdec.experiments.bench.peers import PLAIN, Generate, Output, Peer
from specdec.verify.passes.forward import observing


@dataclass(frozen=True)
class Run:
    """One call of one peer on one batch of prompts.

    rows: prompts in the batch. tokens: new tokens of all rows.
    passes: forward passes of the target, the prefill included.
    target_seconds, draft_seconds: time inside the two models' forward (meaningless on a GPU, which runs behind).
    report: `SpecReport.to_dict()` of specdec peers.
    """

    peer: str
    prompt: int
    round: int
    seconds: float
    rows: int
    tokens: int
    passes: int
    target_seconds: float
    draft_seconds: float
    report: dict[str, Any] | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class ModelClock:
    """Counts and times a model's forward passes, about a microsecond each: with hooks where the peer calls the model's
    modules, else where specdec reports its passes (hooks would keep it from its fastest way)."""

    def __init__(self) -> None:
        self.passes = 0
        self.seconds = 0.0
        self._start = 0.0

    @contextmanager
    def on(self, model: Any, calls_modules: bool = True) -> Iterator[None]:
        if not calls_modules:
            with observing(lambda used, seconds: self._add(seconds) if used is model else None):
                yield
            return
        before = model.register_forward_pre_hook(self._before)
        after = model.register_forward_hook(self._after)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def reset(self) -> None:
        self.passes, self.seconds = 0, 0.0

    def _before(self, module: Any, inputs: Any) -> None:
        self._start = perf_counter()

    def _after(self, module: Any, inputs: Any, output: Any) -> None:
        self._add(perf_counter() - self._start)

    def _add(self, seconds: float) -> None:
        self.seconds += seconds
        self.passes += 1


def measure(
    pair: Pair,
    peers: Sequence[Peer],
    batches: Sequence[Tensor],
    options: BenchOptions,
    advance: Callable[[str], None] = lambda name: None,
) -> tuple[list[Run], list[Difference]]:
    """Warm every peer up, then run all of them on each batch of prompts, `options.rounds` times.

    The order rotates by one with every batch, so that no peer always follows the same one. In greedy decoding each
    output is compared with plain generation's.

    Args:
        advance: called with the peer's name before each of its calls (progress).
    """
    bound = {peer.name: peer.bind(pair, options) for peer in peers}
    target, draft = ModelClock(), ModelClock()
    runs: list[Run] = []
    found: list[Difference] = []
    modules = {peer.name: peer.calls_modules for peer in peers}
    for name, generate in bound.items():
        advance(name)
        generate(batches[0], options.seed)
    gc.collect()
    gc.freeze()  # models and modules need not be walked again before every call
    for round_ in range(options.rounds):
        for prompt, ids in enumerate(batches):
            outputs: dict[str, Output] = {}
            for name in _rotated(list(bound), round_ * len(batches) + prompt):
                advance(name)
                with target.on(pair.target, modules[name]), draft.on(pair.draft, modules[name]):
                    run, outputs[name] = _timed(name, bound[name], ids, prompt, round_, options, target, draft)
                runs.append(run)
            if not options.sampling and round_ == 0:  # greedy outputs do not change between rounds
                found += differences(pair.target, outputs, PLAIN, prompt, options.prompt_tokens)
    gc.unfreeze()
    return runs, found


def _timed(
    name: str,
    generate: Generate,
    ids: Tensor,
    prompt: int,
    round_: int,
    options: BenchOptions,
    target: ModelClock,
    draft: ModelClock,
) -> tuple[Run, Output]:
    target.reset()
    draft.reset()
    gc.collect()
    seed = options.seed + 1000 * round_ + prompt
    start = perf_counter()
    output = generate(ids, seed)
    last = output.ids.cpu()  # waits for a GPU
    seconds = perf_counter() - start
    expected = (ids.shape[0], ids.shape[1] + options.new_tokens)
    if tuple(last.shape) != expected:
        raise RuntimeError(
            f"{name}: expected ids of shape {expected}, got {tuple(last.shape)}; times are not comparable"
        )
    report = None if output.report is None else output.report.to_dict()
    passes, target_seconds = output.passes or (target.passes, target.seconds)
    run = Run(
        peer=name,
        prompt=prompt,
        round=round_,
        seconds=seconds,
        rows=ids.shape[0],
        tokens=ids.shape[0] * options.new_tokens,
        passes=passes,
        target_seconds=target_seconds,
        draft_seconds=draft.seconds,
        report=report,
    )
    return run, output


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]
