"""Folders of quantised models whose package is not installed: one line that says what is missing, for every format."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch

from specdec.kv.errors import SpecdecError
from specdec.pairing.loading import load_model

WORDS: dict[str, Any] = {"bits": 4, "group_size": 32}
FORMATS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptq": ("optimum", {**WORDS, "desc_act": False}, r"pip install optimum"),
    "awq": ("gptqmodel", {**WORDS, "zero_point": True, "version": "gemm"}, r"pip install gptqmodel"),
    "bitsandbytes": ("bitsandbytes", {"load_in_8bit": True}, r"bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", {"format": "pack-quantized"}, r"compressed-tensors"),
    "hqq": ("hqq", {"weights": {"nbits": 4}}, r"hqq|HQQ"),
    "quanto": ("optimum.quanto", {"weights": "int8"}, r"quanto"),
}


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", FORMATS)
def test_a_missing_package_is_named(method: str, tmp_path: Path) -> None:
    package, settings, wanted = FORMATS[method]
    if installed(package):
        pytest.skip(f"{package} is installed")
    models.llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecdecError, match=wanted) as caught:
        load_model("target", str(tmp_path), "auto", torch.device("cpu"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("target: could not load")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp8_of_fbgemm_needs_a_gpu(tmp_path: Path) -> None:
    models.llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fbgemm_fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecdecError, match="GPU"):
        load_model("target", str(tmp_path), "auto", torch.device("cpu"))
