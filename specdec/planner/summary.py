"""What a planned call reports: what was drafted, what was foretold, and why drafting stopped."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from specdec.trace import StepTrace

_RECENT = 16
"""Steps that say how fast the machine is at the moment."""
_TREND = 8
"""Steps that say how much better or worse drafts fare than expected: texts get easier and harder."""
_TREND_WEIGHT = 2.0
"""Accepted tokens per row that what was expected is worth there."""


@dataclass
class PlanReport:
    """What was planned in one call.

    steps: number of steps by what was drafted, e.g. `{"plain": 12, "model k=4": 30}`.
    predicted_ms, predicted_tokens: sums of what every step was foretold to take and to emit just before it ran. A
        step's time is the cost table's, times how much slower or faster than the table the last 16 steps were
        (`table_ms` without that factor: only the forecast follows the clock, never the choice); its tokens come from
        the acceptance seen before it, times how much better or worse than that the last 8 steps fared.
    The first step counts in `steps` only: it may read the prompt as well.
    realised_ms, realised_tokens: the same steps as they were.
    num_probes: steps that tried the drafter again after it had been given up.
    num_stops: how often drafting was given up; why_plain: why the last time, None if it never was.
    ms_measuring: time spent measuring costs for this call, before it; 0 when the table was known.
    """

    steps: dict[str, int] = field(default_factory=dict)
    predicted_ms: float = 0.0
    predicted_tokens: float = 0.0
    table_ms: float = 0.0
    realised_ms: float = 0.0
    realised_tokens: int = 0
    num_probes: int = 0
    num_stops: int = 0
    why_plain: str | None = None
    ms_measuring: float = 0.0

    def __post_init__(self) -> None:
        # Not fields: they are no part of the report. Sums are kept, so that a step costs the same however far back
        # the forecast looks.
        self._recent: deque[tuple[float, float]] = deque()
        self._trend: deque[tuple[float, float]] = deque()
        self._recent_real = self._recent_ms = self._won = self._hoped = 0.0

    def add(self, name: str, ms: float, tokens: float, trace: StepTrace, emitted: int) -> None:
        """Count one step: what it drafted, its milliseconds by the table, its expected and its emitted tokens."""
        first = not self.steps
        self.steps[name] = self.steps.get(name, 0) + 1
        if first:  # the target's pass over the prompt is part of this step
            return
        rows = len(trace.rows)
        self.table_ms += ms
        self.predicted_ms += ms * self._recent_real / self._recent_ms if self._recent else ms
        trend = (self._won + _TREND_WEIGHT) / (self._hoped + _TREND_WEIGHT)
        self.predicted_tokens += rows + (tokens - rows) * trend
        real = trace.ms_draft + trace.ms_verify + trace.ms_rest
        self.realised_ms += real
        self.realised_tokens += emitted
        self._remember(real, ms, emitted / rows - 1, tokens / rows - 1)

    def _remember(self, real: float, ms: float, won: float, hoped: float) -> None:
        if len(self._recent) == _RECENT:
            old_real, old_ms = self._recent.popleft()
            self._recent_real -= old_real
            self._recent_ms -= old_ms
        if len(self._trend) == _TREND:
            old_won, old_hoped = self._trend.popleft()
            self._won -= old_won
            self._hoped -= old_hoped
        self._recent.append((real, ms))
        self._trend.append((won, hoped))
        self._recent_real += real
        self._recent_ms += ms
        self._won += won
        self._hoped += hoped

    @property
    def predicted_tokens_per_second(self) -> float:
        return 1e3 * self.predicted_tokens / self.predicted_ms if self.predicted_ms else 0.0

    @property
    def realised_tokens_per_second(self) -> float:
        """Tokens per second of the planned steps, the target's prefill left out."""
        return 1e3 * self.realised_tokens / self.realised_ms if self.realised_ms else 0.0

    def lines(self) -> list[tuple[str, str]]:
        """For the report's table."""
        plans = ", ".join(f"{name} {count}" for name, count in sorted(self.steps.items(), key=lambda item: -item[1]))
        lines = [("steps by plan", plans or "none")]
        if self.realised_ms:  # there was more than the first step
            real, foretold = self.realised_tokens_per_second, self.predicted_tokens_per_second
            lines.append(("decoding speed", f"{real:.1f} tokens/s, foretold {foretold:.1f}"))
        if self.why_plain is not None:
            lines.append(("stopped drafting", f"{self.num_stops} times, last: {self.why_plain}"))
        if self.ms_measuring:
            lines.append(("measured costs", f"in {self.ms_measuring:.0f} ms (kept for later calls)"))
        return lines
