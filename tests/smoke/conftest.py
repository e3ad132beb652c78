"""What every smoke test shares: no network, one thread, a cache folder of its own, and no deprecated call of ours.

These tests need pytest and nothing else beside the library, and know nothing of the folders of the checkout.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub at import: no test may reach for a model hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "SPECDEC_CACHE" not in os.environ:  # compiled once, for the commands that tests start as well
    os.environ["SPECDEC_CACHE"] = tempfile.mkdtemp(prefix="specdec-smoke-")
    atexit.register(shutil.rmtree, os.environ["SPECDEC_CACHE"], ignore_errors=True)

import pytest
import torch

import specdec

torch.set_num_threads(1)

if os.environ.get("SPECDEC_SMOKE_WHEEL"):
    home = Path(sysconfig.get_path("purelib"))
    assert home in Path(specdec.__file__).parents, f"expected the wheel in {home}, got {specdec.__file__}"


class _Deprecations(logging.Handler):
    """Keeps what transformers logs about names that it has given up."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def deprecations() -> Iterator[list[str]]:
    """What transformers logs about deprecated names, which must be nothing at the end. (Warnings are errors.)"""
    handler, logger = _Deprecations(), logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)  # a command that ran before in this process may have silenced it
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert not handler.messages


@pytest.fixture(scope="session")
def saved_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `target/` and `draft/`: tiny random models with a byte-level tokenizer."""
    from tiny_pair import save_pair

    return save_pair(tmp_path_factory.mktemp("pair"))
