"""The plots of a report, one function each: what to draw goes in, axes are drawn on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specdec.experiments.accept.metrics import CellStats, Runs
from specdec.experiments.display import grouped
from specdec.experiments.intervals import Spread, share_interval

COLOURS = ("#1f6fb4", "#d98032", "#3a923a", "#b5352f", "#7a5bb5", "#8c6d4f", "#c65ba8", "#6e6e6e", "#a3a832", "#2aa6b8")
MARKERS = "osD^vPX*"
GREY = "#555555"


@dataclass(frozen=True)
class Curve:
    """Speed by k at one temperature. measured: speed-up (median, quartiles) at `measured_ks`; predicted: at `ks`."""

    temperature: float
    measured_ks: list[int]
    measured: list[Spread]
    ks: list[int]
    predicted: list[float]


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def by_position(axes: Any, cells: Sequence[CellStats], title: str) -> None:
    """Acceptance at each depth, of the steps that reached it."""
    for number, stats in enumerate(cells):
        rates = [rate for rate, seen in zip(stats.per_position, stats.reached, strict=False) if seen >= 10]
        if rates:
            beside = 0.06 * (number - (len(cells) - 1) / 2)  # or intervals of several settings hide each other
            axes.errorbar([depth + beside for depth in range(1, len(rates) + 1)], rates, elinewidth=0.7, capsize=1.5,
                          yerr=_whiskers(rates, stats.reached), marker=MARKERS[number % 8], color=colour(number),
                          markersize=4, linewidth=1.4, label=f"{stats.cell.setting} ({stats.cell.rule})")  # fmt: skip
    axes.set_ylim(0, 1.03)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _dress(axes, title, "depth in the draft", "kept, once reached")
    _legend(axes)


def speed_by_k(axes: Any, curves: Sequence[Curve]) -> None:
    """Measured speed-up of chains by k, and what the model of costs and acceptance says of every k."""
    for number, curve in enumerate(curves):
        axes.plot(curve.ks, curve.predicted, color=colour(number), linewidth=1.4)
        middle = np.array([value[0] for value in curve.measured])
        low, high = (np.array([value[i] for value in curve.measured]) for i in (1, 2))
        beside = 0.05 * (number - (len(curves) - 1) / 2)  # or bars of several temperatures hide each other
        axes.errorbar(np.array(curve.measured_ks) + beside, middle, yerr=[middle - low, high - middle],
                      fmt=MARKERS[number % 8], color=colour(number), capsize=3, markersize=5, linewidth=0, elinewidth=1,
                      label=f"T = {curve.temperature:g}")  # fmt: skip
    axes.axhline(1.0, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _dress(axes, "Speed-up of chains by k (points: measured, quartiles;\nlines: model of costs and acceptance)", "k",
           "speed against plain decoding")  # fmt: skip
    _legend(axes)


def pareto(axes: Any, cells: Sequence[CellStats], title: str) -> None:
    """Tokens per step, with their interval, against the time of a step, and lines of equal speed; the upper left edge
    is drawn."""
    points = [(sum(stats.ms), stats.tokens_per_step.value, stats) for stats in cells]
    if not points:
        return
    widest, tallest = 1.12 * max(x for x, _, _ in points), 1.15 * max(y for _, y, _ in points)
    edge = [p for p in points if not any(q[0] <= p[0] and q[1] >= p[1] and q is not p for q in points)]
    names = list(dict.fromkeys(str(stats.cell.setting) for stats in cells))
    rules = list(dict.fromkeys(stats.cell.rule for stats in cells))
    fastest = max(y / x for x, y, _ in points)
    for speed in fastest * np.array([0.25, 0.5, 0.75, 1.0]):
        axes.plot([0, widest], [0, speed * widest], color="#cccccc", linewidth=0.8, zorder=0)
        x = min(widest, tallest / speed)
        axes.annotate(f"{1e3 * speed:.0f} tokens/s", (0.97 * x, 0.97 * speed * x), fontsize=6.5, color=GREY, ha="right",
                      va="top")  # fmt: skip
    edge.sort()
    axes.plot([p[0] for p in edge], [p[1] for p in edge], color=GREY, linewidth=1, linestyle=":", zorder=1)
    for x, y, stats in points:
        axes.errorbar(x, y, yerr=stats.tokens_per_step.half_width, color=colour(names.index(str(stats.cell.setting))),
                      marker=MARKERS[rules.index(stats.cell.rule) % 8], markersize=6, elinewidth=0.7, capsize=1.5,
                      zorder=2)  # fmt: skip
    handles = [axes.scatter([], [], color=colour(i), s=30, label=name) for i, name in enumerate(names)]
    handles += [axes.scatter([], [], color=GREY, s=30, marker=MARKERS[i % 8], label=r) for i, r in enumerate(rules)]
    axes.set_xlim(0, widest)
    axes.set_ylim(0, tallest)
    _dress(axes, title, "milliseconds per step", "tokens per step")
    axes.legend(handles=handles, fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def tree(axes: Any, stats: CellStats, kept: Sequence[float], widths: Sequence[int]) -> Any:
    """A static tree, each node coloured by how often it was on the kept path. Returns what a colour bar needs."""
    places, edges, level = [(0.0, 0.0)], [], [0]
    spread = [1.0]
    spans = {0: (0.0, 1.0)}
    for depth, width in enumerate(widths, 1):
        below = []
        for node in level:
            low, high = spans[node]
            for child in range(width):
                number = len(places)
                spans[number] = (low + (high - low) * child / width, low + (high - low) * (child + 1) / width)
                places.append((sum(spans[number]) / 2, -float(depth)))
                spread.append((high - low) / width)
                edges.append((node, number))
                below.append(number)
        level = below
    places[0] = (0.5, 0.0)
    for a, b in edges:
        axes.plot(*zip(places[a], places[b], strict=True), color="#bbbbbb", linewidth=0.8, zorder=0)
    values = [*kept, *[0.0] * (len(places) - len(kept))]
    drawn = axes.scatter(*zip(*places, strict=True), c=values[: len(places)], cmap="viridis", vmin=0, vmax=1, s=230,
                         zorder=1, edgecolors="#333333", linewidths=0.5)  # fmt: skip
    for place, value in zip(places, values, strict=False):
        axes.annotate(f"{100 * value:.0f}", place, ha="center", va="center", fontsize=6.5,
                      color="white" if value < 0.6 else "black")  # fmt: skip
    axes.set_xlim(-0.05, 1.05)
    axes.set_ylim(-len(widths) - 0.5, 0.5)
    axes.set_xticks([])
    axes.set_yticks(range(-len(widths), 1), [str(-depth) for depth in range(-len(widths), 1)], fontsize=7)
    cell = stats.cell
    name = str(cell.setting).replace(":children", "\nchildren")
    _dress(axes, f"{name}\n{cell.rule}, T = {cell.temperature:g}", "", "depth")
    axes.spines["bottom"].set_visible(False)
    return drawn


def against_optimum(axes: Any, cells: Sequence[CellStats]) -> None:
    """First-level acceptance with its interval beside the most any rule could reach with the same draft law. A bar
    beyond its optimum is chance: the interval reaches back. Settings of one temperature stand together."""
    known = [stats for stats in cells if not math.isnan(stats.alpha_star)]
    rows = grouped([stats.cell.temperature for stats in known])
    for row, stats in zip(rows, known, strict=True):
        low, high = share_interval(stats.alpha_there, stats.num_roots)
        error = [[stats.alpha_there - low], [high - stats.alpha_there]]
        axes.barh(row, stats.alpha_there, color="#9cc8e8", height=0.6, xerr=error,
                  error_kw={"ecolor": GREY, "elinewidth": 0.9, "capsize": 2})  # fmt: skip
        axes.plot([stats.alpha_star] * 2, [row - 0.4, row + 0.4], color="#b5352f", linewidth=2)
    axes.set_yticks(rows, [f"{s.cell.setting} {s.cell.rule} T={s.cell.temperature:g}" for s in known], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    _dress(axes, "First level kept (bar, 95 % interval) and its optimum alpha* (red),\nsame roots", "share of drafts",
           "")  # fmt: skip


def heat(axes: Any, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """A table of numbers as colours, the numbers in it."""
    axes.imshow(values, cmap="YlGnBu", aspect="auto", vmin=1.0)
    middle = (1.0 + np.nanmax(values)) / 2
    for i, j in np.ndindex(values.shape):
        if not np.isnan(values[i, j]):
            axes.annotate(f"{values[i, j]:.2f}", (j, i), ha="center", va="center", fontsize=6.5,
                          color="white" if values[i, j] > 1.15 * middle else "black")  # fmt: skip
    axes.set_yticks(range(len(rows)), rows, fontsize=6.5)
    axes.set_xticks(range(len(columns)), columns, fontsize=7)
    axes.set_title(title, fontsize=8.5)
    axes.tick_params(length=0)


def by_output(axes: Any, runs: Runs, cells: Sequence[CellStats], title: str) -> None:
    """Tokens per step by where in the output the step began, with intervals over prompts."""
    highest = 2.0
    for number, stats in enumerate(cells):
        bins = [entry for entry in runs.by_output_position(stats.cell) if entry[2] >= 5]
        means = [mean.value for _, mean, _ in bins]
        highest = max(highest, *means) if means else highest
        beside = 0.3 * (number - (len(cells) - 1) / 2)  # or intervals of several settings hide each other
        axes.errorbar([at + beside for at, _, _ in bins], means, yerr=[mean.half_width for _, mean, _ in bins],
                      marker=MARKERS[number % 8], markersize=4, color=colour(number), linewidth=1.2, elinewidth=0.7,
                      capsize=1.5, label=f"{stats.cell.setting} ({stats.cell.rule})")  # fmt: skip
    axes.set_ylim(1.0, 1.0 + (1.1 + 0.08 * len(cells)) * (highest - 1.0))  # room for the legend above the lines
    _dress(axes, title, "output position (bins of 16)", "tokens per step")
    _legend(axes, "upper left")


def _whiskers(shares: Sequence[float], nums: Sequence[int]) -> list[list[float]]:
    """What matplotlib draws to both sides of shares of so many trials."""
    found = [(share - low, high - share) for share, num in zip(shares, nums, strict=False)
             for low, high in [share_interval(share, num)]]  # fmt: skip
    return [list(side) for side in zip(*found, strict=True)]


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=8.5)
    axes.set_xlabel(x, fontsize=7.5)
    axes.set_ylabel(y, fontsize=7.5)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Any, place: str = "best") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=6, frameon=False, loc=place)
