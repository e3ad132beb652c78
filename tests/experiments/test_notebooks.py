"""The notebooks: script and notebook agree, no outputs are kept, and each runs by itself on one CPU thread in time."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jupytext  # type: ignore[import-untyped]
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "experiments" / "notebooks").glob("*.py"))
EXPECTED_PICTURES = {"2_acceptance": 4, "3_choosing_a_drafter": 3, "4_proving_exactness": 2}
MOST_CPU_SECONDS = 60.0
TIMEOUT_S = 900
"""Of the wall clock, for each cell: other processes may have the machine."""
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|Users|work|mnt|opt)/\w")
CLOCK = "import time; print(time.process_time())"

each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def leftovers(notebook: Any) -> list[str]:
    """What a notebook keeps of having been run, and anything in it that belongs to one machine."""
    found = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None):
            found.append(f"cell {number} has outputs")
        if set(cell.metadata) - {"lines_to_next_cell"}:  # blank lines of the script, by jupytext
            found.append(f"cell {number} has metadata: {dict(cell.metadata)}")
        if MACHINE_PATH.search(cell.source):
            found.append(f"cell {number} names a path of one machine")
    return found + [f"metadata {key!r}" for key in notebook.metadata if key not in ("jupytext", "kernelspec")]


def execute(notebook: Any, folder: Path) -> float:
    """Run every cell in a kernel of its own whose working directory is `folder`; the CPU seconds it took.

    Pipes instead of TCP ports: kernels that start at the same moment may be given the same port.
    """
    notebook.cells.append(nbformat.v4.new_code_cell(CLOCK))
    with tempfile.TemporaryDirectory(prefix="nb") as short:  # the path of a pipe must be short
        config = Config({"KernelManager": {"transport": "ipc", "connection_file": f"{short}/kernel.json"}})
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(
            notebook, config=config, timeout=TIMEOUT_S, startup_timeout=TIMEOUT_S, resources=resources
        ).execute()
    return float(notebook.cells.pop().outputs[-1].text)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working directory; one thread, this checkout, and nobody's Jupyter settings."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{path}" if path else str(ROOT))
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_there_are_six_and_the_page_lists_them() -> None:
    assert [script.stem[:2] for script in SCRIPTS] == [f"{number}_" for number in range(1, 7)]
    page = (ROOT / "docs" / "notebooks.md").read_text()
    assert [script.stem for script in SCRIPTS] == re.findall(r"^\| \[`(\w+)`\]", page, flags=re.MULTILINE)


@each
def test_script_and_notebook_agree(script: Path) -> None:
    wanted, found = cells(jupytext.read(script)), cells(read(script.with_suffix(".ipynb")))
    assert wanted == found, "run `jupytext --sync` on it (docs/notebooks.md)"


@each
def test_no_outputs_are_kept(script: Path) -> None:
    assert not leftovers(read(script.with_suffix(".ipynb")))


def test_the_checks_of_the_files_can_fail() -> None:
    path = SCRIPTS[0].with_suffix(".ipynb")
    good, bad = read(path), read(path)
    first = next(cell for cell in bad.cells if cell.cell_type == "code")
    first.source += "\nopen('/" + "home/me/models')"
    first.execution_count = 1
    assert cells(good) != cells(bad)
    assert len(leftovers(bad)) == 2


@pytest.mark.slow
@each
def test_runs_in_time(script: Path, alone: Path) -> None:
    notebook = read(script.with_suffix(".ipynb"))
    seconds = execute(notebook, alone)
    assert seconds < MOST_CPU_SECONDS
    assert not list(alone.iterdir()), "a notebook leaves nothing where it was started"
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == EXPECTED_PICTURES.get(script.stem, 0)


def test_a_cell_that_fails_is_seen(alone: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook, alone)
