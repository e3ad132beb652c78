"""`python -m specdec.experiments.accept`: the same as `specdec accept`; the form for `accelerate launch -m`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from specdec.experiments.accept import AcceptOptions, run_from_cli
from specdec.experiments.accept.setting import EXAMPLES
from specdec.experiments.errors import ExperimentError
from specdec.experiments.workloads import SOURCES

DEFAULTS = AcceptOptions()

app = typer.Typer(
    add_completion=False,
    help="Acceptance of drafts: settings x rules x temperatures x prompts. Interrupted runs resume.",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def accept(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted one is resumed.")] = DEFAULTS.out,
    pair: Annotated[str, typer.Option(help="A pair by name, TOML file, or folder with target/ and draft/.")] = str(
        DEFAULTS.pair
    ),
    setting: Annotated[
        list[str] | None, typer.Option("--setting", "-s", help=f"What drafts; repeat for more. {EXAMPLES}")
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="Rules to compare (default: the best few per setting).")
    ] = None,
    max_rules: Annotated[int, typer.Option(help="Rules per setting when none are named.")] = DEFAULTS.max_rules,
    temperature: Annotated[list[float] | None, typer.Option("--temperature", "-t", help="0 is greedy; repeat.")] = None,
    prompts: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(SOURCES)}; repeat.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts of each source.")] = DEFAULTS.num_prompts,
    prompt_tokens: Annotated[int, typer.Option(help="Longer prompts lose their beginning.")] = DEFAULTS.prompt_tokens,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate per turn, at most.")] = DEFAULTS.new_tokens,
    top_k: Annotated[int, typer.Option(help="Of the sampling law; 0 cuts nothing.")] = DEFAULTS.top_k,
    top_p: Annotated[float, typer.Option(help="Of the sampling law; 1 cuts nothing.")] = DEFAULTS.top_p,
    ignore_eos: Annotated[bool, typer.Option(help="Generate on after an end token (texts of one length).")] = True,
    log: Annotated[bool, typer.Option(help="Keep p/q summaries for `accept score`.")] = DEFAULTS.log,
    report: Annotated[bool, typer.Option(help="Write report.html and report.png.")] = DEFAULTS.report,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = DEFAULTS.seed,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = DEFAULTS.threads,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = DEFAULTS.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = DEFAULTS.device,
) -> None:
    """Measure acceptance per position, tokens per step and per second of every setting, rule and temperature."""
    if ctx.invoked_subcommand is not None:
        return
    try:
        options = AcceptOptions(
            out, pair, tuple(setting or DEFAULTS.settings), tuple(rule or ()), max_rules,
            tuple(temperature or DEFAULTS.temperatures), tuple(prompts or DEFAULTS.prompts), num_prompts, prompt_tokens,
            new_tokens, top_k, top_p, ignore_eos, log, report, seed, threads, dtype, device,
        )  # fmt: skip
        options.chosen_pair()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with _one_line():
        raise typer.Exit(run_from_cli(options))


@app.command()
def score(
    folder: Annotated[Path, typer.Argument(help="Folder of a run made with --log.")],
    setting: Annotated[list[str] | None, typer.Option("--setting", "-s", help="What to score; repeat.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="Rules to score (default: all that take the drafts).")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the scores as JSON.")] = None,
) -> None:
    """What other rules, k and trees would have done on the logged texts: no model is run."""
    from specdec.experiments.accept.scores import score_folder

    with _one_line():
        score_folder(folder, setting, rule, json_path)


@app.command(name="report")
def make_report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path | None, typer.Option(help="Where to write (default: report.html in the folder).")] = None,
) -> None:
    """Write the run's report again: one HTML file with everything in it, and its plots as PNG."""
    from specdec.experiments.accept.report import write_report
    from specdec.experiments.accept.store import Store

    with _one_line():
        for path in write_report(Store(folder), out):
            typer.echo(f"wrote {path}")


@contextmanager
def _one_line() -> Iterator[None]:
    """Errors that are meant for the user end the program with one line. The library's own are looked up without
    importing torch for them."""
    try:
        yield
    except Exception as error:
        library = getattr(sys.modules.get("specdec.kv.errors"), "SpecdecError", ExperimentError)
        if not isinstance(error, (ExperimentError, library)):
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
