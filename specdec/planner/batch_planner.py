"""Which drafter, how deep, now: one draft for all rows of a call at every step, and when to decode plainly instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil

from specdec.planner.acceptance import AcceptanceHistory, Known, counterfactual_outcomes
from specdec.planner.backoff import ProbeBackoff
from specdec.planner.base import Planner
from specdec.planner.choice import HORIZON, MARGIN, Candidate, Situation, candidates, ends_sooner, fastest
from specdec.planner.cost_refinement import PLAIN, CostExplorer, StepKind
from specdec.planner.costs import Costs, StepTimes
from specdec.planner.decayed_counts import HitRates
from specdec.planner.options import OptionBudget, Options
from specdec.planner.risk_budget import TRIES, Debt, RiskBudget, why_plain
from specdec.planner.summary import PlanReport
from specdec.trace import StepTrace
from specdec.verify.draft_kind import DraftKind

PROBE_DEPTH = 2
PROBE_FADE = 0.6
"""What is left of the evidence when a probe asks whether it still holds."""
LONGEST_HOLD = 8
"""Steps that a choice is kept for at most before all candidates are looked at again."""
_ASKING = 0.005
"""Share of a plain step that asking an option that may be empty costs."""
_CHAINS = DraftKind("chain", "deterministic")


class BatchPlanner(Planner):
    """Plans one call: before every step `budget`, after it `learn`.

    It chooses what promises most tokens per millisecond over all live rows, unless that would end the batch later. It
    looks at the cost table, at the acceptance seen in this call, and at what was `known` before it. It never asks the
    clock: the same call with the same table and knowledge is planned the same way again. Nothing it looks at was drawn
    in the step the choice is for (algorithms B.5).

    A choice holds for 1, 2, 4 and then 8 steps as long as a new look confirms it, and ends at once where drafts have
    lost time since: planning should cost less than it can gain.

    Args:
        options: what can be drafted with.
        costs: live rows -> their table.
        rows, prompt_tokens: of the call.
        known: what earlier drafts tell, if any. explores: whether near rivals of the best candidate are tried as well.

    Attributes:
        explorer: times of the steps of all rows. No choice looks at them.
    """

    def __init__(
        self,
        options: Options,
        costs: Callable[[int], Costs],
        rows: int,
        prompt_tokens: int,
        known: Known | None = None,
        explores: bool = False,
    ):
        known = Known() if known is None else known
        self._options, self._costs, self._prompt_tokens = options, costs, prompt_tokens
        self._choices = options.options
        self._levels = {option.name: len(option.widths) for option in self._choices}
        families = {option.family: AcceptanceHistory(options.max_depth, rows, known.beliefs.get(option.family))
                    for option in self._choices}  # fmt: skip
        self._families = families
        self._history = [families[option.family] for option in self._choices]
        self._hit_rates = HitRates(self._choices, known.found)
        self._times: dict[int, StepTimes] = {}
        self._plain: dict[int, OptionBudget] = {}
        self._risk: RiskBudget | None = None
        self._backoff = ProbeBackoff()
        self._current: tuple[int, int] | None = None
        self._chosen: dict[int, Candidate] = {}
        self._last = OptionBudget((), 0)
        self._now: Situation | None = None
        self._fresh, self._hold, self._debt = 0, 1, 0.0
        self._whole = rows
        self.explorer = CostExplorer(list(self._levels), explores)
        self.report = PlanReport()

    def budget(self, live: Sequence[int], left: Sequence[int | None], lengths: Sequence[int] = ()) -> OptionBudget:
        if self._backoff.waits():  # most steps where drafts are no use: nothing is computed
            return self._plainly(len(live))
        if self._fresh > 0 and self._risk is not None and self._risk.debt.ms <= self._debt:
            again = self._again(live, left, lengths)
            if again is not None:
                self._fresh -= 1
                self._backoff.go()
                return again
        now = self._now = Situation(live, left, self._options.max_depth, self._times_of, lengths)
        if self._risk is None:
            prefill = self._costs(now.rows).prompt_token * self._prompt_tokens
            self._risk = RiskBudget(self._choices, Debt(max(now.left), prefill), self._prompt_tokens)
        ending = max(now.left) < 2 or self._backoff.too_late(now.longest)
        return self._plainly(now.rows) if ending else self._choose(now, self._risk)

    def _times_of(self, rows: int) -> StepTimes:
        times = self._times.get(rows)
        if times is None:
            times = self._times[rows] = StepTimes.of(self._costs(rows), self._levels)
        return times

    def _plainly(self, rows: int) -> OptionBudget:
        self._chosen, self._fresh = {}, 0
        if rows not in self._plain:
            self._plain[rows] = OptionBudget((0,) * rows, 0)
        return self._plain[rows]

    def _again(self, live: Sequence[int], left: Sequence[int | None], lengths: Sequence[int]) -> OptionBudget | None:
        """The last budget, for the rows that are still there; None where it does not fit them."""
        now = self._now
        assert now is not None
        deepest = max(one.depth for one in self._chosen.values())
        if now.live == live and all(tokens is None or tokens > deepest for tokens in left):
            return self._last
        if all(tokens is not None and tokens <= deepest for tokens in left):  # nobody can use it: the call is ending
            return None
        now = self._now = Situation(live, left, self._options.max_depth, self._times_of, lengths)
        budget: OptionBudget | None = self._last
        chain: list[OptionBudget] = []
        while budget is not None:
            chain.append(budget)
            budget = budget.otherwise
        for old in reversed(chain):
            budget = self._budget(self._chosen[old.option], now, min(old.least_rows, now.rows), budget)
        assert budget is not None
        self._last = budget
        return budget

    def _choose(self, now: Situation, risk: RiskBudget) -> OptionBudget:
        self._chosen = {}
        budget: OptionBudget | None = None
        best = self._best(now, risk)
        if best is not None:
            self._chosen[best.option] = best
            budget = self._budget(best, now)
        for i, option in enumerate(self._choices):
            if option.may_be_empty:
                ahead = self._ahead(i, now, risk, now.plain_rate if best is None else best.rate, budget)
                if ahead is budget and budget is not None and option.drafter.kind == _CHAINS:
                    ahead = replace(budget, beside=i)  # not worth a pass, but what it would have drafted shows later
                budget = ahead
        if budget is None:
            return self._stop(now)
        if best is not None and budget.option == best.option and now.rows == self._whole and not self._backoff.probing:
            due, allowed = self.explorer.due(best), partial(self._allowed, now=now, risk=risk)
            other = self.explorer.other(best, self._good(now), allowed, self.report.table_ms) if due else None
            if other is not None:
                self._chosen, self._fresh = {other.option: other}, 0
                return self._budget(other, now)
        if self._backoff.begins:
            for history in self._families.values():
                history.fade(PROBE_FADE)
        self._backoff.go()
        chosen = best if best is not None else self._chosen[budget.option]
        confirmed = risk.debt.ms < 0 and (chosen.option, chosen.depth) == self._current
        self._hold = min(2 * self._hold, LONGEST_HOLD) if confirmed else 1
        self._fresh, self._debt = self._hold - 1, risk.debt.ms
        self._current = (chosen.option, chosen.depth)
        self._last = budget if budget.beside is None else replace(budget, beside=None)  # once per look is listened
        return budget

    def _best(self, now: Situation, risk: RiskBudget) -> Candidate | None:
        """The fastest affordable candidate that beats plain decoding; a probe's is the fastest small one."""
        good = self._good(now)
        for tries in (1,) if self._backoff.probing else range(TRIES, 0, -1):
            best = fastest(good, self._current, partial(self._allowed, now=now, risk=risk, tries=tries))
            if best is not None or not good:
                return best
        return None

    def _good(self, now: Situation) -> list[Candidate]:
        """All candidates, of options that are never empty, that beat plain decoding; a probe's are all small ones."""
        probing = self._backoff.probing
        least = 0.0 if probing else MARGIN * now.plain_rate
        return [
            one
            for i, option in enumerate(self._choices)
            if not option.may_be_empty
            for one in candidates(i, option, self._history[i], now, least=least)
            if not probing or self._small(one)
        ]

    def _allowed(self, candidate: Candidate, now: Situation, risk: RiskBudget, tries: int = 1) -> bool:
        """Is it affordable, and does the batch not end later by it? (A probe may.)"""
        return self._affordable(candidate, now, risk, tries) and (
            self._backoff.probing or self._in_time(candidate, now)
        )

    def _small(self, candidate: Candidate) -> bool:
        return candidate.depth <= PROBE_DEPTH or not self._choices[candidate.option].any_depth

    def _in_time(self, candidate: Candidate, now: Situation) -> bool:
        return ends_sooner(candidate, self._choices[candidate.option], self._history[candidate.option], now)

    def _affordable(self, candidate: Candidate, now: Situation, risk: RiskBudget, tries: int = 1) -> bool:
        waited = self._backoff.waited if self._backoff.probing else None
        history, in_use = self._history[candidate.option], self._current is not None
        return risk.affordable(candidate, history, now, in_use, waited, tries)

    def _ahead(
        self, index: int, now: Situation, risk: RiskBudget, rate: float, otherwise: OptionBudget | None
    ) -> OptionBudget | None:
        """`otherwise` (which promises `rate`), with an option that may be empty asked before it where that pays."""
        option, share, probing = self._choices[index], self._hit_rates.share(index), self._backoff.probing
        expected = max(1, round(share * now.rows))
        found = candidates(index, option, self._history[index], now, expected)
        candidate = max((one for one in found if not probing or self._small(one)), key=lambda one: one.rate)
        gain = (candidate.tokens - now.rows) / expected
        least = max(1, ceil((MARGIN * rate * candidate.ms - now.rows) / max(gain, 1e-9)))
        if not probing:
            worth = share * (candidate.rate - rate) / now.plain_rate
            if least > now.rows or worth < _ASKING or not self._in_time(candidate, now):
                return otherwise
        if not self._affordable(candidate, now, risk):
            return otherwise
        self._chosen[index] = candidate
        return self._budget(candidate, now, min(least, now.rows), otherwise)

    def _budget(
        self, candidate: Candidate, now: Situation, least: int = 0, otherwise: OptionBudget | None = None
    ) -> OptionBudget:
        option = self._choices[candidate.option]
        depths = tuple([min(candidate.depth, limit) for _, limit in now.limits_of(option)])
        return OptionBudget(depths, option.drafter.max_nodes, candidate.option, least, otherwise)

    def _stop(self, now: Situation) -> OptionBudget:
        self.report.why_plain = why_plain(self._choices, self._history, now)
        self._current = None
        self.report.num_stops += int(self._backoff.stop())
        return self._plainly(now.rows)

    @property
    def known(self) -> Known:
        """What this call and those before it tell the next one."""
        return Known({family: history.belief for family, history in self._families.items()}, self._hit_rates.known)

    def learn(self, trace: StepTrace, reached: Sequence[int]) -> None:
        assert self._risk is not None
        rows, emitted = len(trace.rows), len(trace.rows) + sum(trace.accepted)
        chosen, used = self._chosen, self._options.used
        if chosen:
            for index, found in self._options.asked:
                self._hit_rates.add(index, found / rows)
            if self._options.heard is not None:
                self._hear(*self._options.heard, trace)
        if used in chosen and any(trace.drafted):
            self._learn_drafts(chosen[used], trace, reached, emitted)
            return
        self._risk.plain(ceil(emitted / rows))
        if self._backoff.probing:
            self._current = None
            self._backoff.found_nothing()
        if not chosen:  # no time went into asking for a draft
            self._time(PLAIN, trace)
        self.report.add("plain", self._times_of(rows).plain, rows, trace, emitted)

    def _learn_drafts(self, candidate: Candidate, trace: StepTrace, reached: Sequence[int], emitted: int) -> None:
        now, risk = self._now, self._risk
        assert now is not None
        assert risk is not None
        index, rows = candidate.option, len(trace.rows)
        option, history = self._choices[index], self._history[index]
        ms, tokens = candidate.ms, candidate.tokens
        drafting, accepted = trace.rows, trace.accepted
        depth = min(max(trace.drafted), candidate.depth) if option.any_depth else candidate.depth
        if option.may_be_empty:  # it may have found less than it was asked for, and for fewer rows
            places = [i for i in range(rows) if trace.drafted[i]]
            drafting = [trace.rows[i] for i in places]
            ms = now.times.by_depth[index][depth]
            tokens = rows + history.reach(option.widths)[depth] * len(drafting)
            reached, accepted = [reached[i] for i in places], [accepted[i] for i in places]
        if not risk.behind(index):
            self._time((option.name, depth), trace)
        ms += risk.catching_up(index, now)
        history.add(option.widths, drafting, reached, accepted)
        risk.drafted(index, ms - emitted * now.plain_ms / rows, ceil(emitted / rows))
        self.report.num_probes += self._backoff.probing
        name = f"{option.name} k={candidate.depth}" if option.any_depth else option.name
        self.report.add(name, ms, tokens, trace, emitted)

    def _time(self, kind: StepKind, trace: StepTrace) -> None:
        """Note what a step of all rows took; the first one may read the prompt as well, late ones read longer texts."""
        if 0 < trace.step <= HORIZON and len(trace.rows) == self._whole:
            self.explorer.add(kind, trace.ms_draft + trace.ms_verify + trace.ms_rest)

    def _hear(self, index: int, chains: Sequence[Sequence[int]], trace: StepTrace) -> None:
        """Count what would have become of chains that were not drafted."""
        heard = counterfactual_outcomes(chains, trace)
        self._hit_rates.add(index, len(heard.rows) / len(trace.rows))
        if heard.rows:
            self._history[index].add(self._choices[index].widths, *heard)
            if sum(heard.kept) > sum(trace.accepted):  # it would have been the better draft
                self._fresh, self._hold = 0, 1
