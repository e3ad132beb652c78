"""Random calls in every form, with sense and without: plain `generate`'s answer or a clear refusal, nothing broken.

The suite runs a few hundred calls, always the same. Five thousand new ones, and one of them again:

    FUZZ_CALLS=5000 FUZZ_SEED=1 python -m pytest -q tests/test_fuzz.py -k random
    FUZZ_SEED=1 FUZZ_ONLY=17 python -m pytest -q tests/test_fuzz.py -k random
"""

from __future__ import annotations

import os

from fuzz.run import fuzz

CALLS = int(os.environ.get("FUZZ_CALLS", "300"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
ONLY = os.environ.get("FUZZ_ONLY")


def test_random_calls() -> None:
    indices = range(CALLS) if ONLY is None else [int(number) for number in ONLY.split(",")]
    findings = fuzz(SEED, indices)
    assert not findings, "\n\n".join(map(str, findings))
