"""`specdec warmup`: what the first call on a machine would compile and measure, done now."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from specdec.cli import options as cli
from specdec.pairing import PairError, find_pair

NUM_TOKENS = 32
_TEXT = "def main():\n    pass\n\ndef main():\n"


def warmup(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A pair's name or file, or a target (default: as --pair).")
    ] = None,
    target: cli.Target = None,
    draft: cli.Draft = None,
    pair: cli.PairName = None,
    gguf_file: cli.GgufFile = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Rows of later calls; repeat.")] = None,
    dtype: cli.Dtype = "auto",
    device: cli.Device = "auto",
    threads: cli.Threads = None,
) -> None:
    """Compile and measure beforehand what the first call with a model would: later processes find it in the cache.

    With the dtype, device, threads and batch sizes that later calls will have. Greedy and sampled calls are both made.
    """
    if model is not None:
        if target is not None or pair is not None:
            raise typer.BadParameter("expected MODEL, --target or --pair, got several")
        target, pair = (None, model) if _is_pair(model) else (model, None)
    choice = cli.ModelChoice.of(target, draft, pair, gguf_file, None, None, "auto", dtype, device, threads)

    from specdec.cli.loading import load
    from specdec.cli.waiting import spinner
    from specdec.verify.folders import cache_folder

    loaded = load(choice)
    for rows in dict.fromkeys(batch or (1,)):
        for how in ({"do_sample": False}, {"do_sample": True, "seed": 0}):
            with spinner():
                first, again = (_seconds(loaded, rows, how) for _ in range(2))
            kind = "sampled" if how["do_sample"] else "greedy"
            typer.echo(f"batch {rows}, {kind}: first call {first:.1f} s, again {again:.1f} s")
    folder = cache_folder()
    if folder is None:
        typer.echo("SPECDEC_CACHE is off: nothing is kept for later processes", err=True)
    else:
        typer.echo(f"kept in {folder}")


def _is_pair(model: str) -> bool:
    try:
        find_pair(Path(model))
    except PairError:
        return Path(model).suffix == ".toml"  # whose mistakes are told as those of a pair
    return True


def _seconds(loaded: Any, rows: int, how: dict[str, Any]) -> float:
    inputs = {name: value.expand(rows, -1) for name, value in loaded.encode(_TEXT).items()}
    start = perf_counter()
    loaded.speculator.generate(**inputs, max_new_tokens=NUM_TOKENS, **how)
    return perf_counter() - start
