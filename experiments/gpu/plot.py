"""The pictures of a GPU run: passes against the roofline, attention per backend, tokens per second."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from specdec.experiments.display import new_figure
from specdec.experiments.gpu.show import Results, roofline_ms


def draw(results: Results, out: Path) -> list[Path]:
    """Write what can be drawn as PNG files; nothing, without an error, where matplotlib is missing (extra `viz`)."""
    drawn = []
    for name, fill in (("passes", _passes), ("attention", _attention), ("generate", _generate)):
        figure = new_figure(8.5, 5)
        if figure is not None and any(_measured(entry) for entry in results.get(name, [])):
            fill(figure.add_subplot(), results)
            path = out / f"gpu-{name}.png"
            figure.savefig(path, dpi=120)
            drawn.append(path)
    return drawn


def _measured(entry: dict[str, Any]) -> bool:
    return any(key in entry for key in ("ms", "ms_wall", "tokens_per_second"))


def _passes(axes: Any, results: Results) -> None:
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    floor: dict[int, float] = {}
    entries = [entry for entry in results["passes"] if entry.get("model") == "target" and "ms" in entry]
    shortest = min(entry["context"] for entry in entries)
    for entry in entries:
        lines[f"{entry['mode']}, {entry['context']} tokens"].append((entry["nodes"], entry["ms"]))
        least = roofline_ms(entry, results)
        if entry["context"] == shortest and least is not None:
            floor[entry["nodes"]] = least
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    if floor:
        axes.plot(*zip(*sorted(floor.items()), strict=True), "k--", label=f"roofline, {shortest} tokens")
    axes.set(xlabel="nodes of one pass", ylabel="milliseconds", xscale="log", ylim=(0, None), title="target passes")
    axes.legend(fontsize=8)


def _attention(axes: Any, results: Results) -> None:
    entries = [entry for entry in results["attention"] if "ms_wall" in entry and entry["equal"]]
    shapes = sorted({(entry["context"], entry["rows"], entry["nodes"]) for entry in entries})
    backends = list(dict.fromkeys(entry["backend"] for entry in entries))
    height = 0.8 / max(1, len(backends))
    for i, backend in enumerate(backends):
        own = {(e["context"], e["rows"], e["nodes"]): e["gb_s"] for e in entries if e["backend"] == backend}
        at = [place + i * height for place, shape in enumerate(shapes) if shape in own]
        axes.barh(at, [own[shape] for shape in shapes if shape in own], height, label=backend)
    labels = [f"{context} x {rows} rows, {nodes} nodes" for context, rows, nodes in shapes]
    axes.set_yticks(range(len(shapes)), labels, fontsize=6)
    axes.set(xlabel="K/V read, GB/s", title="tree attention of one layer")
    axes.legend(fontsize=8)


def _generate(axes: Any, results: Results) -> None:
    entries = [entry for entry in results["generate"] if "tokens_per_second" in entry]
    labels = [
        " ".join([entry["peer"], *(f"{key}={entry[key]}" for key in ("k", "alpha") if key in entry)])
        for entry in entries
    ]
    axes.barh(range(len(entries)), [entry["tokens_per_second"] for entry in entries])
    axes.set_yticks(range(len(entries)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set(
        xlabel="tokens per second, batch 1, greedy", title="whole texts; alpha: chance that a draft token is right"
    )
