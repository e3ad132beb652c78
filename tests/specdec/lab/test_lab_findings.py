"""The last line of a check says what it did not judge, and what it judged with too few samples."""

from __future__ import annotations

from specdec.lab.findings import WEAK, CheckReport, Finding, verdict

STRONG = Finding("strong", "pass", "", sees=WEAK / 2)
FEW = Finding("few", "pass", "", sees=2 * WEAK)
LEFT_OUT = Finding("left out", "skipped", "")
COUNT = Finding("count", "pass", "")  # no question of samples


def test_a_passed_check_names_what_it_did_not_see() -> None:
    report = CheckReport((STRONG, FEW, LEFT_OUT, COUNT), {})
    assert report.passed
    assert verdict(report).endswith("not judged: left out; hardly judged, for want of samples (--budget): few")
    assert [line.split()[0] for line in report.summary().splitlines()[:-1]] == ["pass", "weak", "skipped", "pass"]
    assert [finding["weak"] for finding in report.to_dict()["findings"]] == [False, True, False, False]
    assert verdict(CheckReport((STRONG, COUNT), {})) == "passed: nothing found that contradicts exactness"


def test_an_error_is_one_however_few_samples_showed_it() -> None:
    found = Finding("few", "FAIL", "", sees=2 * WEAK)
    assert found.label == "FAIL"
    assert verdict(CheckReport((found, LEFT_OUT), {})) == "FAILED: few"
