"""What an engine has done and is doing, under vLLM's names."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from specdec.kv.quantised import Quantised
from specdec.report import DraftTotals

WINDOW = 4096
"""Latest observations from which percentiles are formed."""
BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0,
)  # fmt: skip
"""Seconds up to which latencies are counted, for histograms."""


@dataclass(frozen=True)
class Latency:
    """Seconds. count, mean and histogram are over the engine's whole life, percentiles over the latest `WINDOW`
    observations. histogram: observations of at most `BOUNDS[i]` seconds, those of smaller bounds included."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    histogram: tuple[int, ...] = (0,) * len(BOUNDS)


@dataclass(frozen=True)
class EngineMetrics(DraftTotals):
    """A snapshot. Counts are totals since the engine was made; a *draft* is one row's proposal in one step.

    num_accepted_tokens_per_pos: accepted tokens per depth (vLLM's spec_decode_num_accepted_tokens_per_pos).
    kv_cache_usage: fraction of the pool's pages in use, shared prefixes included.
    inter_token_latency: the time since the previous tokens of a request, divided among the tokens of one step.
    num_finished: requests by finish reason.
    lossy: what makes texts follow another law than the target's; None where nothing does, but rules that requests name.
    """

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_prefilled_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: tuple[int, ...] = ()
    num_drafter_faults: int = 0
    num_finished: dict[str, int] = field(default_factory=dict)
    time_to_first_token: Latency = Latency()
    inter_token_latency: Latency = Latency()
    request_queue_time: Latency = Latency()
    e2e_request_latency: Latency = Latency()
    lossy: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "mean_acceptance_length": self.mean_acceptance_length}


class Observations:
    """Durations of one kind, in seconds."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self._count = 0
        self._total = 0.0
        self._of_bound = [0] * (len(BOUNDS) + 1)

    def add(self, seconds: float, times: int = 1) -> None:
        """Observe `seconds`, `times` times."""
        self._of_bound[bisect_left(BOUNDS, seconds)] += times
        self._latest.extend([seconds] * times)
        self._count += times
        self._total += seconds * times

    def latency(self) -> Latency:
        if not self._count:
            return Latency()
        values = sorted(self._latest)
        last = len(values) - 1
        histogram = tuple(accumulate(self._of_bound[:-1]))
        return Latency(self._count, self._total / self._count, values[last // 2], values[round(0.99 * last)], histogram)


class Counters:
    """The running totals behind `EngineMetrics`, by its field names."""

    def __init__(self, quantised: Quantised | None = None) -> None:
        self.lossy = None if quantised is None else quantised.loss
        self.totals: dict[str, int] = {}
        self.per_pos: list[int] = []
        self.finished: dict[str, int] = {}
        self.first_token, self.between = Observations(), Observations()
        self.queued, self.whole = Observations(), Observations()

    def add(self, name: str, count: int = 1) -> None:
        self.totals[name] = self.totals.get(name, 0) + count

    def drafted(self, nodes: int, accepted: int) -> None:
        """One row's draft of `nodes` tokens of which `accepted` were kept; without nodes it was none."""
        if not nodes:
            return
        self.add("num_drafts")
        self.add("num_draft_tokens", nodes)
        self.add("num_accepted_tokens", accepted)
        self.per_pos += [0] * (accepted - len(self.per_pos))
        for depth in range(accepted):
            self.per_pos[depth] += 1

    def snapshot(self, running: int, waiting: int, usage: float) -> EngineMetrics:
        return EngineMetrics(
            num_requests_running=running,
            num_requests_waiting=waiting,
            kv_cache_usage=usage,
            num_accepted_tokens_per_pos=tuple(self.per_pos),
            num_finished=dict(self.finished),
            time_to_first_token=self.first_token.latency(),
            inter_token_latency=self.between.latency(),
            request_queue_time=self.queued.latency(),
            e2e_request_latency=self.whole.latency(),
            lossy=self.lossy,
            **self.totals,
        )
