"""Tables to frozen dataclasses and back; what a table may hold is what the dataclass declares, nothing else."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, TypeVar

from specdec.pairing.errors import PairError

Record = TypeVar("Record")


def read_table(kind: type[Record], table: Any, where: str, skip: frozenset[str] = frozenset()) -> Record:
    """`table` as a `kind`, strictly.

    Args:
        where: how messages name the table, e.g. "llama.toml: [target]".
        skip: fields of `kind` that a file may not set.

    Raises:
        PairError: not a table, an unknown key, a missing one, or a value of another type.
    """
    if not isinstance(table, dict):
        raise PairError(f"{where}: expected a table, got {typed(table)}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name not in skip}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key[:80], fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PairError(f"{where}: unknown key {shown(key)}, expected some of {', '.join(fields)}{hint}")
    missing = [name for name, field in fields.items() if _required(field) and name not in table]
    if missing:
        raise PairError(f"{where}: {', '.join(missing)} missing; add {'it' if len(missing) == 1 else 'them'}")
    return kind(**{key: _value(hints[key], value, where, key) for key, value in table.items()})


def write_table(record: Any, skip: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The inverse of read_table: what differs from the defaults, ready for TOML or JSON."""
    table: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name in skip or value is None or (not _required(field) and value == field.default):
            continue
        if dataclasses.is_dataclass(value):
            value = write_table(value)
        elif isinstance(value, tuple):
            value = [write_table(item) if dataclasses.is_dataclass(item) else item for item in value]
        table[field.name] = value
    return table


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    """`value` checked against the declared type (an alternative of None is the absence of the key)."""
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return read_table(hint, value, f"{where}: [{key}]")
    if typing.get_origin(hint) is tuple:
        (item,) = (part for part in typing.get_args(hint) if part is not Ellipsis)
        if not isinstance(value, list):
            raise PairError(f"{where}: {key}: expected an array, got {typed(value)}")
        return tuple(_value(item, entry, where, f"{key}[{index}]") for index, entry in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**300:
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise PairError(f"{where}: {key}: expected {_NAMES[hint]}, got {typed(value)}")
    return value


_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def typed(value: Any) -> str:
    return f"{type(value).__name__} {shown(value)}"


def one_line(text: str) -> str:
    """`text` with everything escaped that is not plainly readable: line breaks of all kinds, control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shown(value: Any) -> str:
    """`value` in a message: never longer than a line, whatever it is."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # integers of thousands of digits in it
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
