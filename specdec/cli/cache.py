"""`specdec cache`: what the library keeps on this machine, and a way to be rid of it. Only running it imports torch."""

from __future__ import annotations

import json
from typing import Annotated

import typer

cache = typer.Typer(
    help="What this library keeps on this machine: cost tables, compiled passes, and copies of models "
    "from GGUF files in Python packages. Other models are the hub's (`hf cache`).",
    invoke_without_command=True,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@cache.callback()
def show(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List what is kept, where, how large and how old it is. `specdec cache clear` removes it.

    Everything in it is made again when it is needed: cost tables are measured (about a second per pair and batch size),
    passes compiled (some seconds), copies written (half a minute). SPECDEC_CACHE names another folder, or "off".
    """
    if ctx.invoked_subcommand is not None:
        return
    from specdec.verify.folders import cache_folder
    from specdec.verify.kept import kept_files, other_files

    folder = cache_folder()
    found = [] if folder is None else kept_files(folder)
    others = 0 if folder is None else other_files(folder)
    if as_json:
        files = [{"what": one.what, "path": str(one.path), "bytes": one.size, "age_s": round(one.age)} for one in found]
        total = sum(one.size for one in found)
        place = None if folder is None else str(folder)
        typer.echo(json.dumps({"folder": place, "bytes": total, "files": files, "other_files": others}, indent=2))
        return
    if folder is None:
        typer.echo("nothing is kept on disk (SPECDEC_CACHE is off, or this user has no home)")
        return
    typer.echo(f"folder  {folder}")
    for one in found:
        typer.echo(f"{_size(one.size):>9}  {_age(one.age):>9}  {one.what:<13}  {one.path.relative_to(folder)}")
    rest = f"; {others} other files, which are not this library's" if others else ""
    typer.echo(f"{_size(sum(one.size for one in found)):>9}  in {len(found)} files{rest}")


@cache.command()
def clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False, as_json: AsJson = False
) -> None:
    """Remove what `specdec cache` lists, and nothing else in its folder. Running processes are not disturbed."""
    from specdec.verify.folders import cache_folder
    from specdec.verify.kept import kept_files, remove

    folder = cache_folder()
    found = [] if folder is None else kept_files(folder)
    if not yes and found:
        typer.confirm(
            f"Remove {len(found)} files ({_size(sum(one.size for one in found))}) of {folder}?", abort=True, err=True
        )
    failed = {} if folder is None else remove(folder, found)
    gone = [one for one in found if one.path not in failed]
    freed = sum(one.size for one in gone)
    if as_json:
        errors = {str(path): why for path, why in failed.items()}
        typer.echo(json.dumps({"removed": len(gone), "bytes": freed, "errors": errors}, indent=2))
    else:
        typer.echo(f"removed {len(gone)} files, {_size(freed)}")
    for path, why in failed.items():
        typer.echo(f"error: {path}: {why}", err=True)
    if failed:
        raise typer.Exit(1)


def _size(count: int) -> str:
    return f"{count} B" if count < 1000 else f"{count / 1000:.1f} kB" if count < 10**6 else f"{count / 10**6:.1f} MB"


def _age(seconds: float) -> str:
    for length, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{max(0, seconds):.0f} s"
