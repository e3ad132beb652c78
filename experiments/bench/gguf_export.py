"""`python -m specdec.experiments.bench.gguf_export --pair P --out DIR`: both models of a pair for llama.cpp."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from specdec.experiments.frame import Command, Options, option
from specdec.shipped import DEFAULT_PAIR, pair_folder


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """What is exported, and where to."""

    out: Annotated[Path, option("Folder for target-<dtype>.gguf and draft-<dtype>.gguf.")]
    pair: Annotated[str | Path, option("Folder with target/ and draft/, or a shipped pair's name.")] = DEFAULT_PAIR
    dtype: Annotated[str, option("f32 or f16.")] = "f32"

    def check(self) -> None:
        pair_folder(self.pair)


def run(options: ExportOptions) -> None:
    """Write both models of a pair as GGUF files."""
    from specdec.pairing.gguf import export_pair

    for path in export_pair(pair_folder(options.pair), options.out, options.dtype):
        typer.echo(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")


main = Command(ExportOptions, run)

if __name__ == "__main__":
    sys.exit(main())
