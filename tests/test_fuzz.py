"""Random calls in every form, with sense and without: plain `generate`'s answer or a clear refusal, nothing broken.

The suite runs a few hundred calls, always the same. Five thousand new ones, and one of them again:

    FUZZ_CALLS=5000 FUZZ_SEED=1 python -m pytest -q tests/test_fuzz.py -k random
    FUZZ_SEED=1 FUZZ_ONLY=17 python -m pytest -q tests/test_fuzz.py -k random
"""

from __future__ import annotations

import os

import pytest
from fuzz import outcome, planted
from fuzz.oracle import judge
from fuzz.run import fuzz, fuzz_among
from fuzz.subjects import Subjects

CALLS = int(os.environ.get("FUZZ_CALLS", "300"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
ONLY = os.environ.get("FUZZ_ONLY")


def test_random_calls() -> None:
    indices = range(CALLS) if ONLY is None else [int(number) for number in ONLY.split(",")]
    findings = fuzz(SEED, indices)
    assert not findings, "\n\n".join(map(str, findings))


@pytest.mark.parametrize("name", planted.FAULTS)
def test_planted_faults_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In no more than forty calls; the very call is well without the fault."""
    fault = planted.FAULTS[name]
    monkeypatch.setattr(outcome, "SECONDS", 2)
    with monkeypatch.context() as patch:
        fault.plant(patch)
        found = fuzz_among(fault.calls, range(40))
    assert found is not None, "not found"
    assert found.kind in fault.kinds, str(found)
    well = judge(found.call, Subjects(), thorough=True)
    assert well is None, f"a finding without any fault: {well}"
