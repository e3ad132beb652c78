"""From runs to one line per peer. Ratios are formed per prompt and round, where both sides met the same machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median, quantiles
from typing import Any, NamedTuple

from specdec.experiments.bench.equality import Difference
from specdec.experiments.bench.measure import Run
from specdec.experiments.bench.peers import ASSISTED, PLAIN, Peer


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        values = sorted(values)
        if len(values) < 2:
            return Spread(values[0], values[0], values[0])
        low, middle, high = quantiles(values, n=4, method="inclusive")
        return Spread(middle, low, high)


@dataclass(frozen=True)
class Summary:
    """One peer's results, or why it has none (`skipped`).

    speedup: per-prompt ratios to plain generation. speedup_assisted: the same to HF assisted at its best k.
    tokens_per_pass: new tokens per row and forward pass of the target, the prefill included.
    acceptance: accepted / drafted; acceptance_by_position: given that the position was reached (specdec only).
    ms_*: per target pass. `target` and `draft` are inside the models, `outside` is everything else.
    phases: specdec's own clock per step: draft, verify, rest.
    different, ties: greedy rows that are not plain generation's, and how many of those are near ties.
    best: the family's fastest setting.
    """

    peer: str
    family: str
    skipped: str | None = None
    tokens_per_second: Spread | None = None
    speedup: Spread | None = None
    speedup_assisted: Spread | None = None
    tokens_per_pass: float = 0.0
    acceptance: float | None = None
    acceptance_by_position: tuple[float, ...] = ()
    ms_target: float = 0.0
    ms_draft: float = 0.0
    ms_outside: float = 0.0
    phases: tuple[float, float, float] | None = None
    different: int = 0
    ties: int = 0
    best: bool = False

    def to_dict(self) -> dict[str, Any]:
        spread = {
            name: None if value is None else value._asdict()
            for name in ("tokens_per_second", "speedup", "speedup_assisted")
            for value in (getattr(self, name),)
        }
        return {**asdict(self), **spread}


def ratios(runs: Sequence[Run], reference: Sequence[Run]) -> list[float]:
    """Per prompt, the median over rounds of `reference` seconds / `runs` seconds in the same round."""
    theirs = {(run.prompt, run.round): run.seconds for run in reference}
    found: dict[int, list[float]] = {}
    for run in runs:
        found.setdefault(run.prompt, []).append(theirs[run.prompt, run.round] / run.seconds)
    return [median(values) for values in found.values()]


def summarise(
    peers: Sequence[Peer], runs: Sequence[Run], differences: Sequence[Difference], skipped: Mapping[str, str]
) -> list[Summary]:
    """One Summary per peer, in the order of `peers`.

    Args:
        skipped: reason by name of peers that did not run.
    """
    by_peer: dict[str, list[Run]] = {peer.name: [] for peer in peers}
    for run in runs:
        by_peer[run.peer].append(run)
    out = []
    for peer in peers:
        if peer.name in skipped:
            out.append(Summary(peer.name, peer.family, skipped=skipped[peer.name]))
            continue
        own = [difference for difference in differences if difference.peer == peer.name]
        out.append(_one(peer, by_peer[peer.name], by_peer[PLAIN], own))
    best = {family: max((s for s in out if s.family == family and s.speedup), key=_speed, default=None)
            for family in {peer.family for peer in peers}}  # fmt: skip
    assisted = best.get(ASSISTED)
    for i, summary in enumerate(out):
        if summary.speedup is None:
            continue
        against = None
        if assisted is not None:
            against = Spread.of(ratios(by_peer[summary.peer], by_peer[assisted.peer]))
        out[i] = replace(summary, best=best[summary.family] is summary, speedup_assisted=against)
    return out


def _speed(summary: Summary) -> float:
    assert summary.speedup is not None
    return summary.speedup.median


def _one(peer: Peer, runs: Sequence[Run], plain: Sequence[Run], differences: Sequence[Difference]) -> Summary:
    def per_pass(seconds: Iterable[float]) -> float:
        return median(1e3 * value / run.passes for value, run in zip(seconds, runs, strict=True))

    reports = [run.report for run in runs if run.report is not None]
    summary = Summary(
        peer=peer.name,
        family=peer.family,
        tokens_per_second=Spread.of(run.tokens_per_second for run in runs),
        speedup=Spread.of(ratios(runs, plain)),
        tokens_per_pass=sum(run.tokens / run.rows for run in runs) / sum(run.passes for run in runs),
        ms_target=per_pass(run.target_seconds for run in runs),
        ms_draft=per_pass(run.draft_seconds for run in runs),
        ms_outside=per_pass(run.seconds - run.target_seconds - run.draft_seconds for run in runs),
        different=len(differences),
        ties=sum(difference.near_tie for difference in differences),
    )
    if not reports:
        return summary

    def total(name: str) -> Any:
        return sum(report[name] for report in reports)

    return replace(
        summary,
        acceptance=total("num_accepted_tokens") / max(1, total("num_draft_tokens")),
        acceptance_by_position=_by_position(reports),
        phases=tuple(median(report[name] / report["num_steps"] for report in reports) for name in PHASES),
    )


PHASES = ("ms_draft", "ms_verify", "ms_rest")


def _by_position(reports: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    depth = max(len(report["num_reached_per_pos"]) for report in reports)

    def column(name: str, d: int) -> int:
        return sum(report[name][d] for report in reports if d < len(report[name]))

    return tuple(
        column("num_accepted_tokens_per_pos", d) / max(1, column("num_reached_per_pos", d)) for d in range(depth)
    )
