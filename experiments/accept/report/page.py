"""The page: plots, table, coloured texts and provenance in one HTML file; the plots alone as one PNG."""

from __future__ import annotations

import base64
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from specdec.experiments.accept.metrics import Runs, spec_bench
from specdec.experiments.accept.report.panels import Panel, panels
from specdec.experiments.accept.report.texts import texts
from specdec.experiments.accept.scores import Logs
from specdec.experiments.accept.show import COLUMNS, row
from specdec.experiments.accept.store import ResultsError, Store
from specdec.experiments.display import new_figure
from specdec.provenance import placeless
from specdec.shown_errors import ExperimentError


def write_report(store: Store, out: Path | None = None) -> list[Path]:
    """Write `out` (default: report.html in the run's folder) and a PNG beside it.

    Raises:
        ResultsError: no runs in the folder, or damaged files; ExperimentError: matplotlib or jinja2 is missing.
    """
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError:
        raise ExperimentError("the report needs jinja2: pip install 'specdec-lm[viz]'") from None
    runs = Runs.read(store)
    if not runs.entries:
        raise ResultsError(f"{store.folder.name}: no finished runs yet; run `specdec accept` first")
    drawn = panels(runs, Logs(store))
    whole = new_figure(15, sum(panel.height for panel in drawn))
    if whole is None:
        raise ExperimentError("the report needs matplotlib: pip install 'specdec-lm[viz]'")
    path = store.folder / "report.html" if out is None else out
    path.parent.mkdir(parents=True, exist_ok=True)
    template = Environment(loader=PackageLoader(__package__, ""), autoescape=True).get_template("report.html")
    pictures = [(panel, _picture(panel)) for panel in drawn]
    path.write_text(template.render(pictures=pictures, **_content(runs)), encoding="utf-8")
    parts = whole.subfigures(len(drawn), 1, height_ratios=[panel.height for panel in drawn], squeeze=False)
    for part, panel in zip(parts[:, 0], drawn, strict=True):
        part.suptitle(panel.title, fontsize=11, fontweight="bold", x=0.01, ha="left")
        panel.draw(part)
    image = path.with_suffix(".png")
    whole.savefig(image, dpi=110)
    return [path, image]


def _picture(panel: Panel) -> str:
    """PNG as base64."""
    made, buffer = new_figure(12, panel.height), io.BytesIO()
    panel.draw(made)
    made.savefig(buffer, dpi=130, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _content(runs: Runs) -> dict[str, Any]:
    """What the template asks for besides the pictures."""
    options, cells = runs.options, runs.cells()
    source = runs.sources[-1] if runs.sources else {}
    begins = [False, *(a.temperature != b.temperature for a, b in pairwise(cells))]
    every = [stats for cell in cells if (stats := runs.stats(cell)) is not None]
    domains = [*runs.domains(), None]
    return {
        "title": f"Acceptance on {options.get('pair')}",
        "facts": f"{len(runs.entries)} runs of {len(cells)} cells; {source.get('cpu')}, {source.get('threads')} "
        f"threads, {source.get('device')}, {options.get('dtype')}; load {source.get('load_average')}; "
        f"{source.get('date')}; commit {str(source.get('git_commit'))[:9]}",
        "columns": COLUMNS,
        "figures": [(begin, row(stats)) for begin, stats in zip(begins, every, strict=True)],
        "domains": ["setting", "rule", "T", *(domain or "overall" for domain in domains)],
        "by_domain": [
            (False, [cell.setting, cell.rule, f"{cell.temperature:g}", *(spec_bench(runs, cell, d) for d in domains)])
            for cell in cells
            if not cell.is_plain
        ],
        "texts": list(texts(runs)),
        "provenance": json.dumps({"options": placeless(options), "sessions": runs.sources}, indent=1),
    }
