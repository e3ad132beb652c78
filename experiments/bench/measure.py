"""The measurement: every way on the same prompts, alternating, in one process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from torch import Tensor

from specdec.experiments.bench.equality import Difference, differences
from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.bench.ways import PLAIN
from specdec.experiments.clock import rotated, timed
from specdec.experiments.pair import Models
from specdec.experiments.ways import Output, Way
from specdec.verify.passes.forward import observing


@dataclass(frozen=True)
class Run:
    """One call of one way (`peer`) on one batch of prompts.

    rows: prompts in the batch. tokens: new tokens of all rows.
    passes: forward passes of the target, the prefill included.
    target_seconds, draft_seconds: time inside the two models' forward (meaningless on a GPU, which runs behind).
    report: `SpecReport.to_dict()` of specdec's ways.
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
    """Counts and times a model's forward passes, about a microsecond each: with hooks where the model's modules are
    called, else where specdec reports its passes (hooks would keep it from its fastest way). Passes through a part of
    the layers, by which transformers drafts with an early exit, are not counted."""

    def __init__(self) -> None:
        self.passes = 0
        self.seconds = 0.0
        self._start = 0.0
        self._num_layers = 0

    @contextmanager
    def on(self, model: Any, calls_modules: bool = True) -> Iterator[None]:
        """`model` None: nothing to count."""
        if model is None:
            yield
            return
        if not calls_modules:
            with observing(lambda used, seconds: self._add(seconds) if used is model else None):
                yield
            return
        self._num_layers = model.config.get_text_config().num_hidden_layers
        before = model.register_forward_pre_hook(self._before)
        after = model.register_forward_hook(self._after)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _before(self, module: Any, inputs: Any) -> None:
        self._start = perf_counter()

    def _after(self, module: Any, inputs: Any, output: Any) -> None:
        if module.config.get_text_config().num_hidden_layers == self._num_layers:
            self._add(perf_counter() - self._start)

    def _add(self, seconds: float) -> None:
        self.seconds += seconds
        self.passes += 1


def measure(
    models: Models,
    ways: Sequence[Way],
    batches: Sequence[Tensor],
    options: BenchOptions,
    advance: Callable[[str], None] = lambda name: None,
) -> tuple[list[Run], list[Difference]]:
    """Warm every way up, then run all of them on each batch of prompts, `options.rounds` times.

    In greedy decoding each output is compared with plain generation's.

    Args:
        advance: called with the way's name before each of its calls (progress).
    """
    ready = {way.name: way.ready(models, options) for way in ways}
    runs: list[Run] = []
    found: list[Difference] = []
    for name, generate in ready.items():
        advance(name)
        generate(batches[0], options.seed)
    gc.collect()
    gc.freeze()  # models and modules need not be walked again before every call
    for round_ in range(options.rounds):
        for prompt, ids in enumerate(batches):
            outputs: dict[str, Output] = {}
            for way in rotated(ways, round_ * len(batches) + prompt):
                advance(way.name)
                gc.collect()
                target, draft = ModelClock(), ModelClock()
                call = partial(ready[way.name], ids, options.seed + 1000 * round_ + prompt)
                with target.on(models.target, way.calls_modules), draft.on(models.draft_model, way.calls_modules):
                    output, spent = timed(call, options.device)
                _check_shape(way.name, output.ids, ids, options.new_tokens)
                outputs[way.name] = output
                passes, target_seconds = output.passes or (target.passes, target.seconds)
                report = None if output.report is None else output.report.to_dict()
                runs.append(Run(
                    way.name, prompt, round_, spent.wall, ids.shape[0], ids.shape[0] * options.new_tokens, passes,
                    target_seconds, draft.seconds, report,
                ))  # fmt: skip
            if not options.temperature and round_ == 0:  # greedy outputs do not change between rounds
                found += differences(models.target, outputs, PLAIN, prompt, ids.shape[1])
    gc.unfreeze()
    return runs, found


def _check_shape(name: str, got: Tensor, ids: Tensor, new_tokens: int) -> None:
    expected = (ids.shape[0], ids.shape[1] + new_tokens)
    if tuple(got.shape) != expected:
        raise RuntimeError(f"{name}: expected ids of shape {expected}, got {tuple(got.shape)}: no times to compare")
