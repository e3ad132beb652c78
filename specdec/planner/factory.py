"""Planners for calls: the cost tables they need, found or measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from specdec.drafters import Drafter, ModelDrafter
from specdec.drafters.base import depth_limits
from specdec.drafters.model import DEFAULT_K
from specdec.loop import DecodeLoop
from specdec.planner.acceptance import Known
from specdec.planner.base import Planner
from specdec.planner.batch_planner import BatchPlanner
from specdec.planner.costs import Costs, implausible
from specdec.planner.measure import kept_processors, measure
from specdec.planner.measuring_planner import measured_depths
from specdec.planner.options import OptionBudget, Options
from specdec.planner.row_planner import RowPlanner
from specdec.planner.store import STORE, describe, machine
from specdec.report import SpecReport
from specdec.request import Request
from specdec.trace import StepTrace
from specdec.verify.first_use import first_use
from specdec.verify.purity import callers_code
from specdec.verify.strict_mode import StrictMode
from specdec.verify.weights import fingerprint

_EXACT_ROWS = 4
"""Up to so many rows have tables of their own; larger batches share one per size below."""
_SIZES = (6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class CallPlanner(BatchPlanner):
    """The planner of one request; notes about its tables go into `notes`, what it learned to `keep`."""

    def __init__(
        self,
        costs: dict[int, Costs],
        options: Options,
        rows: int,
        prompt_tokens: int,
        notes: list[str],
        known: Known,
        keep: Callable[[CallPlanner], None] | None,
        explores: bool,
    ):
        self.notes, self._keep = notes, keep
        self._tables = costs
        self._between: dict[int, Costs] = {}
        super().__init__(options, self._at, rows, prompt_tokens, known, explores)
        self.report.ms_measuring = 1e3 * sum(table.seconds for table in costs.values())

    def _at(self, rows: int) -> Costs:
        """The table for so many live rows, between two measured ones where rows have finished."""
        if rows in self._tables:
            return self._tables[rows]
        if rows not in self._between:
            sizes = sorted(self._tables)
            low = max((size for size in sizes if size <= rows), default=sizes[0])
            high = min((size for size in sizes if size >= rows), default=sizes[-1])
            share = 0.0 if low == high else (rows - low) / (high - low)
            self._between[rows] = _mixed(self._tables[low], self._tables[high], share)
        return self._between[rows]

    def tell(self, report: SpecReport) -> SpecReport:
        """Put what there is to say into a call's report."""
        report.plan = self.report
        report.notes += self.notes
        if self._keep is not None:
            self._keep(self)
        return report


class FixedDepth(Planner):
    """Where costs cannot be measured: chains of the usual length with the first option, as if `k` had been given."""

    def __init__(self, options: Options, notes: list[str]):
        self._options, self._notes = options, notes

    def budget(self, live: Sequence[int], left: Sequence[int | None], lengths: Sequence[int] = ()) -> OptionBudget:
        option = self._options.options[0]
        deepest = min(DEFAULT_K, len(option.widths)) if option.any_depth else len(option.widths)
        return OptionBudget(depth_limits(deepest, left), option.drafter.max_nodes, 0)

    def learn(self, trace: StepTrace, reached: Sequence[int]) -> None:
        pass

    def tell(self, report: SpecReport) -> SpecReport:
        report.notes += self._notes
        return report


