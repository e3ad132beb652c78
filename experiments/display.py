"""What experiments show while they run and when they are done: progress, tables as text, pictures. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def console(width: int) -> Console:
    """For results: as wide as the terminal, or `width` where the output is none."""
    return Console(width=None if sys.stdout.isatty() else width, markup=False, highlight=False)


@contextmanager
def progress(total: int | None, title: str = "") -> Iterator[Callable[[str], None]]:
    """A bar on stderr. What it yields is called with the name of each of `total` items (None: who knows how many)
    before its work begins."""
    columns = (TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # At most two redraws a second: the bar must not compete with what it watches.
    with Progress(
        *columns, console=Console(stderr=True), refresh_per_second=2, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(title, total=total)
        started = 0

        def begin(name: str) -> None:
            nonlocal started
            bar.update(task, completed=started, description=f"{title} {name}".strip())
            started += 1

        yield begin


def tracked(values: Iterable[T], title: str, name: Callable[[T], str] = lambda value: "") -> Iterator[T]:
    """The values one by one, with a bar."""
    with progress(len(values) if isinstance(values, Sized) else None, title) as begin:
        for value in values:
            begin(name(value))
            yield value


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table that is read as plain text, too: floats with three significant digits, None as a
    dash."""
    cells = [list(head), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def grouped(names: Sequence[object]) -> list[float]:
    """Where the rows of a picture stand: one below the other, half a row of room between neighbours of other names."""
    places, at = [], 0.0
    for number, name in enumerate(names):
        at += 0.0 if number == 0 else 1.0 if name == names[number - 1] else 1.5
        places.append(at)
    return places


def lacking(*packages: str) -> list[str]:
    """Those that are not installed; none of them is imported."""
    return [name for name in packages if find_spec(name) is None]


def new_figure(width: float, height: float) -> Any:
    """A picture of so many inches, without a screen; None, without an error, where matplotlib (extra `viz`) is not."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
