"""What drafting may lose beside plain decoding, what it has lost so far in a call, and why nothing is drafted."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.planner.acceptance import AcceptanceHistory
from specdec.planner.choice import MARGIN, Candidate, Situation, candidates
from specdec.planner.options import Option

RISK = 0.015
"""Share of a call's time that trying drafts may cost more than plain decoding would have."""
RISK_STEPS = 1.2
"""At least this many plain steps may be risked, or short calls would never draft."""
PROBE_SHARE, LONGEST_WAIT = 0.005, 512
"""Share of the time since drafting was given up that a probe may be expected to lose, until so many steps are over."""
PROVEN = 8.0
"""Decisions of a call after which an option in use is judged by their acceptance, no longer by what it risks."""
TRIES = 3
"""Drafts in a row, all rejected, that an option which is not proven is prepared for where it can be: one or two are bad
luck, and a shallow draft asks the same question as a deep one for less."""
_TRUSTED, _PROMISING = 3.0, 1.15
"""Allowances that a drafter may risk which, by what it did before this call, makes it so much faster."""
_SIDE_SHARE = 0.4
"""Share of the allowance that an option which may be empty can use up beside others."""


class Debt:
    """What drafting has cost one call: `ms` that its drafted steps took beyond what plain ones would have taken for the
    same tokens, by the cost table. Where a rejected draft could lift it over the allowance, nothing is drafted that has
    not proven itself.

    Args:
        horizon: tokens per row that are counted on. prefill_ms: what the target's pass over the prompt takes.
    """

    def __init__(self, horizon: int, prefill_ms: float):
        self.ms = 0.0
        self._horizon, self._prefill_ms = horizon, prefill_ms
        self._steps = 0

    def affords(self, loss_ms: float, plain_ms: float, share: float = 1.0, debt: float | None = None) -> bool:
        """May so much be lost?

        Args:
            share: how many times the usual allowance. debt: in place of the whole call's.
        """
        allowed = RISK * (self._prefill_ms + plain_ms * max(self._horizon, self._steps))
        return (self.ms if debt is None else debt) + loss_ms <= share * max(RISK_STEPS * plain_ms, allowed)

    def step(self, lost_ms: float = 0.0) -> None:
        """One step was taken; a drafted one cost so much more (less: negative) than its tokens' worth."""
        self._steps += 1
        self.ms += lost_ms


class RiskBudget:
    """What one call may still lose by drafting, in all and by option.

    Args:
        prompt_tokens: which an option with K/V of its own has to read before its first draft.
    """

    def __init__(self, options: Sequence[Option], debt: Debt, prompt_tokens: int):
        self.debt = debt
        self._options = options
        # Asked once: the property reads the model's configuration, which is slow.
        self._keeps = [option.drafter.keeps_kv for option in options]
        self._families = len({option.family for option in options})
        self._debts = [0.0] * len(options)
        self._behind = prompt_tokens

    def behind(self, index: int) -> int:
        """Tokens that an option's K/V has to catch up with; one or two ride along with its next pass."""
        return self._behind if self._keeps[index] and self._behind > 2 else 0

    def catching_up(self, index: int, now: Situation) -> float:
        """Milliseconds that takes."""
        return now.times.draft_token * self.behind(index)

    def affordable(
        self,
        candidate: Candidate,
        history: AcceptanceHistory,
        now: Situation,
        in_use: bool,
        waited: int | None,
        tries: int = 1,
    ) -> bool:
        """May this be drafted: is the loss within the allowance even if all of it is rejected? An option that is in use
        and proven may lose now and then.

        Args:
            waited: before a probe, plain steps since drafting was given up; else None.
            tries: drafts in a row that may all be rejected.
        """
        catching_up = self.catching_up(candidate.option, now)
        if waited is None:
            if in_use and self._proven(candidate, history, now):
                return True
            saved = max(now.left) * now.rows * (1 / now.plain_rate - 1 / candidate.rate)
            if saved < catching_up:
                return False
        elif waited < LONGEST_WAIT:
            # Answers that are most likely the same as before should cost next to nothing. What was missed since is left
            # out: it grows with the wait itself.
            unread = now.times.draft_token * max(0, self.behind(candidate.option) - waited)
            if candidate.ms + unread - candidate.tokens / now.plain_rate > PROBE_SHARE * waited * now.plain_ms:
                return False
        loss = catching_up + tries * (candidate.ms - now.plain_ms)
        if self._options[candidate.option].may_be_empty and self._families > 1:
            # Or trying it would leave nothing to try the others with.
            if not self.debt.affords(loss, now.plain_ms, _SIDE_SHARE, self._debts[candidate.option]):
                return False
        trusted = history.believes and candidate.rate > _PROMISING * now.plain_rate and waited is None
        return self.debt.affords(loss, now.plain_ms, _TRUSTED if trusted else 1.0)

    def _proven(self, candidate: Candidate, history: AcceptanceHistory, now: Situation) -> bool:
        """Does what was seen in this call say that it pays, whatever was believed before?"""
        if history.num_decisions < PROVEN:
            return False
        own, believed = history.acceptance, history.reach(self._options[candidate.option].widths)[candidate.depth]
        gain = sum(own**depth for depth in range(1, candidate.depth + 1))
        return now.rows + (candidate.tokens - now.rows) * gain / believed > candidate.ms * now.plain_rate

    def plain(self, emitted: int) -> None:
        """A step without a draft."""
        self.debt.step()
        self._behind += emitted

    def drafted(self, index: int, lost_ms: float, emitted: int) -> None:
        """A step that drafted with an option, and what it took beyond plain steps for the same tokens."""
        self.debt.step(lost_ms)
        self._debts[index] += lost_ms
        self._behind = 0 if self._keeps[index] else self._behind + emitted


def why_plain(options: Sequence[Option], histories: Sequence[AcceptanceHistory], now: Situation) -> str:
    """A sentence on what each option promises, where none is drafted with."""
    said = []
    for i, (option, history) in enumerate(zip(options, histories, strict=True)):
        if not any(limit for _, limit in now.limits_of(option)) and any(limit for _, limit in now.limits):
            said.append(f"{option.name} cannot read that many tokens ({option.positions} positions)")
            continue
        speed = max(one.rate for one in candidates(i, option, history, now)) / now.plain_rate
        if speed > MARGIN:
            said.append(f"trying {option.name} (further) would risk more than {RISK:.1%} of this call's time")
        else:
            said.append(f"{option.name} promises {speed:.2f}x plain decoding with {history.acceptance:.2f} of its "
                        "tokens accepted")  # fmt: skip
    return "; ".join(said)