class PlannerFactory:
    """Planners for the calls of one Speculator.

    Args:
        options: what may be drafted with. rule: as the user named it. strict: the mode its passes run in.
    """

    def __init__(self, target: PreTrainedModel, options: Options, rule: str, strict: StrictMode | None):
        self.options = options
        self._target, self._rule, self._strict = target, rule, strict
        self._fixed: dict[str, Any] | None = None
        self._keys: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._learned: dict[tuple[Any, ...], Known] = {}

    def planner_for(
        self, request: Request, make_loop: Callable[..., DecodeLoop] = DecodeLoop
    ) -> CallPlanner | RowPlanner | FixedDepth:
        """The planner of one call. Never raises: what fails while costs are measured must not end the call.

        Args:
            make_loop: what decodes while they are measured (see `DecodeLoop`).
        """
        rows = request.input_ids.shape[0]
        notes: list[str] = []
        tables: dict[int, Costs] = {}
        # What was planned leaves no trace in such texts: a call may begin with what those before it have found out.
        traceless = not request.config.do_sample or self._rule == "coupled"
        alone = request.seeded and not traceless
        try:
            for size in self._sizes(rows, alone):
                tables[size] = self._table(request, size, notes, make_loop)
        except Exception as fault:
            why = str(fault) or type(fault).__name__
            return FixedDepth(self.options, [*notes, f"costs could not be measured ({why}): not planned"])
        if alone:
            real = request.real
            counts = [request.input_ids.shape[1]] * rows if real is None else real.sum(1).tolist()
            return RowPlanner(tables[1], self.options, counts, notes)
        whole = tables[max(tables)]
        known, keep, explores = Known(whole.beliefs, whole.found), None, False
        if traceless:
            kind = (bool(request.config.do_sample), request.config.temperature)
            known = self._learned.get(kind, known)
            explores = rows in tables and STORE.explores(self._key(request, rows))

            def keep(planner: CallPlanner) -> None:
                self._learned[kind] = planner.known
                if rows in tables:
                    STORE.refine(self._key(request, rows), planner.explorer.took)

        return CallPlanner(tables, self.options, rows, request.input_ids.shape[1], notes, known, keep, explores)

    def _sizes(self, rows: int, alone: bool) -> list[int]:
        """Numbers of rows whose tables a call of `rows` rows needs, its own first.

        Raises:
            RuntimeError: no table that such a call needs may be measured.
        """
        own = next((option.drafter for option in self.options.options if _is_callers(option.drafter)), None)
        if own is None:
            return [1] if alone else sorted({1, _size(rows)}, reverse=True)
        if alone and rows > 1:
            raise RuntimeError(f"{type(own).__name__} would have to draft for one row where the call has {rows}")
        return [rows]

    def _key(self, request: Request, rows: int) -> dict[str, Any]:
        """What the table of such calls is kept under. Processors that were not run while it was measured count as well,
        since later calls correct the table with them."""
        kept = kept_processors(request.processors)
        own = {
            "sampling": bool(request.config.do_sample),
            "processors": [type(one).__name__ for one in kept],
            "unmeasured": [_full_name(one) for one in request.processors if one not in kept],
            "rows": rows,
            "threads": torch.get_num_threads(),
            "dtype": str(self._target.dtype),
            "device": str(self._target.device),
        }
        name = tuple(map(str, own.values()))
        if name not in self._keys:
            self._keys[name] = {**self._settings(), **own}
        return self._keys[name]

    def _table(self, request: Request, rows: int, notes: list[str], make_loop: Callable[..., DecodeLoop]) -> Costs:
        key = self._key(request, rows)
        depths = {option.name: range(1, len(option.widths) + 1) for option in self.options.options}
        costs, note = STORE.get(key, lambda found: implausible(found, rows, depths))
        notes += [] if note is None else [note]
        if costs is None:
            for model in (self._target, *self._models()):
                found = callers_code(model)
                if found is not None:
                    raise RuntimeError(f"{found}, which would run in passes that the call does not make")
            with first_use():
                costs = measure(
                    request, self._target, self.options, self._rule, rows, self._strict, make_loop=make_loop
                )
            note = STORE.put(key, replace(costs, seconds=0.0))
            notes += [] if note is None else [note]
        return costs

    def _settings(self) -> dict[str, Any]:
        """What the tables of every call depend on."""
        if self._fixed is None:
            options, models = self.options.options, self._models()
            self._fixed = {
                "target": describe(self._target),
                "drafts": [describe(model) for model in models],
                "weights": [fingerprint(model) for model in (self._target, *models)],
                "options": [[one.name, list(one.widths), measured_depths(one)] for one in options],
                "drafters": [_full_name(one.drafter) for one in options],
                "machine": machine(),
                "rule": self._rule,
                "strict": None if self._strict is None else self._strict.width,
            }
        return self._fixed

    def _models(self) -> list[PreTrainedModel]:
        drafters = [option.drafter for option in self.options.options]
        return list({id(one.model): one.model for one in drafters if isinstance(one, ModelDrafter)}.values())


def _full_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _is_callers(drafter: Drafter) -> bool:
    """Is a drafter the caller's own code? It is measured in the shape of the call only."""
    return not type(drafter).__module__.startswith("specdec.")


def _size(rows: int) -> int:
    """The batch size whose table serves `rows` rows."""
    if rows <= _EXACT_ROWS:
        return rows
    return next((size for size in _SIZES if size >= rows), _SIZES[-1])


def _mixed(low: Costs, high: Costs, share: float) -> Costs:
    """Linear between two tables."""

    def at(a: float, b: float) -> float:
        return a + share * (b - a)

    depths = {name: sorted({*low.steps[name], *high.steps[name]}) for name in low.steps}
    steps = {name: {d: at(low.step(name, d), high.step(name, d)) for d in depths[name]} for name in depths}
    return Costs(
        low.rows, at(low.plain, high.plain), steps, at(low.draft_token, high.draft_token),
        at(low.prompt_token, high.prompt_token), low.beliefs, low.found,
    )  # fmt: skip
