"""The repository's shape: who may import whom, which names the folders answer to, what a wheel must carry."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from source_files import FLOORS, FOLDERS, ROOT, floor_of_file, floor_of_module, sources

MAX_LINES = 300


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands. `from specdec import kv` counts as `specdec.kv`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; folders are linked, write the full name"
            module = node.module or ""
            names = [alias.name for alias in node.names]
            inner = [*FOLDERS, "cli", "serve"]
            yield from (
                (node.lineno, f"specdec.{name}" if module == "specdec" and name in inner else module) for name in names
            )


def upward_imports(floor: str, source: str) -> list[tuple[int, str]]:
    """Imports in `source`, a module on `floor`, that go up."""
    rank = FLOORS.index(floor)
    found = []
    for line, name in _imports(ast.parse(source)):
        other = floor_of_module(name)
        if other is not None and FLOORS.index(other) > rank:
            found.append((line, name))
    return found


def test_imports_go_down_only() -> None:
    wrong = []
    for path in sources():
        floor = floor_of_file(path)
        wrong += [f"{path.relative_to(ROOT)}:{line} imports {name}" for line, name in
                  upward_imports(floor, path.read_text())]  # fmt: skip
    assert not wrong, "imports go cli -> serve -> experiments -> specdec -> drafters -> verify -> kv:\n" + "\n".join(
        wrong
    )


@pytest.mark.parametrize(
    ("floor", "source"),
    [
        ("kv", "import specdec.verify.tree"),
        ("kv", "from specdec import verify"),
        ("kv", "from specdec import Speculator"),
        ("verify", "def late():\n    from specdec.drafters.base import Drafter"),
        ("drafters", "from specdec.report import SpecReport"),
        ("specdec", "from specdec.experiments import bench"),
        ("specdec", "from specdec.cli import main"),
        ("experiments", "import specdec.cli"),
        ("experiments", "import specdec.serve.app"),
        ("specdec.serve", "from specdec.cli.text import Screen"),
    ],
)
def test_the_import_check_sees_each_way_up(floor: str, source: str) -> None:
    assert upward_imports(floor, source)


@pytest.mark.parametrize(
    ("floor", "source"),
    [
        ("kv", "import torch\nfrom specdec.kv.errors import SpecdecError"),
        ("experiments", "import specdec\nfrom specdec.kv import SharedKVCache"),
        ("specdec.cli", "from specdec.experiments import bench"),
    ],
)
def test_the_import_check_allows_the_ways_down(floor: str, source: str) -> None:
    assert not upward_imports(floor, source)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_linked_relatively(folder: str) -> None:
    link = ROOT / "specdec" / folder
    assert link.is_symlink(), f"specdec/{folder} must be a symlink: ln -s ../{folder} specdec/{folder}"
    assert os.readlink(link) == f"../{folder}"
    assert (link / "__init__.py").samefile(ROOT / folder / "__init__.py")


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_refuse_their_bare_name(folder: str) -> None:
    spec = importlib.util.spec_from_file_location(folder, ROOT / folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match=rf"import specdec\.{folder}"):
        spec.loader.exec_module(module)


def _settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    here = {"specdec"}
    for path in sources():
        if path.name == "__init__.py":
            parts = path.parent.relative_to(ROOT).parts
            here.add(".".join(parts if parts[0] == "specdec" else ("specdec", *parts)))
    setuptools = _settings()["tool"]["setuptools"]
    assert set(setuptools["packages"]) == here, "pyproject.toml [tool.setuptools] packages must list every package"
    mapping = {f"specdec.{folder}": folder for folder in FOLDERS} | {"specdec": "specdec"}
    assert setuptools["package-dir"] == mapping


def test_every_module_lies_in_a_package() -> None:
    lost = [str(path.relative_to(ROOT)) for path in sources() if not (path.parent / "__init__.py").is_file()]
    assert not lost, f"without an __init__.py beside them these are left out of the wheel: {lost}"


def test_no_source_file_is_too_long() -> None:
    files = [*sources(), *(ROOT / "tests").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    long = {name: count for name, count in lengths.items() if count > MAX_LINES}
    assert not long, f"split by idea, not by size; at most {MAX_LINES} lines: {long}"


def test_no_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(home|root|Users|work|mnt|opt)/\w")
    texts = [*sources(), *(ROOT / "tests").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    texts += [ROOT / name for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run")]
    texts += (ROOT / "experiments").rglob("*.md")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"absolute paths of one machine: {found}"


def test_only_one_module_knows_what_a_cache_is_called() -> None:
    """Whoever else wrote the name would work with half of the supported versions of transformers."""
    pattern = re.compile(r"past_key_values=|[\"']past_key_values[\"']|\.past_key_values\b")
    for code in ("model(past_key_values=x)", "out.past_key_values.layers", "f(**{'past_key_values': x})"):
        assert pattern.search(code)
    knowing = ("versions.py", "test_versions.py", "test_smoke_generate.py", "test_layout.py")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*sources(), *(ROOT / "tests").rglob("*.py")]
        if path.name not in knowing
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"take cached(), cache_of() and CACHE_KEYWORD from specdec.kv.versions: {found}"


@pytest.mark.parametrize(
    "code",
    [
        "import specdec; specdec.__version__; dir(specdec)",
        "from specdec.cli import app; app(['--help'], standalone_mode=False)",
    ],
    ids=["import specdec", "specdec --help"],
)
def test_torch_is_not_imported_before_it_is_needed(code: str) -> None:
    heavy = ("torch", "transformers", "numpy", "fastapi", "uvicorn", "prometheus_client")
    code += f"\nimport sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_lazy_export_exists() -> None:
    import specdec

    for name in specdec.__all__:
        assert getattr(specdec, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Speculater'"):
        specdec.Speculater  # noqa: B018


def test_the_structure_page_names_every_module() -> None:
    page = (ROOT / "docs" / "structure.md").read_text()
    named = set(re.findall(r"^- `([\w/]+\.py)`: \S", page, flags=re.MULTILINE))
    here = {str(path.relative_to(ROOT)) for path in sources() if path.name != "__init__.py"}
    assert named == here, "docs/structure.md has one sentence per module"


def test_every_result_file_that_is_named_is_there() -> None:
    """Results are ignored by git unless they are added by name, which is easily forgotten."""
    pages = [ROOT / "README.md", ROOT / "experiments" / "LOG.md", *(ROOT / "docs").rglob("*.md")]
    pattern = r"results/([a-z]+(?:-[a-z]+)*-\d{8}-\d{6}[a-z-]*\.(?:jsonl?|png))"
    named = {name for page in pages for name in re.findall(pattern, page.read_text())}
    here = {path.name for path in (ROOT / "experiments" / "results").iterdir()}
    assert len(named) > 20
    assert not named - here
