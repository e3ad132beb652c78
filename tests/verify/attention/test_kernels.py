"""The Triton kernels compute tree attention, interpreted on the CPU, and refuse what they cannot compute."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import AttentionCase, states

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.attention import launch
from specdec.verify.attention.launch import triton_attention

TESTS = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_interpreted_kernels_are_right() -> None:
    """In a process of its own: whether Triton interprets is decided when it is first imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "interpreted_kernels.py"],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"^(\d+) passed", done.stdout, flags=re.MULTILINE)
    assert passed is not None, done.stdout[-2000:]
    assert int(passed[1]) >= 45


class TestWhatTheKernelsRefuse:
    def test_a_cpu(self) -> None:
        given = states(AttentionCase((9,), 3))
        with pytest.raises(UnsupportedArgumentError, match=r"CUDA devices \(tensors are on cpu\)"):
            triton_attention(given.query, given.key, given.value, given.plan, given.scale)

    @pytest.mark.parametrize(
        ("case", "reason"),
        [
            (AttentionCase((9,), 3, dtype=torch.float64), "not torch.float64"),
            (AttentionCase((9,), 3, head_dim=264), "up to 256, not 264"),
        ],
        ids=["float64", "head_dim"],
    )
    def test_states_they_cannot_hold(self, case: AttentionCase, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton")
        monkeypatch.setattr(launch, "interpreting", lambda: True)
        given = states(case)
        assert reason in str(launch.triton_serves(given.query, given.key, given.value))

    def test_strided_last_dimensions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton")
        monkeypatch.setattr(launch, "interpreting", lambda: True)
        given = states(AttentionCase((9,), 3))
        key = given.key.mT.contiguous().mT
        assert "must be dense" in str(launch.triton_serves(given.query, key, given.value))

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
        given = states(AttentionCase((9,), 3))
        assert "pip install 'specdec-lm[kernels]'" in str(launch.triton_serves(given.query, given.key, given.value))


@pytest.mark.parametrize(
    ("programs", "blocks", "splits"),
    [(8, 128, 2), (1, 128, 16), (1, 3, 1), (1, 8, 4), (1000, 4096, 1), (0, 0, 1)],
)
def test_splits_fill_the_device(programs: int, blocks: int, splits: int) -> None:
    """Eight processors (what is assumed without a GPU), two waves, at least two blocks per split, a power of two."""
    assert launch.num_splits(programs, blocks, torch.device("cpu")) == splits


def test_triton_is_imported_only_when_it_is_used() -> None:
    code = "import specdec.verify.attention.choose, sys; print('specdec.verify.attention.kernel' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
