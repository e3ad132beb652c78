"""Which drafter, how deep, now: the plan of every step of one call, and when to decode plainly instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil

from specdec.planner.base import Planning
from specdec.planner.choice import MARGIN, Candidate, Situation, candidates, ends_sooner, fastest
from specdec.planner.costs import Costs
from specdec.planner.history import History, Known, would_be_kept
from specdec.planner.options import Option, Options, PlannedBudget
from specdec.planner.risk import RISK, Pause, Risk
from specdec.planner.summary import PlanReport
from specdec.report import StepTrace
from specdec.verify.kinds import DraftKind

PROBE_DEPTH = 2
PROBE_FADE = 0.6
"""What is left of the evidence when a probe asks whether it still holds."""
PROVEN = 8.0
"""Decisions after which an option in use is judged by its acceptance alone."""
REPLAN = 4
"""Steps of a batch between two looks at all candidates."""
REPLAN_ONE = 2
"""The same for a single row."""
_ASKING = 0.005
"""Share of a plain step that asking an option that may be empty costs."""
_FOUND_WEIGHT, _FOUND_MEMORY = 4.0, 0.95
_TRUSTED, _PROMISING = 3.0, 1.15
"""Allowances that a drafter may risk which, by what it did before this call, makes it so much faster."""
_SIDE_SHARE = 0.4
"""Share of the allowance that an option which may be empty can use up beside others."""
_CHAINS = DraftKind("chain", "deterministic")
_HOPELESS, _LONG = 0.2, 64
"""Drafters of which so few tokens are accepted, now and before this call, are probed after so many plain steps."""


class Planner(Planning):
    """Plans one call: before every step `budget`, after it `learn`.

    A plan maximises expected tokens per millisecond over all live rows, unless that would end the batch later, from
    the cost table, the acceptance seen in this call and what was `known` before it. The clock is never asked, so the
    same call with the same table and knowledge is planned the same way again, and nothing a plan looks at was drawn in
    the step it is for (algorithms B.5).

    Args:
        options: what can be drafted with.
        costs: live rows -> their table.
        rows, prompt_tokens: of the call.
        known: what earlier drafts tell, if any.
    """

    def __init__(
        self, options: Options, costs: Callable[[int], Costs], rows: int, prompt_tokens: int, known: Known | None = None
    ):
        known = Known() if known is None else known
        self._options, self._costs, self._prompt_tokens = options, costs, prompt_tokens
        deepest = options.max_depth
        # Asked once: the property reads the model's configuration, which is slow.
        self._keeping = {option.name for option in options.options if option.drafter.num_cache_layers}
        self._history = {option.family: History(deepest, rows, known.beliefs.get(option.family))
                         for option in options.options}  # fmt: skip
        self._found = [(known.found.get(option.name, 0.5) * _FOUND_WEIGHT, _FOUND_WEIGHT) for option in options.options]
        self._debts = [0.0] * len(options.options)
        self._risk: Risk | None = None
        self._pause = Pause()
        self._current: tuple[int, int] | None = None
        self._fresh = 0
        self._plans: dict[int, Candidate] = {}
        self._now: Situation | None = None
        self._plain_ms = 0.0
        self._behind = prompt_tokens
        self.report = PlanReport()

    def budget(self, live: Sequence[int], left: Sequence[int | None]) -> PlannedBudget:
        if self._risk is not None and self._pause.waits():  # most steps where drafts are no use: nothing is computed
            self._plans, self._plain_ms = {}, self._costs(len(live)).plain
            return PlannedBudget((0,) * len(live), 0)
        now = self._now = Situation.of(live, left, self._options.max_depth, self._costs)
        self._plain_ms = now.plain_ms
        if self._risk is None:
            prefill = self._costs(now.rows).prompt_token * self._prompt_tokens
            self._risk = Risk(max(now.left), prefill)
        if max(now.left) < 2:
            self._plans = {}
            return self._plainly(now)
        if self._fresh > 0 and self._plans:
            self._fresh -= 1
            plan = self._again(now)
            if plan is not None:
                self._pause.go()
                return plan
        return self._choose(now)

    def _choose(self, now: Situation) -> PlannedBudget:
        self._plans = {}
        options = list(enumerate(self._options.options))
        best = self._best(now, [(i, option) for i, option in options if not option.may_be_empty])
        plan: PlannedBudget | None = None
        if best is not None:
            self._plans[best.option] = best
            plan = self._planned(best, now)
        for i, option in options:
            if option.may_be_empty:
                ahead = self._ahead(i, option, now, now.plain_rate if best is None else best.rate, plan)
                if ahead is plan and plan is not None and option.drafter.kind == _CHAINS:
                    ahead = replace(plan, beside=i)  # not worth a pass, but what it would have drafted shows later
                plan = ahead
        if plan is None:
            return self._stop(now)
        if self._pause.begins:
            for history in self._history.values():
                history.fade(PROBE_FADE)
        self._pause.go()
        assert self._risk is not None
        self._fresh = (REPLAN if now.rows > 1 else REPLAN_ONE) - 1 if self._risk.debt < 0 else 0
        chosen = best if best is not None else self._plans[plan.option]
        self._current = (chosen.option, chosen.depth)
        self._last = plan
        return plan

    def _again(self, now: Situation) -> PlannedBudget | None:
        """The last plan for the rows that are still there."""
        plan: PlannedBudget | None = self._last
        kept: list[PlannedBudget] = []
        while plan is not None:
            if plan.option not in self._plans:
                return None
            kept.append(plan)
            plan = plan.otherwise
        for old in reversed(kept):
            plan = self._planned(self._plans[old.option], now, min(old.least_rows, now.rows), plan, old.beside)
        return plan

    def _best(self, now: Situation, options: Sequence[tuple[int, Option]]) -> Candidate | None:
        """The fastest affordable plan that beats plain decoding; a probe's is the fastest small one."""
        good = [
            plan
            for i, option in options
            for plan in candidates(i, option, self._history[option.family], now)
            if self._may(plan, now)
        ]
        return fastest(
            good,
            self._current,
            lambda plan: self._affordable(plan, now) and (self._pause.probing or self._in_time(plan, now)),
        )

    def _may(self, plan: Candidate, now: Situation) -> bool:
        if self._pause.probing:
            return plan.depth <= PROBE_DEPTH or not self._options.options[plan.option].any_depth
        return plan.rate > MARGIN * now.plain_rate

    def _in_time(self, plan: Candidate, now: Situation) -> bool:
        option = self._options.options[plan.option]
        return ends_sooner(plan, option, self._history[option.family], now)

    def _affordable(self, plan: Candidate, now: Situation) -> bool:
        """Even if all of it is rejected? What is in use and proven may lose now and then."""
        assert self._risk is not None
        option, history = self._options.options[plan.option], self._history
        catching_up = self._catching_up(option, now)
        loss = catching_up + plan.ms - now.plain_ms
        if not self._pause.probing:
            if self._current is not None and history[option.family].num_decisions >= PROVEN:
                return True
            saved = max(now.left) * now.rows * (1 / now.plain_rate - 1 / plan.rate)
            if saved < catching_up:
                return False
        if option.may_be_empty and len(history) > 1:  # or trying it would leave nothing to try the others with
            own = self._debts[plan.option]
            if not self._risk.affords(loss, now.plain_ms, _SIDE_SHARE, own):
                return False
        promising = plan.rate > _PROMISING * now.plain_rate
        trusted = history[option.family].believes and promising and not self._pause.probing
        return self._risk.affords(loss, now.plain_ms, _TRUSTED if trusted else 1.0)

    def _catching_up(self, option: Option, now: Situation) -> float:
        """Milliseconds to bring the option's K/V up to date; a token or two ride along with its next pass."""
        if option.name not in self._keeping or self._behind <= 2:
            return 0.0
        return self._costs(now.rows).draft_token * self._behind

    def _ahead(
        self, index: int, option: Option, now: Situation, rate: float, otherwise: PlannedBudget | None
    ) -> PlannedBudget | None:
        """`otherwise` (which promises `rate`), with an option that may be empty asked before it where that pays."""
        found, asked = self._found[index]
        share = found / asked
        expected = max(1, round(share * now.rows))
        plans = candidates(index, option, self._history[option.family], now, expected)
        plan = max((one for one in plans if not self._pause.probing or self._may(one, now)), key=lambda one: one.rate)
        gain = (plan.tokens - now.rows) / expected
        least = max(1, ceil((MARGIN * rate * plan.ms - now.rows) / max(gain, 1e-9)))
        if not self._pause.probing:
            worth = share * (plan.rate - rate) / now.plain_rate
            if least > now.rows or worth < _ASKING or not self._in_time(plan, now):
                return otherwise
        if not self._affordable(plan, now):
            return otherwise
        self._plans[index] = plan
        return self._planned(plan, now, min(least, now.rows), otherwise)

    def _planned(
        self,
        plan: Candidate,
        now: Situation,
        least: int = 0,
        otherwise: PlannedBudget | None = None,
        beside: int | None = None,
    ) -> PlannedBudget:
        depths = tuple(min(plan.depth, limit) for _, limit in now.limits)
        nodes = self._options.options[plan.option].drafter.max_nodes
        return PlannedBudget(depths, nodes, plan.option, least, otherwise, beside)

    def _plainly(self, now: Situation) -> PlannedBudget:
        return PlannedBudget((0,) * now.rows, 0)

    def _stop(self, now: Situation) -> PlannedBudget:
        self.report.why_plain = self._why(now)
        self._current = None
        known = [history for history in self._history.values() if history.believes]
        hopeless = bool(known) and all(history.acceptance < _HOPELESS for history in known)
        self.report.num_stops += int(self._pause.stop(_LONG if hopeless else 0))
        return self._plainly(now)

    def _why(self, now: Situation) -> str:
        said = []
        for i, option in enumerate(self._options.options):
            history = self._history[option.family]
            best = max(candidates(i, option, history, now), key=lambda plan: plan.rate)
            speed = best.rate / now.plain_rate
            if speed > MARGIN:
                said.append(f"trying {option.name} (further) would risk more than {RISK:.1%} of this call's time")
            else:
                said.append(f"{option.name} promises {speed:.2f}x plain decoding with {history.acceptance:.2f} of its "
                            "tokens accepted")  # fmt: skip
        return "; ".join(said)

    @property
    def known(self) -> Known:
        """What this call and those before it tell the next one."""
        pairs = zip(self._options.options, self._found, strict=True)
        found = {option.name: kept / asked for option, (kept, asked) in pairs if option.may_be_empty}
        return Known({family: history.belief for family, history in self._history.items()}, found)

    def learn(self, trace: StepTrace, reached: Sequence[int]) -> None:
        assert self._now is not None
        assert self._risk is not None
        now, rows, plain_ms = self._now, len(trace.rows), self._plain_ms
        used = self._options.used if any(trace.drafted) else None
        if self._plans:
            for index, found in self._options.asked:
                kept, asked = self._found[index]
                self._found[index] = (_FOUND_MEMORY * kept + found / rows, _FOUND_MEMORY * asked + 1)
            if self._options.heard is not None:
                self._hear(*self._options.heard, trace)
        emitted = rows + sum(trace.accepted)
        lag = self._behind + ceil(emitted / rows)
        if used is None or used not in self._plans:
            name, ms, tokens = "plain", plain_ms, float(rows)
            self._risk.step()
            if self._pause.probing:
                self._current = None
                self._pause.found_nothing()
        else:
            option, plan = self._options.options[used], self._plans[used]
            history = self._history[option.family]
            drafting = [i for i in range(rows) if trace.drafted[i]]
            name = f"{option.name} k={plan.depth}" if option.any_depth else option.name
            ms, tokens = plan.ms, plan.tokens
            if option.may_be_empty:  # it may have found less than it was asked for, and for fewer rows
                depth = min(max(trace.drafted), plan.depth)
                ms = now.costs(rows).step(option.name, depth)
                tokens = rows + history.gains(option.widths, now.limits)[depth] * len(drafting) / rows
            ms += self._catching_up(option, now)
            history.add(option.widths, [trace.rows[i] for i in drafting], [reached[i] for i in drafting],
                        [trace.accepted[i] for i in drafting])  # fmt: skip
            lost = ms - emitted * plain_ms / rows
            self._risk.step(lost)
            self._debts[used] += lost
            lag = 0 if option.name in self._keeping else lag
            self.report.num_probes += self._pause.probing
        self._behind = lag
        self.report.add(name, ms, tokens, trace, emitted)

    def _hear(self, index: int, chains: Sequence[Sequence[int]], trace: StepTrace) -> None:
        """Count what would have become of chains that were not drafted."""
        fates = [would_be_kept(chain, run) for chain, run in zip(chains, trace.emitted, strict=True)]
        rows = [row for row, (tried, _) in zip(trace.rows, fates, strict=True) if tried]
        found, asked = self._found[index]
        self._found[index] = (_FOUND_MEMORY * found + len(rows) / len(fates), _FOUND_MEMORY * asked + 1)
        option = self._options.options[index]
        if rows:
            tried, kept = zip(*(fate for fate in fates if fate[0]), strict=True)
            self._history[option.family].add(option.widths, rows, tried, kept)
