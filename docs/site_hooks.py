"""What mkdocs does besides: every notebook becomes a page, written from its script; no outputs, they are not kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jupytext  # type: ignore[import-untyped]
from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).parents[1] / "experiments" / "notebooks"


def on_files(files: Files, config: Any) -> Files:
    """Add `notebooks/NAME.md` for every notebook."""
    for script in sorted(NOTEBOOKS.glob("*.py")):
        files.append(File.generated(config, f"notebooks/{script.stem}.md", content=page(script)))
    return files


def page(script: Path) -> str:
    """A notebook's cells as Markdown: text as it is, code in blocks."""
    text = jupytext.writes(jupytext.read(script), "md")
    return re.sub(r"\A---\n.*?^---\n", "", text, flags=re.M | re.S)
