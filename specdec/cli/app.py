"""The typer application: one sub-command per module, registered here, and what happens to their errors."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import specdec
from specdec.cli.cache import cache
from specdec.cli.chat import chat
from specdec.cli.check import check
from specdec.cli.doctor import doctor
from specdec.cli.generate import generate
from specdec.cli.pairs import pairs
from specdec.cli.serve import serve
from specdec.cli.warmup import warmup
from specdec.experiments.accept.__main__ import main as accept
from specdec.experiments.bench.__main__ import main as bench
from specdec.experiments.frame import CONTEXT
from specdec.shown_errors import meant_for_the_user

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it (128 + SIGINT). Usage errors exit with 2, everything else with 1."""

SPIN_COUNT = "10000"
"""Turns a waiting OpenMP thread spins before it sleeps. With libgomp's 300000 a thread that waits keeps the one it
waits for from running when anything else runs on the machine. Measured on two cores: two busy neighbours bring the
default to under 3 tokens per second and this to about 20; on the idle machine this costs about a tenth (131 against
150)."""


class _Commands(TyperGroup):
    """Turns errors that are meant for the user into one line on stderr; bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if ctx.params.get("traceback") or not meant_for_the_user(error):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="specdec",
    cls=_Commands,
    help="Speculative decoding for Hugging Face causal language models, with exactly the same output.",
    no_args_is_help=True,
    add_completion=False,
    context_settings=CONTEXT,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command("bench")(bench.function)
app.command()(check)
app.add_typer(accept.app, name="accept")
app.command()(doctor)
app.command()(warmup)
app.add_typer(pairs, name="pairs")
app.add_typer(cache, name="cache")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"specdec {specdec.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    # A benchmark asks for an idle machine and measures it as it is. libgomp reads this once, when torch is imported.
    if ctx.invoked_subcommand != "bench" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def main() -> None:
    """Entry point of the `specdec` script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the program
    app()
