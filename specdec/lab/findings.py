"""What a check found: one line per test, and whether the pair passed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["pass", "FAIL", "info", "skipped"]
WEAK = 0.25
"""A test that sees only larger errors than this (total variation of a law; tokens per draft) is passed by much that is
wrong."""


@dataclass(frozen=True)
class Finding:
    """One test. status: "info" and "skipped" never fail a check. figures: the numbers behind `detail`.

    sees: the smallest error that the test's samples show as a rule, None where that is no question of samples.
    """

    name: str
    status: Status
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)
    sees: float | None = None

    @property
    def label(self) -> str:
        """The status, and "weak" for a test that passed with too few samples to say much."""
        return "weak" if self.status == "pass" and self.sees is not None and self.sees > WEAK else self.status


@dataclass(frozen=True)
class CheckReport:
    """All findings of one check, in the order they were made.

    settings: what was checked and with how many samples, ready for JSON.
    """

    findings: tuple[Finding, ...]
    settings: dict[str, Any]

    @property
    def passed(self) -> bool:
        return all(finding.status != "FAIL" for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        """The finding called `name`.

        Raises:
            KeyError: there is none.
        """
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"expected one of {[finding.name for finding in self.findings]}, got {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: infinities and NaN become strings."""
        plain: dict[str, Any] = _jsonable(
            {
                "passed": self.passed,
                "settings": self.settings,
                "findings": [{**asdict(f), "weak": f.label == "weak"} for f in self.findings],
            }
        )
        return plain

    def summary(self) -> str:
        """A plain-text table for people."""
        width = max(len(finding.name) for finding in self.findings)
        lines = [f"{f.label:<7}  {f.name:<{width}}  {f.detail}" for f in self.findings]
        return "\n".join([*lines, verdict(self)])


def verdict(report: CheckReport) -> str:
    """The last line, in words."""
    if report.passed:
        said = "passed: nothing found that contradicts exactness"
        for what, label in (("not judged", "skipped"), ("hardly judged, for want of samples (--budget)", "weak")):
            if names := [finding.name for finding in report.findings if finding.label == label]:
                said += f"; {what}: {', '.join(names)}"
        return said
    wrong = ", ".join(finding.name for finding in report.findings if finding.status == "FAIL")
    return f"FAILED: {wrong}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
