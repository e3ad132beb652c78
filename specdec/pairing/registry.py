"""Pairs by name, file or folder."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from specdec.pairing.checks import problems
from specdec.pairing.errors import PairError
from specdec.pairing.schema import SCHEMA, Draft, Pair, Target, home_expanded
from specdec.pairing.tables import one_line, read_table, shown, write_table

SHIPPED = Path(__file__).parent.parent / "pairs"
"""One TOML file per shipped pair, and the weights of the small one."""
_NOT_IN_FILES = frozenset({"folder"})


def pair_names() -> list[str]:
    """Names of the shipped pairs."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def find_pair(pair: str | Path) -> Pair:
    """The pair that `pair` means: a TOML file, a folder with `target/` and `draft/` in it, or a shipped pair's name.

    A folder is taken as it is: whether its models load is found out when they are loaded.

    Raises:
        PairError: none of these, or a file with mistakes; all of them are in the message.
    """
    found = read_pair(pair)
    return found if is_pair_folder(home_expanded(Path(pair))) else checked(found)


def checked(pair: Pair) -> Pair:
    """`pair` if it is sound.

    Raises:
        PairError: everything that is wrong with it.
    """
    wrong = problems(pair)
    if wrong:
        raise PairError(f"pair {pair.name!r}: {'; '.join(wrong)}")
    return pair


def read_pair(pair: str | Path) -> Pair:
    """find_pair without the checks that need more than one value.

    Raises:
        PairError: nothing found, no TOML, unknown keys, wrong types, another version of the format.
    """
    path = home_expanded(Path(pair))
    if is_pair_folder(path):
        return Pair(
            name=path.resolve().name or "pair",
            summary="two models in one folder",
            target=Target(path="target"),
            draft=Draft(kind="model", path="draft"),
            dtype="auto",
            folder=path,
        )
    if _is(Path.is_file, path):
        return _read_file(path)
    shipped = SHIPPED / f"{pair}.toml"
    if str(pair) in pair_names():
        return _read_file(shipped)
    raise PairError(_not_found(str(pair)))


def is_pair_folder(folder: Path) -> bool:
    return _is(Path.is_dir, folder / "target") and _is(Path.is_dir, folder / "draft")


def pair_text(pair: Pair) -> str:
    """The pair as a TOML file; read back it is the same pair."""
    import tomli_w  # here: reading pairs, which every command does, needs no writer

    return tomli_w.dumps(pair_table(pair))


def pair_table(pair: Pair) -> dict[str, object]:
    """The pair as nested tables, the version of the format first."""
    return {"schema": SCHEMA, **write_table(pair, skip=_NOT_IN_FILES)}


def pair_of(table: dict[str, Any], where: str) -> Pair:
    """The pair of a table like those of `pair_table`.

    Args:
        where: it came from, for errors.

    Raises:
        PairError: unknown keys, wrong types, another version of the format.
    """
    version = table.get("schema")
    if version != SCHEMA or isinstance(version, bool):
        raise PairError(
            f"{where}: expected schema = {SCHEMA}, got {shown(version)}; this version of specdec reads schema {SCHEMA}"
        )
    return read_table(Pair, table, where, skip=_NOT_IN_FILES)


def _read_file(path: Path) -> Pair:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: no TOML, no UTF-8, numbers of thousands of digits
        raise PairError(f"{path.name}: expected a TOML file: {one_line(str(error))}") from None
    except OSError as error:
        raise PairError(f"{path.name}: could not be read: {error.strerror}") from None
    return replace(pair_of(table, path.name), folder=path.resolve().parent)


def _is(kind: Callable[[Path], bool], path: Path) -> bool:
    """kind: Path.is_file or Path.is_dir; False for what can be no path at all (too long, with a NUL in it)."""
    try:
        return kind(path)
    except (OSError, ValueError):
        return False


def _not_found(pair: str) -> str:
    names = pair_names()
    near = difflib.get_close_matches(pair, names, n=3, cutoff=0.5)
    known = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"pair: expected a shipped pair, a .toml file, or a folder with target/ and draft/ in it, got {shown(pair)}; "
        f"{known}"
        f"`specdec pairs list` shows all {len(names)} shipped pairs"
    )
