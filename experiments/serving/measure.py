"""From served requests to figures: every peer on the same workload, alternating, ratios formed per round."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from specdec.experiments.serving.peers import Outcome, Peer, Workload

REFERENCE = "engine-plain"
"""Ratios are to the engine without drafts."""


@dataclass(frozen=True)
class Run:
    """One peer serving one workload once. Latencies in milliseconds; the time to the first token counts from when a
    request is taken up, for it is submitted when there is room for it."""

    peer: str
    round: int
    tokens_per_second: float
    first_token_p50: float
    first_token_p99: float
    inter_token_p50: float
    inter_token_p99: float
    acceptance_length: float | None
    texts: list[list[int]]


def measure(peers: Sequence[Peer], warm: Workload, works: Sequence[Workload], seed: int) -> list[dict[str, Any]]:
    """Warm every peer up, then let all of them serve each of the workloads, one round each.

    Returns:
        one entry per peer: medians over the rounds, ratios to the reference of the same round, and each round's rate.
    """
    for peer in peers:
        peer.serve(warm, seed)
    runs: list[Run] = []
    for i, work in enumerate(works):
        order = list(peers[i % len(peers) :]) + list(peers[: i % len(peers)])
        for peer in order:
            gc.collect()
            runs.append(_run(peer.name, i, peer.serve(work, seed + i)))
    return [_summary(peer.name, runs, works[0]) for peer in peers]


def _run(name: str, round_: int, outcome: Outcome) -> Run:
    served = outcome.served
    begin, end = min(one.start for one in served), max(one.times[-1] for one in served)
    first = [one.times[0] - one.start for one in served]
    between: list[float] = []
    for one in served:
        between += _gaps(one.times)
    return Run(
        peer=name,
        round=round_,
        tokens_per_second=sum(len(one.tokens) for one in served) / (end - begin),
        first_token_p50=1e3 * _at(first, 0.5),
        first_token_p99=1e3 * _at(first, 0.99),
        inter_token_p50=1e3 * _at(between, 0.5),
        inter_token_p99=1e3 * _at(between, 0.99),
        acceptance_length=outcome.acceptance_length,
        texts=[one.tokens for one in served],
    )


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
    ratios = [run.tokens_per_second / reference[run.round].tokens_per_second for run in own if run.round in reference]
    differing = None
    if work.temperature == 0 and reference:
        pairs = (pair for run in own for pair in zip(run.texts, reference[run.round].texts, strict=True))
        differing = sum(a != b for a, b in pairs)
    entry = {"peer": name, "concurrency": work.concurrency, "num_requests": len(work.prompts),
             "prompt_tokens": len(work.prompts[0]), "new_tokens": work.new_tokens}  # fmt: skip
    for field in ("tokens_per_second", "first_token_p50", "first_token_p99", "inter_token_p50", "inter_token_p99"):
        entry[field] = median(asdict(run)[field] for run in own)
    entry["acceptance_length"] = own[-1].acceptance_length
    entry["ratio"] = median(ratios) if ratios else None
    entry["rates"] = [round(run.tokens_per_second, 1) for run in own]
    entry["differing_texts"] = differing
    return entry


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Plain text, one line per peer."""
    head = f"concurrency {entries[0]['concurrency']}, {entries[0]['num_requests']} requests"
    names = ["tokens/s", "x plain", "first ms", "p99", "token ms", "p99", "accepted", "differ"]
    lines = [f"{head:<34}" + "".join(f"{name:>10}" for name in names)]
    for entry in entries:
        values = [
            f"{entry['tokens_per_second']:.0f}",
            "-" if entry["ratio"] is None else f"{entry['ratio']:.2f}",
            *(f"{entry[field]:.1f}" for field in ("first_token_p50", "first_token_p99")),
            *(f"{entry[field]:.1f}" for field in ("inter_token_p50", "inter_token_p99")),
            "-" if entry["acceptance_length"] is None else f"{entry['acceptance_length']:.2f}",
            "-" if entry["differing_texts"] is None else str(entry["differing_texts"]),
        ]
        lines.append(f"{entry['peer']:<34}" + "".join(f"{value:>10}" for value in values))
    return "\n".join(lines)
