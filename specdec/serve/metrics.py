"""`/metrics`: what the engine and the server have done, for Prometheus.

Names are vLLM's own, their prefix `vllm:` included, wherever the meaning is vLLM's: dashboards, alerts and autoscalers
made for it work unchanged. What vLLM does not have begins with `specdec:`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from specdec.engine import EngineMetrics, Latency
from specdec.engine.metrics import BOUNDS

_GAUGES = {
    "vllm:num_requests_running": ("num_requests_running", "Requests that are decoded or prefilled."),
    "vllm:num_requests_waiting": ("num_requests_waiting", "Requests that wait for a place."),
    "vllm:kv_cache_usage_perc": ("kv_cache_usage", "Share of the pool's pages in use; 1 is all of them."),
}
_COUNTERS = {
    "vllm:prompt_tokens": ("num_prompt_tokens", "Tokens of prompts."),
    "vllm:generation_tokens": ("num_generation_tokens", "Tokens generated."),
    "vllm:num_preemptions": ("num_preemptions", "Times a request gave way for want of pages."),
    "vllm:prefix_cache_queries": ("num_prompt_tokens", "Prompt tokens looked for in the pool."),
    "vllm:prefix_cache_hits": ("num_prefix_hit_tokens", "Prompt tokens found there."),
    "vllm:spec_decode_num_drafts": ("num_drafts", "Drafts."),
    "vllm:spec_decode_num_draft_tokens": ("num_draft_tokens", "Tokens drafted."),
    "vllm:spec_decode_num_accepted_tokens": ("num_accepted_tokens", "Draft tokens accepted."),
    "specdec:engine_steps": ("num_steps", "Steps of the engine, each one pass of the target."),
    "specdec:drafter_faults": ("num_drafter_faults", "Faults of drafters; they cost speed, never text."),
}
_HISTOGRAMS: dict[str, tuple[str, str]] = {
    "vllm:time_to_first_token_seconds": ("time_to_first_token", "From submission to the first token."),
    "vllm:inter_token_latency_seconds": ("inter_token_latency", "Between tokens; those of one step share its time."),
    "vllm:e2e_request_latency_seconds": ("e2e_request_latency", "From submission to the end."),
    "vllm:request_queue_time_seconds": ("request_queue_time", "From submission to the first work on it."),
}
CONTENT_TYPE = CONTENT_TYPE_LATEST
_LABEL = "model_name"


class ServerMetrics:
    """One registry of one server's own.

    Args:
        snapshot: the engine's metrics; model: their label.
    """

    def __init__(self, snapshot: Callable[[], EngineMetrics], model: str):
        self._snapshot, self._model = snapshot, model
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._answers: Counter[int] = Counter()
        self._num_gone = 0

    def answered(self, status: int) -> None:
        """An answer began."""
        self._answers[status] += 1

    def disconnected(self) -> None:
        """A client left before its text was complete."""
        self._num_gone += 1

    def exposition(self) -> bytes:
        """Prometheus's text format. Waits for the engine's step at hand."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: names are not asked for before there are values."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Of `prometheus_client`: a snapshot of the engine as metrics."""
        now, own = self._snapshot(), [self._model]
        for name, (field, help) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, help, labels=[_LABEL])
            gauge.add_metric(own, getattr(now, field))
            yield gauge
        for name, (field, help) in _COUNTERS.items():
            counter = CounterMetricFamily(name, help, labels=[_LABEL])
            counter.add_metric(own, getattr(now, field))
            yield counter
        position = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by depth.",
            labels=[_LABEL, "position"],
        )  # fmt: skip
        for depth, accepted in enumerate(now.num_accepted_tokens_per_pos):
            position.add_metric([*own, str(depth)], accepted)
        yield position
        success = CounterMetricFamily(
            "vllm:request_success", "Requests by how they ended.", labels=[_LABEL, "finished_reason"]
        )
        for reason, count in now.num_finished.items():
            success.add_metric([*own, "abort" if reason == "cancelled" else reason], count)
        yield success
        answers = CounterMetricFamily("http_requests", "Answers by status.", labels=["status"])
        for status, count in sorted(self._answers.items()):
            answers.add_metric([str(status)], count)
        yield answers
        yield CounterMetricFamily("specdec:client_disconnects", "Clients that left early.", value=self._num_gone)
        for name, (field, help) in _HISTOGRAMS.items():
            yield self._histogram(name, help, getattr(now, field))

    def _histogram(self, name: str, help: str, latency: Latency) -> Metric:
        histogram = HistogramMetricFamily(name, help, labels=[_LABEL])
        bounds = [*map(str, BOUNDS), "+Inf"]
        counts = zip(bounds, [*latency.histogram, latency.count], strict=True)
        histogram.add_metric([self._model], list(counts), latency.count * latency.mean)
        return histogram
