"""From served requests to figures: every peer on the same workload, alternating, ratios formed per round."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import process_time
from typing import Any

from specdec.experiments.clock import rotated
from specdec.experiments.display import table
from specdec.experiments.serving.ways import Outcome, Serve, Workload

REFERENCE = "engine-plain"
"""Ratios are to the engine without drafts."""
ENGINE_OF = {"specdec-serve": "engine", "specdec-serve-plain": "engine-plain"}
"""Servers, and the engine inside each: what HTTP costs is the difference."""


FIGURES = ("tokens_per_second", "first_token_p50", "first_token_p99", "inter_token_p50", "inter_token_p99")
"""Latencies in milliseconds; the time to the first token counts from when a request is taken up, for it is submitted
when there is room for it."""


@dataclass(frozen=True)
class Run:
    """One peer serving one workload once. figures: of FIGURES. cpu_seconds: of the process that served, all threads."""

    peer: str
    round: int
    figures: dict[str, float]
    acceptance_length: float | None
    texts: list[list[int]]
    by_ids: bool
    cpu_seconds: float

    @property
    def rate(self) -> float:
        return self.figures["tokens_per_second"]


def measure(peers: Mapping[str, Serve], warm: Workload, works: Sequence[Workload], seed: int) -> list[dict[str, Any]]:
    """Warm every peer up, then let all of them serve each of the workloads, one round each.

    Returns:
        one entry per peer: medians over the rounds, ratios to the reference of the same round, and each round's rate.
    """
    for serve in peers.values():
        serve(warm, seed)
    runs: list[Run] = []
    for i, work in enumerate(works):
        for name in rotated(list(peers), i):
            gc.collect()
            begin = process_time()
            outcome = peers[name](work, seed + i)
            own = process_time() - begin
            runs.append(_run(name, i, outcome, own if outcome.cpu_seconds is None else outcome.cpu_seconds))
    return [_summary(name, runs, works[0]) for name in peers]


def _run(name: str, round_: int, outcome: Outcome, cpu_seconds: float) -> Run:
    served = outcome.served
    begin, end = min(one.start for one in served), max(one.times[-1] for one in served)
    texts = [one.tokens for one in served]
    first = [1e3 * (one.times[0] - one.start) for one in served]
    between = [1e3 * gap for one in served for gap in _gaps(one.times)]
    latencies = [_at(of, share) for of in (first, between) for share in (0.5, 0.99)]
    values = [sum(map(len, texts)) / (end - begin), *latencies]
    figures = dict(zip(FIGURES, values, strict=True))
    return Run(name, round_, figures, outcome.acceptance_length, texts, outcome.by_ids, cpu_seconds)


def _gaps(times: Sequence[float]) -> list[float]:
    """Time per token after the first: tokens that come together share the wait for them."""
    gaps, i = [], 0
    while i + 1 < len(times):
        together = next((j for j in range(i + 1, len(times)) if times[j] > times[i + 1]), len(times))
        gaps += [(times[i + 1] - times[i]) / (together - i - 1)] * (together - i - 1)
        i = together - 1
    return gaps


def _at(values: Sequence[float], quantile: float) -> float:
    ordered = sorted(values)
    return ordered[round(quantile * (len(ordered) - 1))]


def _summary(name: str, runs: Sequence[Run], work: Workload) -> dict[str, Any]:
    own = [run for run in runs if run.peer == name]
    reference = {run.round: run for run in runs if run.peer == REFERENCE}
    ratios = [run.rate / reference[run.round].rate for run in own if run.round in reference]
    engine = {run.round: run for run in runs if run.peer == ENGINE_OF.get(name)}
    paired = [(run, engine[run.round]) for run in own if run.round in engine]
    differing = None
    if work.temperature == 0 and reference and own[0].by_ids:
        pairs = (pair for run in own for pair in zip(run.texts, reference[run.round].texts, strict=True))
        differing = sum(a != b for a, b in pairs)
    return {
        "peer": name, "concurrency": work.concurrency, "num_requests": len(work.prompts),
        "prompt_tokens": len(work.prompts[0]), "new_tokens": work.new_tokens,
        **{figure: median(run.figures[figure] for run in own) for figure in FIGURES},
        "acceptance_length": own[-1].acceptance_length, "ratio": median(ratios) if ratios else None,
        "cpu_seconds": median(run.cpu_seconds for run in own),
        "rate_to_engine": median(run.rate / other.rate for run, other in paired) if paired else None,
        "cpu_to_engine": median(run.cpu_seconds / other.cpu_seconds for run, other in paired) if paired else None,
        "rates": [round(run.rate, 1) for run in own], "differing_texts": differing,
    }  # fmt: skip


def lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """A table, one line per peer."""
    head = f"concurrency {entries[0]['concurrency']}, {entries[0]['num_requests']} requests"
    names = [
        head,
        "tokens/s",
        "x plain",
        "first ms",
        "p99",
        "token ms",
        "p99",
        "accepted",
        "differ",
        "CPU s",
        "x engine",
        "CPU",
    ]
    keys = ("peer", FIGURES[0], "ratio", *FIGURES[1:], "acceptance_length", "differing_texts", "cpu_seconds",
            "rate_to_engine", "cpu_to_engine")  # fmt: skip
    return table(names, ([entry[key] for key in keys] for entry in entries))
