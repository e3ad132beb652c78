"""Another distribution called `specdec` shares our import name: where its files lie among ours, one line says so."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "specdec-lm"
"""What pip calls this library."""

THEIRS = "specdec"
"""A distribution of somebody else's on the package index, with the same import name and command."""


def namesake() -> list[str]:
    """One line of advice, or none: has a distribution called `specdec` put files into the package `specdec`?

    (An editable install of this library from before it was called `specdec-lm` has put none there.)
    """
    try:
        other = metadata.distribution(THEIRS)
    except metadata.PackageNotFoundError:
        return []
    if not any(path.parts[0] == THEIRS for path in other.files or []):
        return []
    return [
        f"another distribution called {THEIRS!r} ({other.version}) is installed and its files lie among those of "
        f"{DISTRIBUTION}: pip uninstall {THEIRS} && pip install --force-reinstall --no-deps {DISTRIBUTION}"
    ]
