"""Draws the plots of docs/planner.md from committed results, and the way of a request for docs/serving.md.

To be run as `python docs/pictures.py`. Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE.parent / "experiments" / "results"
SWEEPS = {
    "greedy": ("planner-sweep-20261128-140056.json", "T=0.0 batch 1"),
    "temperature 1": ("planner-sweep-20261128-143509.json", "T=1.0 batch 1"),
}
NEVER_SLOWER = "planner-never-slower-20261128-141138.json"
MODEL, NGRAM, BOTH, GREY = "#3f51b5", "#e07b39", "#2e8b57", "#777777"
SVG_STYLE = """<style>text{font:13px system-ui,sans-serif;fill:#222}.s{font-size:11px;fill:#555}\
.b{fill:#eef3fb;stroke:#4a6fa5}.g{fill:#e6f4e6;stroke:#3d8b3d}.y{fill:#fff6dc;stroke:#c79a1b}\
.h{fill:none;stroke:#bbb;stroke-dasharray:4 4}.l{stroke:#555;fill:none;stroke-width:1.4;marker-end:url(#a)}</style>\
<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">\
<path d="M0 0 8 4 0 8z" fill="#555"/></marker></defs>"""
SAME_EVERYWHERE = {"svg.hashsalt": "specdec", "svg.fonttype": "none", "font.size": 10}
"""The same file on every machine, with its words as words."""


def sweep() -> Figure:
    """Every fixed depth and the planned drafters, over no drafter, with quartiles over prompts."""
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (title, (name, run)) in zip(panels, SWEEPS.items(), strict=True):
        found = json.loads((RESULTS / name).read_text())["runs"][run]["found"]
        speed = found["sweep"]["speed_up_over_none"]
        for drafter, colour, shift in (("model", MODEL, -0.08), ("ngram", NGRAM, 0.08)):
            depths = sorted(int(way.split("k=")[1]) for way in speed if way.startswith(f"{drafter} k="))
            at = [speed[f"{drafter} k={depth}"] for depth in depths]
            panel.errorbar([d + shift for d in depths], [x["median"] for x in at], yerr=bars(at), color=colour,
                           marker="o", markersize=4, linewidth=1, capsize=2, label=f"{drafter}, k fixed")  # fmt: skip
        for place, (drafter, colour) in enumerate((("model", MODEL), ("ngram", NGRAM), ("model+ngram", BOTH))):
            planned = speed[f"planned {drafter}"]
            panel.errorbar([14 + 1.3 * place], [planned["median"]], yerr=bars([planned]), color=colour, marker="D",
                           markersize=7, capsize=3, linestyle="none", label=f"{drafter}, planned")  # fmt: skip
        panel.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
        panel.axvline(13, color=GREY, linewidth=0.5)
        panel.set_title(title, fontsize=10)
        panel.set_xticks([1, 2, 4, 6, 8, 10, 12, 15.3], ["1", "2", "4", "6", "8", "10", "12", "planned"])
        panel.set_xlabel("depth of the drafts, k")
    panels[0].set_ylabel("speed over no drafter")
    panels[0].set_ylim(bottom=0)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    return figure


def never_slower() -> Figure:
    """A useless drafter, planned, over no drafter; beside it no drafter over itself."""
    runs = json.loads((RESULTS / NEVER_SLOWER).read_text())["runs"]
    cells = [
        (f"{'greedy' if 'T=0.0' in run else 'T = 1'}, batch {run.split()[-1]}, {length(work)} tokens", cell)
        for run, works in runs.items()
        for work, cell in works["found"].items()
    ]
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    panel = figure.subplots()
    for key, colour, shift, label in (
        ("against_none", MODEL, -0.14, "untrained drafter, planned"),
        ("none_against_itself", GREY, 0.14, "no drafter against itself (how well the clock can tell)"),
    ):
        found = [cell[key] for _, cell in cells]
        panel.errorbar([x["median"] for x in found], [y + shift for y in range(len(cells))], xerr=bars(found),
                       color=colour, marker="o", markersize=4, linestyle="none", capsize=2, label=label)  # fmt: skip
    panel.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    panel.set_yticks(range(len(cells)), [name for name, _ in cells], fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("speed over no drafter")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def request_way() -> str:
    """From a client's body to its stream: what the event loop does, and what the engine's thread does."""
    title = "The way of a request: checked, queued, decoded with everybody else's, streamed"

    def box(kind: str, x: int, y: int, head: str, under: str, width: int = 132) -> str:
        middle = x + width // 2
        return (
            f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="52" rx="6"/>'
            f'<text x="{middle}" y="{y + 23}" text-anchor="middle">{head}</text>'
            f'<text class="s" x="{middle}" y="{y + 40}" text-anchor="middle">{under}</text>'
        )

    def lane(y: int, height: int, what: str, at: str = 'x="160"') -> str:
        frame = f'<rect class="h" x="150" y="{y}" width="790" height="{height}" rx="8"/>'
        return f'{frame}<text class="s" {at} y="{y + 16}">{what}</text>'

    def row(y: int, kind: str, words: list[tuple[str, str]]) -> list[str]:
        return [box(kind, 166 + 156 * place, y, *two) for place, two in enumerate(words)]

    down = [("Gate", "id, key, size, pace"), ("Body", "fields and ranges"), ("Prompt", "template, token ids"),
            ("Sampling", "processors, stops"), ("Queue", "bounded: 429, 503")]  # fmt: skip
    steps = [("Admit", "pages, shared prefix"), ("Propose", "each its drafter"), ("One pass", "trees and prompts"),
             ("Accept", "law p, stop rules"), ("Commit", "kept K/V stays")]  # fmt: skip
    up = [("Chunk", "one per step"), ("Stop strings", "held back"), ("Characters", "never half of one"),
          ("Origins", "and log-probabilities"), ("Step output", "tokens of this text")]  # fmt: skip
    across = [f"M{298 + 156 * place} {{y}} {320 + 156 * place} {{y}}" for place in range(4)]
    back = [f"M{322 + 156 * place} {{y}} {300 + 156 * place} {{y}}" for place in range(4)]
    arrows = [
        *(path.format(y=y) for y in (58, 168) for path in across),
        *(path.format(y=278) for path in back),
        "M116 58 164 58",
        "M856 84 856 110 232 110 232 140",
        "M856 194 856 250",
        "M806 194 806 214 232 214 232 197",
        "M166 278 118 278",
        "M63 252 63 168 164 168",
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 950 330" role="img" aria-label="{title}">',
        f"<title>{title}</title>",
        SVG_STYLE,
        '<rect width="950" height="330" fill="#fff"/>',
        lane(8, 92, "event loop and its helper threads"),
        lane(118, 104, "engine's thread, all requests together", 'x="928" text-anchor="end"'),
        lane(228, 92, "event loop"),
        box("y", 10, 32, "Client", "POST, a body", 106),
        box("y", 10, 252, "Client", "an event stream", 106),
        *row(32, "b", down),
        *row(142, "g", steps),
        *row(252, "b", up),
        *(f'<path class="l" d="{path}"/>' for path in arrows),
        '<text class="s" x="520" y="209" text-anchor="middle">next step</text>',
        '<text class="s" x="12" y="146">a client that goes</text><text class="s" x="12" y="160">frees its pages</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def length(workload: str) -> int:
    """New tokens of a call, by the name of its workload."""
    return 256 if "long outputs" in workload else 96


def bars(found: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """From medians down and up to the quartiles."""
    return [x["median"] - x["low"] for x in found], [x["high"] - x["median"] for x in found]


def draw(folder: Path) -> list[Path]:
    """All pictures, written to `folder`."""
    written = []
    with mpl.rc_context(SAME_EVERYWHERE):
        for name, figure in (("planner-sweep", sweep()), ("planner-never-slower", never_slower())):
            path = folder / f"{name}.svg"
            FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
            written.append(path)
    written.append(folder / "request.svg")
    written[-1].write_text(request_way())
    return written


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "img"):
        print(path)
