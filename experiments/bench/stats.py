"""From runs to one line per way. Ratios are formed per prompt and round, where both sides met the same machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from statistics import median
from typing import Any

from specdec.experiments.bench.equality import Difference
from specdec.experiments.bench.measure import Run
from specdec.experiments.bench.ways import ASSISTED, PLAIN
from specdec.experiments.intervals import Spread
from specdec.experiments.ways import Way


@dataclass(frozen=True)
class Summary:
    """One way's (`peer`) results, or why it has none (`skipped`).

    speedup: per-prompt ratios to plain generation. speedup_assisted: the same to HF assisted at its best k.
    tokens_per_pass: new tokens per row and forward pass of the target, the prefill included.
    acceptance: accepted / drafted; acceptance_by_position: given that the position was reached (specdec only).
    ms_*: per target pass. `target` and `draft` are inside the models, `outside` is everything else.
    phases: specdec's own clock per step: draft, verify, rest.
    bytes_moved_per_token: weights of the target fetched per emitted token (specdec only; see `SpecReport`).
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
    bytes_moved_per_token: float = 0.0
    different: int = 0
    ties: int = 0
    best: bool = False

    def to_dict(self) -> dict[str, Any]:
        return _written(self)


def ratios(runs: Sequence[Run], reference: Sequence[Run]) -> list[float]:
    """Per prompt, the median over rounds of `reference` seconds / `runs` seconds in the same round."""
    theirs = {(run.prompt, run.round): run.seconds for run in reference}
    found: dict[int, list[float]] = {}
    for run in runs:
        found.setdefault(run.prompt, []).append(theirs[run.prompt, run.round] / run.seconds)
    return [median(values) for values in found.values()]


def summarise(
    ways: Sequence[Way], runs: Sequence[Run], differences: Sequence[Difference], skipped: Mapping[str, str]
) -> list[Summary]:
    """One Summary per way, in the order of `ways`.

    Args:
        skipped: reason by name of ways that did not run.
    """
    by_way: dict[str, list[Run]] = {way.name: [] for way in ways}
    for run in runs:
        by_way[run.peer].append(run)
    out = []
    for way in ways:
        if way.name in skipped:
            out.append(Summary(way.name, way.family, skipped=skipped[way.name]))
            continue
        own = [difference for difference in differences if difference.peer == way.name]
        out.append(_one(way, by_way[way.name], by_way[PLAIN], own))
    best: dict[str, Summary] = {}
    for summary in sorted((one for one in out if one.speedup), key=_speed, reverse=True):
        best.setdefault(summary.family, summary)
    for i, summary in enumerate(out):
        if summary.speedup is not None:
            against = None
            if ASSISTED in best:
                against = Spread.of(ratios(by_way[summary.peer], by_way[best[ASSISTED].peer]))
            out[i] = replace(summary, best=best[summary.family] is summary, speedup_assisted=against)
    return out


@dataclass(frozen=True)
class DomainSummary:
    """One way's results on the prompts of one domain; fields as in Summary."""

    domain: str
    peer: str
    tokens_per_second: Spread
    speedup: Spread
    tokens_per_pass: float

    def to_dict(self) -> dict[str, Any]:
        return _written(self)


def by_domain(ways: Sequence[Way], runs: Sequence[Run], domains: Sequence[str]) -> list[DomainSummary]:
    """One entry per domain and way that ran, in the order of `ways`; none where all prompts are of one domain.

    Args:
        domains: of each prompt.
    """
    known = dict.fromkeys(domains)
    if len(known) < 2:
        return []
    found = []
    for domain in known:
        here = [run for run in runs if domains[run.prompt] == domain]
        plain = [run for run in here if run.peer == PLAIN]
        for way in ways:
            if own := [run for run in here if run.peer == way.name]:
                speed, speedup = Spread.of(run.tokens_per_second for run in own), Spread.of(ratios(own, plain))
                found.append(DomainSummary(domain, way.name, speed, speedup, _per_pass(own)))
    return found


def _written(summary: Summary | DomainSummary) -> dict[str, Any]:
    spreads = {name: value._asdict() for name, value in vars(summary).items() if isinstance(value, Spread)}
    return {**asdict(summary), **spreads}


def _per_pass(runs: Sequence[Run]) -> float:
    return sum(run.tokens / run.rows for run in runs) / sum(run.passes for run in runs)


def _speed(summary: Summary) -> float:
    assert summary.speedup is not None
    return summary.speedup.median


def _one(way: Way, runs: Sequence[Run], plain: Sequence[Run], differences: Sequence[Difference]) -> Summary:
    def per_pass(seconds: Iterable[float]) -> float:
        return median(1e3 * value / run.passes for value, run in zip(seconds, runs, strict=True))

    reports = [run.report for run in runs if run.report is not None]
    summary = Summary(
        peer=way.name,
        family=way.family,
        tokens_per_second=Spread.of(run.tokens_per_second for run in runs),
        speedup=Spread.of(ratios(runs, plain)),
        tokens_per_pass=_per_pass(runs),
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
        bytes_moved_per_token=total("bytes_moved") / max(1, total("num_emitted_tokens")),
        phases=tuple(median(report[name] / report["num_steps"] for report in reports) for name in PHASES),
    )


PHASES = ("ms_draft", "ms_verify", "ms_rest")


def _by_position(reports: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    names = ("num_accepted_tokens_per_pos", "num_reached_per_pos")
    kept, reached = (
        [sum(column) for column in zip_longest(*(report[name] for report in reports), fillvalue=0)] for name in names
    )
    return tuple(k / max(1, r) for k, r in zip_longest(kept, reached, fillvalue=0))
