"""Many calls on the same objects."""

from __future__ import annotations

from collections.abc import Iterable

from fuzz.draw import draw
from fuzz.oracle import Finding, judge
from fuzz.shrink import shrink
from fuzz.subjects import Subjects


def fuzz(seed: int, indices: Iterable[int], most: int = 5) -> list[Finding]:
    """Judge the calls of these numbers; the first `most` findings, made small."""
    subjects, findings = Subjects(), []
    for index in indices:
        found = judge(draw(seed, index), subjects, thorough=index % 10 == 0)
        if found is not None:
            findings.append(shrink(found))
            if len(findings) >= most:
                break
    return findings
