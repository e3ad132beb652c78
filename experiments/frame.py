"""The frame of every experiment: options, which are its command line; where numbers came from; one result file.

An experiment is a frozen dataclass of options and a function that takes it:

    @dataclass(frozen=True)
    class SieveOptions(RunOptions):
        sizes: Annotated[tuple[int, ...], option("Numbers to sieve.")] = (10, 100)

    def run(options: SieveOptions) -> None:
        result = ResultFile(options.out, "sieve", started(options, sizes=options.sizes))
        ...

    main = Command(SieveOptions, run)       # main(["--sizes", "10", "20"]) is what `python -m` does

Imports no torch: `--help` and mistakes in options must be instant.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.shown_errors import ExperimentError, meant_for_the_user

RESULTS = Path(__file__).resolve().parent / "results"
"""Where results that are kept lie."""


def option(help: str, *names: str, **more: Any) -> Any:
    """A field of options as an option of the command line; `names` where they are not `--field-name`."""
    return typer.Option(*names, help=help, **more)


def argument(help: str, **more: Any) -> Any:
    """A field of options that is given by its place."""
    return typer.Argument(help=help, **more)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command can be told. Fields with `option` or `argument` in their annotation are its command line.

    Several values of one option (a tuple) may follow each other: `--sizes 1 2` is `--sizes 1 --sizes 2`.
    """

    def check(self) -> None:
        """What must be right before the run and takes more than a look at the values.

        Raises:
            ValueError: it is not.
        """

    def at_least(self, least: float, *names: str) -> None:
        """Raises ExperimentError: a field that is smaller."""
        for name in names:
            if (value := getattr(self, name)) < least:
                raise ExperimentError(f"expected {name} >= {least}, got {value}")

    def one_of(self, known: Iterable[str], name: str) -> None:
        """Raises ExperimentError: the field, or one of its values, is not known."""
        value = getattr(self, name)
        unknown = set(value if isinstance(value, tuple) else () if value is None else (value,)) - set(known)
        if unknown:
            raise ExperimentError(f"{name}: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")

    def to_dict(self, *left_out: str) -> dict[str, Any]:
        """For provenance: everything but some fields, paths as text."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name not in left_out}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Options of whatever measures something."""

    out: Annotated[Path, option("Folder for the result file.")] = RESULTS
    threads: Annotated[int, option("Torch threads, fixed for the run.")] = 1


class Command:
    """Options and what is run with them. A call is what `python -m` does; `app` is the same for typer."""

    def __init__(self, options: type[Options], run: Callable[[Any], int | None], **parts: Command):
        """`run` returns the exit code, None for 0; its docstring is the help. `parts` are commands behind a word of
        their own; without such a word the options are those of this one."""
        self.run = run
        self.options: list[type[Options]] = [options, *(one for part in parts.values() for one in part.options)]
        self.function = _function(options, run)
        self.app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=CONTEXT)
        if parts:
            self.app.callback(invoke_without_command=True)(self.function)
            for name, part in parts.items():
                self.app.command(name)(part.function)
        else:
            self.app.command()(self.function)

    def __call__(self, arguments: Sequence[str] | None = None) -> int:
        """Run as a program, and return the exit code; errors that are meant for the user are one line.

        Raises:
            SystemExit: a mistake in the arguments, which is already explained.
        """
        several = {name for options in self.options for name in _several(options)}
        try:
            self.app(spread(sys.argv[1:] if arguments is None else arguments, several))
        except SystemExit as end:
            if end.code == 2:
                raise
            return int(end.code or 0)
        except Exception as error:
            if not meant_for_the_user(error):
                raise
            typer.echo(f"error: {error}", err=True)
            return 1
        return 0


OLD_NAMES = {"new-tokens": "max-new-tokens"}
"""Names that options had; they are still understood, and shown nowhere."""


def todays_name(name: str) -> str:
    """Of an option that may be given by its old name."""
    return OLD_NAMES.get(name, name)


CONTEXT = {"help_option_names": ["-h", "--help"], "token_normalize_func": todays_name}
"""What every command understands."""


def _function(options: type[Options], run: Callable[[Any], int | None]) -> Callable[..., None]:
    """What typer reads options, types and defaults from."""

    def command(context: typer.Context, **given: Any) -> None:
        if context.invoked_subcommand is not None:
            return
        try:
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
            asked = options(**values)
            asked.check()
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        raise typer.Exit(run(asked) or 0)

    defaults = {one.name: one.default for one in dataclasses.fields(options)}
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name, (kind, how) in _command_line(options).items():
        default: Any = inspect.Parameter.empty if defaults[name] is dataclasses.MISSING else defaults[name]
        if typing.get_origin(kind) is tuple:
            kind, default = list[typing.get_args(kind)[0]], list(default)  # type: ignore[misc]
        elif kind == str | Path:
            kind, default = str, str(default)
        place, annotation = inspect.Parameter.KEYWORD_ONLY, Annotated[kind, how]
        parameters.append(inspect.Parameter(name, place, default=default, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    command.__doc__ = inspect.getdoc(run)
    return command


def spread(arguments: Sequence[str], several: Iterable[str]) -> list[str]:
    """`--sizes 1 2` as typer has it, `--sizes 1 --sizes 2`, for options that take several values."""
    found: list[str] = []
    option, values = "", 0
    for word in arguments:
        if word.startswith("-") and not word.lstrip("-").replace(".", "", 1).isdecimal():
            option, values = (word if word in several else ""), 0
        elif option:
            found += [option] if values else []
            values += 1
        found.append(word)
    return found


def _command_line(options: type[Options]) -> dict[str, tuple[Any, Any]]:
    """Type and typer's description of each field that has one; arguments and own fields first."""
    hints = typing.get_type_hints(options, include_extras=True)
    found = {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Annotated}
    return {name: (parts[0], parts[1]) for name, parts in found.items()}


def _several(options: type[Options]) -> list[str]:
    """The names of options that take several values."""
    fields = _command_line(options).items()
    several = [(field, how) for field, (kind, how) in fields if typing.get_origin(kind) is tuple]
    return [name for field, how in several for name in how.param_decls or (f"--{field.replace('_', '-')}",)]


def started(options: RunOptions, /, seed: int = 0, device: str = "cpu", **details: Any) -> dict[str, Any]:
    """Begin a run: fix its threads, silence the advice of `transformers`, and say where its numbers will come from.

    Before anything is measured: the run's own work would show in the load average.
    """
    import torch
    from transformers.utils import logging

    from specdec.provenance import provenance

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    return provenance(seed=seed, threads=options.threads, device=device, **details)


class ResultFile:
    """`<name>-<date>.json` in a folder: provenance, and what was found so far.

    `content` is written whole by every `write`: an interrupted run keeps what it has found until then.
    """

    def __init__(self, out: Path, name: str, source: dict[str, Any], **content: Any):
        self.path = dated(out, name, "json")
        self.content: dict[str, Any] = {"provenance": source, **content}

    def write(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def finish(self) -> None:
        self.write()
        print(f"written: {self.path.name}")


def dated(out: Path, name: str, ending: str) -> Path:
    """A new file's path, its folder made."""
    out.mkdir(parents=True, exist_ok=True)
    return out / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}.{ending}"


def append_lines(path: Path, kind: str, entries: Iterable[dict[str, Any]]) -> None:
    """Add entries to a JSONL file, each with its kind, and hand them to the operating system."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"kind": kind, **entry}) + "\n" for entry in entries)
