"""One benchmark run from options to exit code."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from specdec.experiments.bench.measure import measure
from specdec.experiments.bench.memory import measure_memory
from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.bench.plot import plot
from specdec.experiments.bench.show import show
from specdec.experiments.bench.stats import by_domain, summarise
from specdec.experiments.bench.ways import PLAIN, all_ways
from specdec.experiments.display import console, progress
from specdec.experiments.frame import append_lines, dated, started
from specdec.experiments.ways import select
from specdec.prompt_files import how_asked

NO_MODEL = "the pair has no draft model; give --draft"


def run(options: BenchOptions) -> int:
    """Measure, print, write `bench-<date>.jsonl` and `.png` into `options.out`.

    Returns:
        0, or 1 when a greedy output of specdec differs from plain generation's by more than a near tie.

    Raises:
        ValueError: an unknown way or pair.
    """
    options = options.effective()
    ways = select(all_ways(options.quick, options.k), options.peers, always=PLAIN)
    lacking = {way.name: NO_MODEL for way in ways if way.needs_model and not options.has_draft_model}
    skipped = lacking | {way.name: reason for way in ways if (reason := way.refusal(options)) is not None}
    if not options.peers:
        ways = [way for way in ways if not (way.name in lacking or (way.optional and way.name in skipped))]
    runnable = [way for way in ways if way.name not in skipped]
    pair = options.chosen_pair().name
    source = started(options, options.seed, options.device, pair=pair, options=options.to_dict())
    models = options.load()
    asked = options.prompts(models)
    options = options.of(asked)
    batches = [one.ids for one in asked]
    path = dated(options.out, "bench", "jsonl")
    written: dict[str, list[dict[str, Any]]] = {}

    def write(kind: str, entries: Iterable[dict[str, Any]]) -> None:
        """At once: an interrupted run keeps what it has measured."""
        written[kind] = list(entries)
        append_lines(path, kind, written[kind])

    write("provenance", [source])
    write("prompt", ({**one._asdict(), "prompt": i, "ids": one.ids.tolist()} for i, one in enumerate(asked)))
    with progress(len(runnable) * (1 + options.rounds * len(batches))) as advance:
        runs, found = measure(models, runnable, batches, options, advance)
    write("run", ({**asdict(run), "tokens_per_second": run.tokens_per_second} for run in runs))
    write("difference", map(asdict, found))
    summaries = summarise(ways, runs, found, skipped)
    write("summary", (summary.to_dict() for summary in summaries))
    domains = by_domain(ways, runs, [one.domain for one in asked])
    write("domain", (domain.to_dict() for domain in domains))
    best = [summary.peer for summary in summaries if summary.best and options.memory]
    with progress(len(best), "memory of") as advance:
        memory = measure_memory(best, options, advance)
    write("memory", ({**asdict(entry), "added": entry.added} for entry in memory))
    title = (
        f"{source['pair']}: {options.mode}, batch {options.batch}, {options.dtype}, {options.threads} threads, "
        f"{source['cpu']}"
    )
    drawn = plot(summaries, title, path.with_suffix(".png"))
    if options.json:
        print(json.dumps({kind: entries for kind, entries in written.items() if kind not in ("run", "prompt")}))
    else:
        page = console(160)
        if options.has_own_prompts:
            page.print(how_asked(models.tokenizer, options.chat))
        show(page, summaries, domains, {entry.peer: entry for entry in memory}, found, options, source)
        picture = path.with_suffix(".png").name if drawn else "no picture: pip install 'specdec-lm[viz]'"
        page.print(f"wrote {path}" + (f" and {picture}" if drawn else f" ({picture})"))
    return int(any(d.peer.startswith("specdec") and not d.near_tie for d in found))
