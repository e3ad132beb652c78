"""`python -m specdec.experiments.accept`: the same as `specdec accept`; the form for `accelerate launch -m`."""

from __future__ import annotations

import sys

import typer

from specdec.experiments.accept.options import AcceptOptions, ReportOptions, ScoreOptions
from specdec.experiments.frame import Command


def run(options: AcceptOptions) -> int:
    """Acceptance of drafts: settings x rules x temperatures x prompts. Interrupted runs resume.

    Measures acceptance per position, tokens per step and per second of every setting, rule and temperature.
    """
    from specdec.experiments.accept.runner import run

    return run(options)


def score(options: ScoreOptions) -> None:
    """What other rules, k and trees would have done on the logged texts: no model is run."""
    from specdec.experiments.accept.scores import score_folder

    score_folder(options)


def report(options: ReportOptions) -> None:
    """Write the run's report again: one HTML file with everything in it, and its plots as PNG."""
    from specdec.experiments.accept.report.page import write_report
    from specdec.experiments.accept.store import Store

    for path in write_report(Store(options.folder), options.out):
        typer.echo(f"wrote {path}")


main = Command(AcceptOptions, run, score=Command(ScoreOptions, score), report=Command(ReportOptions, report))

if __name__ == "__main__":
    sys.exit(main())
