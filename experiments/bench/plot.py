"""The picture: one horizontal bar per peer, its speed relative to plain generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specdec.experiments.bench.stats import Summary
from specdec.experiments.display import grouped, new_figure

COLOURS = {
    "hf-plain": "#8c8c8c",
    "hf-assisted": "#e69f00",
    "hf-early-exit": "#b36b00",
    "hf-prompt-lookup": "#d55e00",
    "specdec-none": "#56b4e9",
    "specdec-model": "#0072b2",
    "specdec-ngram": "#cc79a7",
    "specdec-planned": "#5b2a86",
    "llama-cpp-f32": "#009e73",
    "llama-cpp-f32-lookup": "#8fce00",
    "llama-cpp-f16": "#00544a",
    "llama-cpp-f16-lookup": "#b8a500",
    "llama-cpp-file": "#6a3d2a",
}
"""Told apart by most kinds of colour blindness, too (after Okabe and Ito)."""
FAINT = 0.4
"""Opacity of settings that are not their family's best."""


def plot(summaries: Sequence[Summary], title: str, path: Path) -> bool:
    """Write a PNG. Returns False, without an error, where matplotlib is not installed (extra `viz`)."""
    shown = [summary for summary in summaries if summary.speedup is not None]
    rows = grouped([summary.family for summary in shown])
    figure = new_figure(8.5, 1.4 + 0.34 * (rows[-1] + 1))
    if figure is None:
        return False
    axes = figure.add_subplot()
    for row, summary in zip(rows, shown, strict=True):
        assert summary.speedup is not None
        assert summary.tokens_per_second is not None
        middle, low, high = summary.speedup
        axes.barh(
            row, middle, xerr=[[middle - low], [high - middle]], color=COLOURS.get(summary.family, "#444444"),
            alpha=1.0 if summary.best else FAINT, error_kw={"ecolor": "#333333", "elinewidth": 1, "capsize": 2},
        )  # fmt: skip
        said = f"  {middle:.2f}x  ({summary.tokens_per_second.median:.0f} tokens/s)"
        axes.text(high, row, said, va="center", fontsize=8, fontweight="bold" if summary.best else "normal")
    axes.set_yticks(rows, [summary.peer for summary in shown], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.axvline(1.0, color="#333333", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1.3 * max(summary.speedup.high for summary in shown if summary.speedup is not None))
    axes.set_xlabel("speed relative to HF plain generate (median over prompts, bars: quartiles)", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return True
