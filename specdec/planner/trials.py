"""May this plan be tried? What drafting has cost so far in a call, by option, and what all of it may cost."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.planner.choice import Candidate, Situation
from specdec.planner.history import History
from specdec.planner.options import Option
from specdec.planner.risk import LONGEST_WAIT, PROBE_SHARE, Risk

PROVEN = 8.0
"""Decisions of a call after which an option in use is judged by their acceptance, no longer by what it risks."""
TRIES = 3
"""Drafts in a row, all rejected, that an option which is not proven is prepared for where it can be: one or two are bad
luck, and a shallow draft asks the same question as a deep one for less."""
_TRUSTED, _PROMISING = 3.0, 1.15
"""Allowances that a drafter may risk which, by what it did before this call, makes it so much faster."""
_SIDE_SHARE = 0.4
"""Share of the allowance that an option which may be empty can use up beside others."""


class Trials:
    """The accounts of one call.

    Args:
        prompt_tokens: which an option with K/V of its own has to read before its first draft.
    """

    def __init__(self, options: Sequence[Option], risk: Risk, prompt_tokens: int):
        self.risk = risk
        self._options = options
        # Asked once: the property reads the model's configuration, which is slow.
        self._keeps = [bool(option.drafter.num_cache_layers) for option in options]
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
        self, plan: Candidate, history: History, now: Situation, in_use: bool, waited: int | None, tries: int = 1
    ) -> bool:
        """Even if all of it is rejected? What is in use and proven may lose now and then.

        Args:
            waited: before a probe, plain steps since drafting was given up; else None.
            tries: even if that happens so often in a row.
        """
        catching_up = self.catching_up(plan.option, now)
        if waited is None:
            if in_use and self._proven(plan, history, now):
                return True
            saved = max(now.left) * now.rows * (1 / now.plain_rate - 1 / plan.rate)
            if saved < catching_up:
                return False
        elif waited < LONGEST_WAIT:
            # Answers that are most likely the same as before should cost next to nothing. What was missed since is left
            # out: it grows with the wait itself.
            unread = now.times.draft_token * max(0, self.behind(plan.option) - waited)
            if plan.ms + unread - plan.tokens / now.plain_rate > PROBE_SHARE * waited * now.plain_ms:
                return False
        loss = catching_up + tries * (plan.ms - now.plain_ms)
        if self._options[plan.option].may_be_empty and self._families > 1:
            # Or trying it would leave nothing to try the others with.
            if not self.risk.affords(loss, now.plain_ms, _SIDE_SHARE, self._debts[plan.option]):
                return False
        trusted = history.believes and plan.rate > _PROMISING * now.plain_rate and waited is None
        return self.risk.affords(loss, now.plain_ms, _TRUSTED if trusted else 1.0)

    def _proven(self, plan: Candidate, history: History, now: Situation) -> bool:
        """Does what was seen in this call say that it pays, whatever was believed before?"""
        if history.num_decisions < PROVEN:
            return False
        own, believed = history.acceptance, history.reach(self._options[plan.option].widths)[plan.depth]
        gain = sum(own**depth for depth in range(1, plan.depth + 1))
        return now.rows + (plan.tokens - now.rows) * gain / believed > plan.ms * now.plain_rate

    def plain(self, emitted: int) -> None:
        """A step without a draft."""
        self.risk.step()
        self._behind += emitted

    def drafted(self, index: int, lost_ms: float, emitted: int) -> None:
        """A step that drafted with an option, and what it took beyond plain steps for the same tokens."""
        self.risk.step(lost_ms)
        self._debts[index] += lost_ms
        self._behind = 0 if self._keeps[index] else self._behind + emitted
