"""The draft/target pairs that ship with the library, by name. Imports no torch."""

from __future__ import annotations

from pathlib import Path

DEFAULT_PAIR = "stdlib-python"
"""The pair used where none is named."""

_SHIPPED = Path(__file__).parent / "pairs"


def shipped_pairs() -> list[str]:
    """Names of the pairs whose weights lie in this installation."""
    if not _SHIPPED.is_dir():
        return []
    return sorted(folder.name for folder in _SHIPPED.iterdir() if _is_pair(folder))


def pair_folder(pair: str | Path = DEFAULT_PAIR) -> Path:
    """The folder with `target/` and `draft/` that `pair`, a path or a shipped pair's name, means.

    Raises:
        ValueError: it is neither.
    """
    for folder in (Path(pair).expanduser(), _SHIPPED / pair):
        if _is_pair(folder):
            return folder
    shipped = ", ".join(shipped_pairs()) or "none installed"
    raise ValueError(
        f"pair: expected a folder with target/ and draft/ in it or a shipped pair ({shipped}), got {str(pair)!r}"
    )


def _is_pair(folder: Path) -> bool:
    return (folder / "target").is_dir() and (folder / "draft").is_dir()
