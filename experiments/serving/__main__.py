"""`python -m specdec.experiments.serving`: throughput and latency of an engine, against `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False)


@app.command()
def serving(
    pair: Annotated[str, typer.Option(help="Folder with target/ and draft/, or a shipped pair.")] = "stdlib-python",
    concurrency: Annotated[str, typer.Option(help="Requests under way at once, e.g. 1,4,8,16.")] = "1,4,8,16",
    requests: Annotated[int, typer.Option(help="Requests per run; 0 = four times the concurrency.")] = 0,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    k: Annotated[int, typer.Option(help="Length of drafted chains.")] = 4,
    rounds: Annotated[int, typer.Option(help="Times every peer serves every workload.")] = 3,
    peers: Annotated[str, typer.Option(help="Names or families of peers, separated by commas; empty = all.")] = "",
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of prompts and sampling.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file.")] = Path("serving-results"),
) -> None:
    """Serve the same prompts in every way, alternating, in one process; print and keep what was measured.

    Every round has prompts of its own: nobody finds those of an earlier round among his shared prefixes.
    """
    import torch
    from transformers.utils import logging as hf_logging

    from specdec.experiments.bench.options import BenchOptions
    from specdec.experiments.bench.pair import Pair
    from specdec.experiments.corpus import held_out_prompts
    from specdec.experiments.provenance import provenance
    from specdec.experiments.serving.measure import measure, table
    from specdec.experiments.serving.peers import ContinuousBatches, OurEngine, Peer, StaticBatches, Workload

    hf_logging.set_verbosity_error()
    torch.set_num_threads(threads)
    try:
        levels = [int(level) for level in concurrency.split(",")]
        if min([*levels, k, rounds, prompt_tokens, threads]) < 1 or new_tokens < 2 or requests < 0:
            raise ValueError(f"expected positive numbers and new_tokens >= 2, got concurrency={concurrency}, k={k}")
        options = BenchOptions(pair=pair, threads=threads)
        name = options.chosen_pair().name
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    source = provenance(seed=seed, threads=threads, pair=name)
    loaded = Pair.load(options)
    makers: dict[str, Callable[[str], Peer]] = {
        "engine": lambda name: OurEngine(name, loaded, k, True, max(levels)),
        f"engine-k{k}": lambda name: OurEngine(name, loaded, k, False, max(levels)),
        "engine-plain": lambda name: OurEngine(name, loaded, None, False, max(levels)),
        "hf-generate": lambda name: StaticBatches(loaded.target),
        "hf-generate-batch": lambda name: ContinuousBatches(loaded.target),
    }
    wanted = [name for name in peers.split(",") if name]
    unknown = [name for name in wanted if name not in makers]
    if unknown:
        raise typer.BadParameter(f"peers: unknown {', '.join(unknown)}; expected some of {', '.join(makers)}")
    chosen = [make(name) for name, make in makers.items() if not wanted or name in wanted]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"serving-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    result: dict[str, Any] = {"provenance": source, "temperature": temperature, "runs": []}
    for level in levels:
        count = requests or 4 * level
        prompts = held_out_prompts(loaded.tokenizer, level + rounds * count, prompt_tokens, seed=seed)
        warm, rest = Workload(prompts[:level], level, new_tokens, temperature), prompts[level:]
        works = [warm._replace(prompts=rest[i * count : (i + 1) * count]) for i in range(rounds)]
        for entry in measure(chosen, warm, works, seed):
            result["runs"].append(entry)
        path.write_text(json.dumps(result, indent=1) + "\n")  # what is measured is kept, whatever happens next
        print(table([entry for entry in result["runs"] if entry["concurrency"] == level]), flush=True)
    print(f"wrote {path.name}")


if __name__ == "__main__":
    app()
