"""Texts through the real `generate`: text number i is a function of its pair, its setting and i, whatever its batch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.experiments.laws.world import COMMON, NEW, PROMPTS, SETTINGS
from specdec.speculator import Speculator
from specdec.trace import StepTrace


class Texts(NamedTuple):
    """Texts `start`, `start + 1`, ... of one setting, text i after prompt `i % len(PROMPTS)`.

    tokens: int64 `[rows, NEW]`. first_run: int64 `[rows]`, how many of them the first step emitted.
    row_steps: steps times rows it took to write them.
    """

    setting: int
    start: int
    tokens: Tensor
    first_run: Tensor
    row_steps: int

    @property
    def prompts(self) -> Tensor:
        """Int64 `[rows]`: which prompt each text follows."""
        return (self.start + torch.arange(len(self.tokens))) % len(PROMPTS)


def write(spec: Speculator, setting: int, start: int, rows: int) -> Texts:
    """`rows` texts in one call of `generate`, left-padded, each with a seed of its own.

    Raises:
        RuntimeError: the drafter failed, so that nothing was tested.
    """
    numbers = range(start, start + rows)
    prompts = [PROMPTS[number % len(PROMPTS)] for number in numbers]
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    first = torch.zeros(rows, dtype=torch.int64)
    row_steps = 0

    def keep(trace: StepTrace) -> None:
        nonlocal row_steps
        row_steps += len(trace.rows)
        if trace.step == 0:
            first[trace.rows] = torch.tensor([len(run) for run in trace.emitted])

    out: Any = spec.generate(
        ids, attention_mask=mask, seed=[(setting << 40) + number for number in numbers], on_step=keep, **COMMON,
        **SETTINGS[setting],
    )  # fmt: skip
    report = spec.report
    if report is None or report.num_drafter_faults:
        raise RuntimeError(f"the drafter failed: {None if report is None else report.last_drafter_fault}")
    assert out.shape[1] == width + NEW
    return Texts(setting, start, out[:, width:], first, row_steps)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside: thousands of rows are many small lists, which it would scan again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
        gc.collect(0)
