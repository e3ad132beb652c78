"""From a failing call to a small one that fails in the same way."""

from __future__ import annotations

from fuzz.oracle import Finding, judge
from fuzz.subjects import Subjects


def shrink(finding: Finding, most: int = 60, subjects: Subjects | None = None) -> Finding:
    """Drop one piece after the other while what remains still fails alike; `most` calls are tried.

    New objects serve every try, so that the small call fails by itself, unless the faulty call needed the old ones.
    """
    for _ in range(most):
        for smaller in finding.call.smaller():
            most -= 1
            again = judge(smaller, Subjects(), thorough=finding.kind == "broken afterwards")
            if again is not None and again.kind == finding.kind:
                finding = again
                break
            if most <= 0:
                return finding
        else:
            return finding
    return finding
