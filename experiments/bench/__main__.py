"""`python -m specdec.experiments.bench`: the same benchmark as `specdec bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from specdec.experiments.bench import BenchOptions, run_from_cli

DEFAULTS = BenchOptions()

app = typer.Typer(add_completion=False)


@app.command()
def bench(
    pair: Annotated[str, typer.Option(help="A pair by name, TOML file, or folder with target/ and draft/.")] = str(
        DEFAULTS.pair
    ),
    num_prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = DEFAULTS.num_prompts,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = DEFAULTS.prompt_tokens,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = DEFAULTS.new_tokens,
    temperature: Annotated[float, typer.Option(help="0 is greedy; outputs are then compared.")] = DEFAULTS.temperature,
    batch: Annotated[int, typer.Option(help="Prompts per call.")] = DEFAULTS.batch,
    threads: Annotated[int, typer.Option(help="Torch threads, fixed for the run.")] = DEFAULTS.threads,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = DEFAULTS.dtype,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = DEFAULTS.device,
    peers: Annotated[list[str] | None, typer.Option(help="Peer or family to run; repeat for more.")] = None,
    rounds: Annotated[int, typer.Option(help="Times every peer sees every prompt.")] = DEFAULTS.rounds,
    seed: Annotated[int, typer.Option(help="Seed of prompts and sampling.")] = DEFAULTS.seed,
    out: Annotated[Path, typer.Option(help="Folder for the JSONL file and the plot.")] = DEFAULTS.out,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, one process per peer.")] = DEFAULTS.memory,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = DEFAULTS.json,
    quick: Annotated[bool, typer.Option("--quick", help="A short check that everything runs.")] = DEFAULTS.quick,
) -> None:
    """Compare specdec with transformers' plain, assisted and prompt-lookup generation on this machine."""
    try:
        options = BenchOptions(
            pair, num_prompts, prompt_tokens, new_tokens, temperature, batch, threads, dtype, device,
            tuple(peers or ()), rounds, seed, out, memory, json, quick,
        )  # fmt: skip
        options.chosen_pair()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    sys.exit(run_from_cli(options))


if __name__ == "__main__":
    app()
