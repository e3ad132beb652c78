"""Cost tables by what they were measured for: in this process, and in a file of the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from specdec.forks import renewed_after_fork
from specdec.hardware import cpu_name, gpu_name
from specdec.kv import UnsupportedArgumentError
from specdec.planner.cost_refinement import StepKind, refined
from specdec.planner.costs import Costs
from specdec.verify.folders import cache_folder, write_whole
from specdec.verify.passes.choose import runs_natively
from specdec.version import __version__

SCHEMA = 3

_EXPLORING = 8
"""Calls of a process that may try what else there is, to correct a table; and of later ones, every so many."""

_PASSING = ("_name_or_path", "transformers_version", "architectures")
"""Configuration entries that do not change what a pass costs."""


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model that its speed depends on, ready for JSON."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _PASSING}
    devices = sorted({str(weight.device) for weight in model.parameters()})
    dtypes = sorted({str(weight.dtype) for weight in model.parameters()})
    return {
        "class": type(model).__name__,
        "config": json.loads(json.dumps(config, default=str, sort_keys=True)),
        "attention": model.config._attn_implementation,
        "devices": devices,
        "dtypes": dtypes,
        "native": runs_natively(model),
    }


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "gpu": gpu_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "specdec": __version__,
    }


class CostStore:
    """Tables by key. A key is any JSON-ready description; equal descriptions share a table.

    A table stays the same, file and all, unless `refine` is called: the same call that knows as much is planned the
    same way again.
    """

    def __init__(self) -> None:
        self._known: dict[str, Costs] = {}
        self._refined: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        self._lock = Lock()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        self._lock = Lock()

    def explores(self, key: Mapping[str, Any]) -> bool:
        """May the call at hand try others than the best candidate? The first eight of a process, then every eighth."""
        name = _name(key)
        with self._lock:
            count = self._asked[name] = self._asked.get(name, 0) + 1
        return count <= _EXPLORING or count % _EXPLORING == 0

    def refine(self, key: Mapping[str, Any], took: Mapping[StepKind, Sequence[float]]) -> None:
        """Correct a known table by the steps of one call, and write it every time their number has doubled."""
        name = _name(key)
        with self._lock:  # calls of several Speculators may end at once
            old = self._known[name]
            new = refined(old, took)
            if new is old:
                return
            self._known[name] = new
            count = self._refined[name] = self._refined.get(name, 0) + 1
        if count & (count - 1) == 0:
            self._write(name, key, new)

    def get(
        self, key: Mapping[str, Any], wrong: Callable[[Costs], str | None] = lambda _: None
    ) -> tuple[Costs | None, str | None]:
        """The table and, if its file was no good, a sentence about it.

        Args:
            wrong: what is wrong with a table that was read from a file, if anything is.
        """
        name = _name(key)
        if name in self._known:
            return self._known[name], None
        folder = cache_folder()
        if folder is None:
            return None, None
        path = folder / name
        try:
            data = json.loads(path.read_text())
            if data["schema"] != SCHEMA or data["key"] != key:
                return None, None
            found = Costs.from_json(data["costs"])
        except FileNotFoundError:
            return None, None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, UnsupportedArgumentError) as error:
            return None, f"cost table {path.name} is not readable and is measured again ({error})"
        why = wrong(found)
        if why is not None:
            return None, f"cost table {path.name} cannot have been measured and is measured again ({why})"
        self._known[name] = found
        return found, None

    def put(self, key: Mapping[str, Any], costs: Costs) -> str | None:
        """Keep a table; a sentence when it could not be written (it is then known to this process only)."""
        name = _name(key)
        self._known[name] = costs
        return self._write(name, key, costs)

    def _write(self, name: str, key: Mapping[str, Any], costs: Costs) -> str | None:
        folder = cache_folder()
        if folder is None:
            return None
        text = json.dumps({"schema": SCHEMA, "key": key, "costs": costs.to_json()}, indent=1)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / name, text + "\n")
        except OSError as error:
            return f"cost table not written to {folder}: {error.strerror or error}"
        return None


def _name(key: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"costs-{digest[:24]}.json"


STORE = CostStore()
"""The process's tables (as `specdec.verify.passes.linear.FORMS` are its kernels)."""
