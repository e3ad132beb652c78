"""Settings every test shares: one thread, reproducible hypothesis, no network, GPU tests only where there is a GPU."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub at import: no test may reach for a model hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["SPECDEC_CACHE"] = "off"  # cost tables of test models stay in memory

import pytest
import torch
from hypothesis import HealthCheck, settings

from specdec.verify.native.build import Unavailable, compiled
from specdec.verify.native.library import VARIABLE

pytest_plugins = ["time_limits"]

torch.set_num_threads(1)

if VARIABLE not in os.environ:  # compiled once, for the commands that tests start as well
    with suppress(Unavailable):
        os.environ[VARIABLE] = str(compiled(Path(__file__).parents[1] / ".pytest_cache" / "native"))

settings.register_profile(
    "specdec",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("specdec")


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `target/` and `draft/`: tiny random models with a byte-level tokenizer."""
    from tiny_pair import save_pair

    return save_pair(tmp_path_factory.mktemp("tiny-pair"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
