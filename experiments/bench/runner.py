"""One benchmark run from options to exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as hf_logging

from specdec.experiments.bench.measure import measure
from specdec.experiments.bench.memory import measure_memory
from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.bench.pair import Pair, prompt_batches
from specdec.experiments.bench.peers import all_peers, select
from specdec.experiments.bench.plot import plot
from specdec.experiments.bench.show import show
from specdec.experiments.bench.stats import summarise
from specdec.experiments.provenance import provenance


def run(options: BenchOptions) -> int:
    """Measure, print, write `bench-<date>.jsonl` and `.png` into `options.out`.

    Returns:
        0, or 1 when a greedy output of specdec differs from plain generation's by more than a near tie.

    Raises:
        ValueError: an unknown peer or pair.
    """
    options = options.effective()
    hf_logging.set_verbosity_error()  # generate's advice about every setting would break the progress bar
    torch.set_num_threads(options.threads)
    peers = select(all_peers(options.quick), options.peers)
    skipped = {peer.name: reason for peer in peers if (reason := peer.refusal(options)) is not None}
    if not options.peers:
        peers = [peer for peer in peers if not (peer.optional and peer.name in skipped)]
    runnable = [peer for peer in peers if peer.name not in skipped]
    # Before the run: its own threads would show in the load average.
    source = provenance(
        seed=options.seed,
        threads=options.threads,
        device=options.device,
        pair=options.chosen_pair().name,
        options=options.to_dict(),
    )
    pair = Pair.load(options)
    batches = prompt_batches(pair, options)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}.jsonl"
    written: dict[str, list[dict[str, Any]]] = {}

    def write(kind: str, entries: Iterable[dict[str, Any]]) -> None:
        """Append to the file at once: an interrupted run keeps what it has measured."""
        written[kind] = list(entries)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"kind": kind, **entry}) + "\n" for entry in written[kind])

    write("provenance", [source])
    with _progress() as progress:
        task = progress.add_task("warm-up", total=len(runnable) * (1 + options.rounds * len(batches)))
        runs, found = measure(
            pair, runnable, batches, options, lambda name: progress.update(task, advance=1, description=name)
        )
        write("run", ({**asdict(run), "tokens_per_second": run.tokens_per_second} for run in runs))
        write("difference", map(asdict, found))
        summaries = summarise(peers, runs, found, skipped)
        write("summary", (summary.to_dict() for summary in summaries))
        memory = []
        if options.memory:
            best = [summary.peer for summary in summaries if summary.best]
            task = progress.add_task("memory", total=len(best))
            memory = measure_memory(best, options, lambda name: progress.update(task, advance=1, description=name))
        write("memory", ({**asdict(entry), "added": entry.added} for entry in memory))
    mode = f"temperature {options.temperature:g}" if options.sampling else "greedy"
    title = (
        f"{source['pair']}: {mode}, batch {options.batch}, {options.dtype}, {options.threads} threads, {source['cpu']}"
    )
    drawn = plot(summaries, title, path.with_suffix(".png"))
    if options.json:
        print(json.dumps({kind: entries for kind, entries in written.items() if kind != "run"}))
    else:
        console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
        show(console, summaries, {entry.peer: entry for entry in memory}, found, options, source)
        console.print(f"wrote {path}" + (f" and {path.with_suffix('.png').name}" if drawn else ""))
    return int(any(d.peer.startswith("specdec") and not d.near_tie for d in found))


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # At most two redraws a second: the bar must not compete with what it watches.
    return Progress(
        *columns, console=Console(stderr=True), refresh_per_second=2, transient=True, disable=not sys.stderr.isatty()
    )
