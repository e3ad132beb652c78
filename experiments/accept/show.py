"""The table of a run on a terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from specdec.experiments.accept.metrics import CellStats, Runs

COLUMNS = (
    "setting", "rule", "T", "nodes", "tokens/step", "kept", "by position", "alpha", "alpha*", "tok/s", "vs plain",
)  # fmt: skip


def show(console: Console, runs: Runs) -> None:
    """One line per cell."""
    table = Table(title="Acceptance", title_justify="left")
    for name in COLUMNS:
        left = name in ("setting", "rule", "by position")
        table.add_column(name, no_wrap=name != "setting", overflow="fold", justify="left" if left else "right")
    previous = None
    for cell in runs.cells():
        stats = runs.stats(cell)
        if stats is None:
            continue
        if previous is not None and previous != cell.temperature:
            table.add_section()
        previous = cell.temperature
        table.add_row(*row(stats))
    console.print(table)
    console.print(
        "tokens/step: emitted per pass of the target, ± the 95 % interval over prompts (Student's). kept: of the "
        "drafted tokens. alpha: first drafted\nlevel kept; alpha*: the most any rule could keep there (same draft law, "
        "same roots). vs plain: median over prompts of the speed against draft-less\ndecoding of the same prompt "
        "[quartiles]"
    )


def row(stats: CellStats) -> list[str]:
    """A cell's figures as text, in the order of COLUMNS."""
    cell = stats.cell
    return [
        str(cell.setting),
        "-" if cell.is_plain else cell.rule,
        f"{cell.temperature:g}",
        "-" if cell.is_plain else f"{stats.drafted_per_step:.1f}",
        stats.tokens_per_step.text(),
        text(stats.acceptance_rate),
        " ".join(text(rate).removeprefix("0") for rate in stats.per_position[:6]) or "-",
        text(stats.alpha_there if stats.alpha_star == stats.alpha_star else stats.alpha),
        text(stats.alpha_star),
        f"{stats.tokens_per_second:.0f}",
        "-" if stats.speedup is None else stats.speedup.text("{:.2f}"),
    ]


def text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
