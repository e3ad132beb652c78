"""OpenAI's API over HTTP on `specdec.Engine`: the extra `serve`. Names are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "ServeOptions": "specdec.serve.options",
    "create_app": "specdec.serve.app",
    "run": "specdec.serve.server",
    "running": "specdec.serve.server",
}

__all__ = ["ServeOptions", "create_app", "run", "running"]

if TYPE_CHECKING:
    from specdec.serve.app import create_app
    from specdec.serve.options import ServeOptions
    from specdec.serve.server import run, running


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'specdec.serve' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
