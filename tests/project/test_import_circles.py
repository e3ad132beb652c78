"""No module needs, directly or through others, a module that needs it: not even for types, not even late.

Every import counts, wherever it stands. Under `TYPE_CHECKING` a reader must still know both modules to understand one;
inside a function, there to load late, it is the same need, only later. What does not count is what Python does by
itself: it runs the `__init__.py` above a module first, and by that every package that gathers names would be a circle.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest
from source_files import floor_of_module, module_name, sources

Edges = Mapping[str, set[str]]


def needs(source: str, modules: set[str]) -> set[str]:
    """Those of `modules` that `source` imports. A name from a package counts as the package, unless it is a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & modules
            if inner - modules:
                found.add(str(node.module))
    return found & modules


def graph(files: Mapping[str, str]) -> Edges:
    """Module -> modules it imports, from module -> source."""
    return {name: needs(source, set(files)) - {name} for name, source in files.items()}


def circles(edges: Edges) -> list[set[str]]:
    """Sets of modules that all reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in edges[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    after = {name: reached(name) for name in edges}
    found = [{other for other in after[name] if name in after[other]} for name in edges if name in after[name]]
    return [group for i, group in enumerate(found) if group not in found[:i]]


def own_package(edges: Edges, packages: set[str]) -> set[str]:
    """Modules that import a package around them on their own floor. (The face of the library lies around the floors
    above it, too: those may import it.)"""
    return {
        name
        for name, needed in edges.items()
        for other in needed & packages
        if name.startswith(f"{other}.") and floor_of_module(name) == floor_of_module(other)
    }


def _files() -> dict[str, Path]:
    return {module_name(path): path for path in sources()}


@pytest.fixture(scope="module")
def library() -> Edges:
    return graph({name: path.read_text() for name, path in _files().items()})


def test_no_module_needs_itself_through_others(library: Edges) -> None:
    found = [sorted(group) for group in circles(library)]
    assert not found, f"move what both need below them, or hand it over as an argument: {found}"


def test_nobody_imports_the_package_it_lies_in(library: Edges) -> None:
    packages = {name for name, path in _files().items() if path.name == "__init__.py"}
    assert not own_package(library, packages), "import the module a name comes from"


A = "specdec.a"
ELSEWHERE = {"specdec.b": "import specdec.c", "specdec.c": "from specdec.a import x", "specdec.kv": ""}


@pytest.mark.parametrize(
    "source",
    [
        "import specdec.b",
        "from specdec import b",
        "from specdec.b import thing",
        "def late():\n    from specdec.b import thing",
        "if TYPE_CHECKING:\n    from specdec.b import Thing",
    ],
)
def test_the_check_sees_each_circle(source: str) -> None:
    assert circles(graph({A: source, **ELSEWHERE})) == [{A, "specdec.b", "specdec.c"}]
    assert not circles(graph({A: "import specdec.kv", **ELSEWHERE}))


def test_the_check_sees_who_imports_its_own_package() -> None:
    edges = graph({"specdec.kv": "import specdec.kv.base", "specdec.kv.base": "from specdec.kv import x", "specdec": "",
                   "specdec.cli.app": "import specdec"})  # fmt: skip
    assert own_package(edges, {"specdec", "specdec.kv"}) == {"specdec.kv.base"}
