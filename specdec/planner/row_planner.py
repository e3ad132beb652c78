"""Drafts for texts that a seed determines: every row is planned by itself, as if it were decoded alone."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

from specdec.planner.base import Planner
from specdec.planner.batch_planner import BatchPlanner
from specdec.planner.costs import Costs
from specdec.planner.options import OptionBudget, Options
from specdec.planner.summary import PlanReport
from specdec.report import SpecReport
from specdec.trace import StepTrace


class RowPlanner(Planner):
    """One planner per row, fed with nothing but that row and with the costs of a single one.

    How deep a row drafts decides which noise its later tokens meet: a choice made for the whole batch would make a
    sampled row's text depend on its companions, which a call with a seed promises not to. The price: a large batch
    may draft deeper than pays, and of several drafters only the first is used.

    Args:
        costs: of steps with one live row. prompts: tokens of each row's prompt, pads left out.
    """

    def __init__(self, costs: Costs, options: Options, prompts: Sequence[int], notes: list[str]):
        self._options, self._notes = options, notes
        first = options.options[0]
        self._view = SimpleNamespace(
            options=(first,), max_depth=first.drafter.max_depth, used=None, asked=[], heard=None
        )
        view = cast(Options, self._view)
        # Without the table's beliefs: the first caller's prompt would leave its trace in others' texts.
        self._rows = [BatchPlanner(view, lambda rows: costs, 1, count) for count in prompts]
        self._rows[0].report.ms_measuring = 1e3 * costs.seconds
        self._budgets: list[OptionBudget] = []

    def budget(self, live: Sequence[int], left: Sequence[int | None], lengths: Sequence[int] = ()) -> OptionBudget:
        held = [lengths[i : i + 1] for i in range(len(live))]
        self._budgets = [
            self._rows[row].budget([0], [tokens], own) for row, tokens, own in zip(live, left, held, strict=True)
        ]
        depths = tuple(budget.depths[0] for budget in self._budgets)
        return OptionBudget(depths, max(budget.max_nodes for budget in self._budgets))

    def learn(self, trace: StepTrace, reached: Sequence[int]) -> None:
        for i, row in enumerate(trace.rows):
            drafted = trace.drafted[i] > 0
            self._view.used = 0 if drafted else None
            asks = self._view.options[0].may_be_empty and self._budgets[i].max_depth > 0
            self._view.asked = [(0, int(drafted))] if asks else []
            self._rows[row].learn(_alone(trace, i), reached[i : i + 1])

    def tell(self, report: SpecReport) -> SpecReport:
        """Put what there is to say into a call's report. There is no forecast for a batch as a whole."""
        reports = [planner.report for planner in self._rows]
        report.plan = reports[0] if len(reports) == 1 else _together(reports)
        report.notes += self._notes
        return report


def _alone(trace: StepTrace, i: int) -> StepTrace:
    """What the step was for its i-th row."""
    one = slice(i, i + 1)
    return StepTrace(
        trace.step, [0], trace.drafted[one], trace.accepted[one], trace.emitted[one], trace.kinds[one],
        trace.ms_draft, trace.ms_verify, trace.ms_rest,
    )  # fmt: skip


def _together(reports: Sequence[PlanReport]) -> PlanReport:
    """Steps of all rows, by what they drafted."""
    whole = PlanReport(ms_measuring=reports[0].ms_measuring)
    for report in reports:
        for name, count in report.steps.items():
            whole.steps[name] = whole.steps.get(name, 0) + count
        whole.num_probes += report.num_probes
        whole.num_stops += report.num_stops
        whole.why_plain = report.why_plain or whole.why_plain
    return whole
