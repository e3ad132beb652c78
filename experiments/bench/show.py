"""Results for people: the table and the sentences under it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from specdec.experiments.bench.equality import Difference
from specdec.experiments.bench.memory import Memory
from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.bench.stats import DomainSummary, Summary
from specdec.experiments.bench.ways import UNDRAFTED


def show(
    console: Console,
    summaries: Sequence[Summary],
    domains: Sequence[DomainSummary],
    memory: Mapping[str, Memory],
    differences: Sequence[Difference],
    options: BenchOptions,
    source: Mapping[str, Any],
) -> None:
    """Print everything a reader needs to believe or doubt the numbers."""
    console.print(
        f"{options.mode}, batch {options.batch}, {options.num_prompts} prompts x {options.prompt_tokens} tokens, "
        f"{options.new_tokens} new tokens, {options.rounds} rounds, {options.dtype}, {options.threads} threads"
    )
    console.print(f"{source['gpu'] or source['cpu']}, torch {source['versions']['torch']}, "
                  f"transformers {source['versions']['transformers']}")  # fmt: skip
    console.print(_speed_table(summaries, options))
    if domains:
        console.print(_domain_table(summaries, domains))
    console.print(_cost_table(summaries, memory))
    for line in verdict_lines(summaries, differences, options):
        console.print(line)


def _speed_table(summaries: Sequence[Summary], options: BenchOptions) -> Table:
    columns = ("tokens/s", "vs HF plain", "vs HF assisted", "tok/pass", "accepted", "by position", "equal")
    table = _table("Speed (median [quartiles]; * = family's best setting)", columns)
    for s in summaries:
        if s.skipped is not None:
            table.add_row(s.peer, "n/a", *[""] * 6)
            continue
        equal = "-" if options.temperature else "yes" if not s.different else f"{s.different} differ, {s.ties} ties"
        spreads = ((s.tokens_per_second, "{:.1f}"), (s.speedup, "{:.2f}"), (s.speedup_assisted, "{:.2f}"))
        table.add_row(
            s.peer + (" *" if s.best else ""), *("-" if one is None else one.text(form) for one, form in spreads),
            f"{s.tokens_per_pass:.2f}", "-" if s.acceptance is None else f"{s.acceptance:.2f}",
            " ".join(f"{rate:.2f}" for rate in s.acceptance_by_position[:5]) or "-", equal,
            style="bold" if s.best else None,
        )  # fmt: skip
    return table


def _domain_table(summaries: Sequence[Summary], domains: Sequence[DomainSummary]) -> Table:
    names = list(dict.fromkeys(one.domain for one in domains))
    table = _table("Tokens/s by kind of prompt (median [quartiles])", names)
    found = {(one.peer, one.domain): one.tokens_per_second.text("{:.1f}") for one in domains}
    for s in summaries:
        if s.best:
            table.add_row(s.peer, *(found[s.peer, name] for name in names))
    return table


def _cost_table(summaries: Sequence[Summary], memory: Mapping[str, Memory]) -> Table:
    columns = ("in target", "in draft", "outside", "draft/verify/rest", "peak RSS", "of it in the call")
    table = _table("Where the time goes (ms per target pass), and memory (MiB)", columns)
    for s in summaries:
        if not s.best:
            continue
        used = memory.get(s.peer)
        table.add_row(
            s.peer, *(f"{ms:.2f}" for ms in (s.ms_target, s.ms_draft, s.ms_outside)),
            "-" if s.phases is None else " / ".join(f"{ms:.2f}" for ms in s.phases),
            *(("-", "-") if used is None else (f"{used.peak:.0f}", f"{used.added:.1f}")),
        )  # fmt: skip
    return table


def verdict_lines(summaries: Sequence[Summary], differences: Sequence[Difference], options: BenchOptions) -> list[str]:
    """The run in sentences: who could not run, whose outputs differ and why, how fast specdec is."""
    lines = [f"{s.peer}: n/a ({s.skipped})" for s in summaries if s.skipped is not None]
    if not options.temperature and not differences:
        lines.append("Every greedy output is equal to HF plain's, token for token.")
    for d in differences:
        kind = "a near tie" if d.near_tie else "NOT a tie"
        lines.append(
            f"{d.peer}: prompt {d.prompt} row {d.row} leaves HF plain at new token {d.position}: "
            f"logits {d.gap:.1e} apart, {kind}"
        )
    alone = next((s.speedup for s in summaries if s.peer == UNDRAFTED), None)
    for s in summaries:
        if not (s.best and s.family.startswith("specdec")) or s.speedup is None:
            continue
        line = f"{s.peer}: {s.speedup.median:.2f}x HF plain"
        if alone is not None and s.peer != UNDRAFTED:
            line += f", {s.speedup.median / alone.median:.2f}x specdec without a drafter"
        if s.speedup_assisted is not None:
            best = next(other for other in summaries if other.best and other.family == "hf-assisted")
            line += f", {s.speedup_assisted.median:.2f}x {best.peer} (its best setting)"
        if s.bytes_moved_per_token:
            line += f", {s.bytes_moved_per_token / 2**20:.1f} MiB of weights fetched per token"
        lines.append(line)
    return lines


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column("peer", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
