"""The typer application: one sub-command per module, registered here."""

from __future__ import annotations

import typer

import specdec

app = typer.Typer(
    name="specdec",
    help="Speculative decoding for Hugging Face causal language models, with exactly the same output.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"specdec {specdec.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Entry point of the `specdec` script."""
    app()
