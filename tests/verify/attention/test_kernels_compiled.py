"""The Triton kernels compile ahead of time for the GPUs they are meant for; no GPU is needed for that."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.verify.attention.launch import Tiles, compiled_constants

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton compiles nothing now"),
]


@pytest.mark.parametrize(
    ("capability", "dtype", "page", "floors", "splits"),
    [
        (80, "bf16", 0, False, 8),
        (90, "bf16", 0, False, 8),
        (100, "bf16", 0, False, 8),
        (90, "bf16", 16, True, 1),
        (80, "fp16", 256, False, 16),
        (90, "fp32", 0, False, 8),
        (100, "fp32", 7, True, 2),
    ],
)
def test_compiled_ahead_of_time(
    capability: int, dtype: str, page: int, floors: bool, splits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without a GPU can compile for one: Llama-3-8B's heads, trees up to 16 nodes in one tile."""
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # an old result must not stand in for a new one
    from specdec.verify.attention.kernel import combine_kernel, tree_attention_kernel

    tiles = Tiles.of(4 * 16, 128, DTYPES[dtype])
    constants = compiled_constants(8, 4, 128, 128, tiles, splits, page, floors)
    assembly = compiled(triton, tree_attention_kernel, constants, dtype, capability, tiles)
    tensor_cores = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[capability]
    assert (tensor_cores in assembly["ptx"]) == (dtype != "fp32"), "16-bit products belong on the tensor cores"
    assert "cp.async" in assembly["ptx"], "K/V is not loaded ahead"
    assert f".target sm_{capability}" in assembly["ptx"]
    assert len(assembly["cubin"]) > 10_000
    assert spilled_bytes(triton, assembly["cubin"], tmp_path) == 0, "smaller tiles are needed"
    if splits > 1:
        constants = {"DV": 128, "BLOCK_DV": 128, "SPLITS": splits}
        assembly = compiled(triton, combine_kernel, constants, dtype, capability, Tiles(0, 0, 2, 2))
        assert len(assembly["cubin"]) > 1_000


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("bf16", 64), ("bf16", 256), ("fp16", 80), ("fp32", 64), ("fp32", 256)]
)
def test_no_head_size_spills_registers(
    dtype: str, head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from specdec.verify.attention.kernel import tree_attention_kernel

    tiles = Tiles.of(64, head_dim, DTYPES[dtype])
    constants = compiled_constants(8, 4, head_dim, head_dim, tiles, 4, 0, False)
    assembly = compiled(triton, tree_attention_kernel, constants, dtype, 90, tiles)
    assert spilled_bytes(triton, assembly["cubin"], tmp_path) == 0


def spilled_bytes(triton: Any, cubin: bytes, folder: Path) -> int:
    """Stack a compiled kernel uses: registers that did not fit."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("Triton came without cuobjdump")
    (folder / "kernel.cubin").write_bytes(cubin)
    command = [str(tool), "--dump-resource-usage", str(folder / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1])


def compiled(
    triton: Any, kernel: Any, constants: dict[str, Any], dtype: str, capability: int, tiles: Tiles
) -> dict[str, Any]:
    """Assembly as the launcher would get it: pointers and strides are multiples of 16, counts are anything."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {"lengths_ptr": "*i32", "floors_ptr": "*i32", "table_ptr": "*i32", "seen_ptr": "*u8", "scale_log2": "fp32"}
    kinds |= {"part_ptr": "*fp32", "lse_ptr": "*fp32"}
    kinds |= {f"{name}_ptr": f"*{dtype}" for name in ("query", "key", "value", "out")}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    even = ("query_", "key_", "value_", "out_", "part_", "lse_")
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.startswith(even)}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    found: dict[str, Any] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
    return found
