"""The page: plots, table, coloured texts and provenance in one HTML file; the plots alone as one PNG."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from specdec.experiments.accept.metrics import Runs, spec_bench
from specdec.experiments.accept.report.panels import Panel, panels
from specdec.experiments.accept.report.texts import texts
from specdec.experiments.accept.scores import Logs
from specdec.experiments.accept.show import COLUMNS, row
from specdec.experiments.accept.store import ResultsError, Store
from specdec.experiments.errors import ExperimentError
from specdec.experiments.provenance import placeless

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; margin-bottom: .2em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
img { max-width: 100%; display: block; margin: .6em 0 } p.note { color: #555; font-size: .9em }
table { border-collapse: collapse; font-size: .8em }
td, th { padding: .15em .6em; text-align: left; white-space: nowrap }
tr:nth-child(even) { background: #f5f7f9 } th { border-bottom: 1px solid #999 }
tr.first td { border-top: 1px solid #999 }
pre { white-space: pre-wrap; background: #fbfbfb; border: 1px solid #ddd; padding: .7em; font-size: .85em }
pre .p { color: #777 } pre span.a { background: #d4efd4 } pre span.r { background: #ffd9b3; font-weight: bold }
pre span.b { background: #d6e4fa; text-decoration: underline }
.scroll { overflow-x: auto } details pre { font-size: .75em }
"""


def write_report(store: Store, out: Path | None = None) -> list[Path]:
    """Write `out` (default: report.html in the run's folder) and a PNG beside it.

    Raises:
        ResultsError: no runs in the folder, or damaged files; ExperimentError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ExperimentError("the report needs matplotlib: pip install 'specdec[viz]'") from None
    runs = Runs.read(store)
    if not runs.entries:
        raise ResultsError(f"{store.folder.name}: no finished runs yet; run `specdec accept` first")
    logs = Logs(store)
    drawn = panels(runs, logs)
    path = store.folder / "report.html" if out is None else out
    path.parent.mkdir(parents=True, exist_ok=True)
    sections = [_picture(panel, Figure, FigureCanvasAgg) for panel in drawn]
    path.write_text(_page(runs, sections), encoding="utf-8")
    whole = Figure(figsize=(15, sum(panel.height for panel in drawn)), layout="constrained")
    FigureCanvasAgg(whole)
    parts = whole.subfigures(len(drawn), 1, height_ratios=[panel.height for panel in drawn], squeeze=False)
    for part, panel in zip(parts[:, 0], drawn, strict=True):
        part.suptitle(panel.title, fontsize=11, fontweight="bold", x=0.01, ha="left")
        panel.draw(part)
    image = path.with_suffix(".png")
    whole.savefig(image, dpi=110)
    return [path, image]


def _picture(panel: Panel, figure: Any, canvas: Any) -> str:
    made = figure(figsize=(12, panel.height), layout="constrained")
    canvas(made)
    panel.draw(made)
    buffer = io.BytesIO()
    made.savefig(buffer, dpi=130, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    alt, note = html.escape(panel.title), html.escape(panel.note)
    return f'<h2>{alt}</h2>\n<p class="note">{note}</p>\n<img alt="{alt}" src="data:image/png;base64,{data}">'


def _page(runs: Runs, sections: list[str]) -> str:
    options = runs.options
    title = f"Acceptance on {html.escape(str(options.get('pair')))}"
    source = runs.sources[-1] if runs.sources else {}
    facts = (
        f"{len(runs.entries)} runs of {len(runs.cells())} cells; {source.get('cpu')}, {source.get('threads')} threads, "
        f"{source.get('device')}, {options.get('dtype')}; load {source.get('load_average')}; {source.get('date')}; "
        f"commit {str(source.get('git_commit'))[:9]}"
    )
    body = [f"<h1>{title}</h1>", f'<p class="note">{html.escape(facts)}</p>', *sections]
    body += ["<h2>All figures</h2>", _table(runs), "<h2>By domain, as Spec-Bench defines it</h2>", _spec_bench(runs)]
    body += ["<h2>Texts</h2>", texts(runs)]
    whole = html.escape(json.dumps({"options": placeless(options), "sessions": runs.sources}, indent=1))
    body += ["<h2>Where this comes from</h2>", f"<details><summary>provenance</summary><pre>{whole}</pre></details>"]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _table(runs: Runs) -> str:
    lines, previous = [], None
    for cell in runs.cells():
        stats = runs.stats(cell)
        assert stats is not None
        first = ' class="first"' if previous not in (None, cell.temperature) else ""
        previous = cell.temperature
        lines.append(f"<tr{first}>" + "".join(f"<td>{html.escape(text)}</td>" for text in row(stats)) + "</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    note = (
        "tokens/step: emitted per pass of the target ± the 95 % interval over prompts (Student's); kept: of the "
        "drafted tokens; by position: of the steps that reached a depth; alpha: first level kept; alpha*: the most any "
        "rule could keep with that draft law at those roots; vs plain: median [quartiles] over prompts of the speed "
        "ratio."
    )
    return _scrolled(note, head, lines)


def _spec_bench(runs: Runs) -> str:
    domains = [*runs.domains(), None]
    head = "<th>setting</th><th>rule</th><th>T</th>" + "".join(
        f"<th>{html.escape(domain or 'overall')}</th>" for domain in domains
    )
    lines = []
    for cell in runs.cells():
        if cell.is_plain:
            continue
        figures = [spec_bench(runs, cell, domain) for domain in domains]
        text = "".join(f"<td>{one.mean_accepted_tokens:.2f} / {one.speedup:.2f}x</td>" for one in figures)
        names = "".join(f"<td>{html.escape(name)}</td>" for name in (str(cell.setting), cell.rule))
        lines.append(f"<tr>{names}<td>{cell.temperature:g}</td>{text}</tr>")
    note = "Mean accepted tokens (the recovered or bonus token counts) / ratio of mean speeds over questions."
    return _scrolled(note, head, lines)


def _scrolled(note: str, head: str, lines: list[str]) -> str:
    table = f"<table><tr>{head}</tr>{''.join(lines)}</table>"
    return f'<p class="note">{html.escape(note)}</p><div class="scroll">{table}</div>'
