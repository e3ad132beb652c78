"""Many calls on the same objects."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from fuzz.draw import draw, sensible
from fuzz.oracle import Finding, judge
from fuzz.shrink import shrink
from fuzz.subjects import Subjects


def fuzz(seed: int, indices: Iterable[int], subjects: Subjects, most: int = 5) -> list[Finding]:
    """Judge the calls of these numbers; the first `most` findings, made small."""
    findings: list[Finding] = []
    for index in indices:
        found = judge(draw(seed, index), subjects, thorough=index % 10 == 0)
        if found is not None:
            findings.append(shrink(found))
            if len(findings) >= most:
                break
    return findings


def fuzz_among(fields: dict[str, Any], indices: Iterable[int]) -> Finding | None:
    """The first finding, as it is, among sensible calls with these fields."""
    subjects = Subjects()
    for index in indices:
        found = judge(sensible(random.Random(index), f"number {index}", **fields), subjects, thorough=index % 4 == 3)
        if found is not None:
            return found
    return None
