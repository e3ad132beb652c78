"""Time: of a call, of calls that take turns, of a device that runs behind the host, and of what is left of a run.

Whatever is compared takes turns on the same machine in the same minutes, so that its moods hit all alike; what counts
is the median. The order changes from turn to turn, so that nobody always follows the same one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
CALLS = 10
"""Calls recorded in one graph when the device alone is timed."""


class Spent(NamedTuple):
    """Seconds of one call: by the clock, and of the processor in all threads. On one thread both agree when nothing
    else runs, and other processes change the second one little."""

    wall: float
    cpu: float

    @property
    def ms(self) -> float:
        return 1e3 * self.wall


def timed(call: Callable[[], T], device: str = "cpu") -> tuple[T, Spent]:
    """What `call` returns, and what it took until its result was there."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    synchronize(device)
    return found, Spent(time.perf_counter() - wall, time.process_time() - cpu)


def median_ms(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median milliseconds from the call to its result being there, host included; one call at a time, after one that
    is not counted."""
    return statistics.median([timed(call, device)[1].ms for _ in range(repeats + 1)][1:])


def device_ms(call: Callable[[], object], device: str, repeats: int) -> float | None:
    """Milliseconds the device needs per call, from a graph of several calls; None without CUDA."""
    if not device.startswith("cuda"):
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return median_ms(graph.replay, device, repeats) / CALLS


def rotated(values: Sequence[T], turn: int) -> list[T]:
    """The order of a turn: everyone moves up by one place with every turn."""
    at = turn % len(values)
    return [*values[at:], *values[:at]]


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Deadline:
    """How much of the run's time is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()
