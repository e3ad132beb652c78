"""What a generate call did, all steps together. Field names follow vLLM's per-request metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from specdec.planner.summary import PlanReport
from specdec.trace import StepTrace
from specdec.verify.passes.account import PassesReport

LOSSY = " (LOSSY: this text does not follow the target's law)"

OF_DRAFTS = ("mean acceptance length", "acceptance rate", "acceptance by position")
"""Lines that say nothing where nothing was drafted."""


class DraftTotals:
    """What follows from how much was drafted and accepted."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per draft, the recovered or bonus token included."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0


@dataclass
class SpecReport(DraftTotals):
    """Totals of one call, over all rows.

    A *draft* is one row's proposal in one step (`num_row_steps` counts all steps of all rows, `num_drafts` those with a
    proposal). `mean_acceptance_length` includes the recovered or bonus token: 1 + accepted / drafts.
    `per_position_acceptance[d]` is conditional on depth d having been reached with a proposal there. Token counts are
    before stop rules cut the last run, except `num_emitted_tokens`.
    `ms_first_draft`, `ms_first_verify`: what the first step took of `ms_draft` and `ms_verify`: as a rule it reads the
    prompt, and `ms_prefill` is what was read before it. `num_cached_tokens`: prompt tokens whose K/V the caller's cache
    held, and which the target did not read again. `kv_models`: models whose K/V `kv_bytes` holds.
    `passes`: whether the target's passes were native, over weights of which form, and in what precision they sum.
    In strict mode `ms_strict_pass` and `ms_plain_pass` are what one row's strict pass and an ordinary one-token pass
    took when the mode was probed: the price of strictness.
    `bytes_moved`: weights that the target's passes fetched, the prompt's included, where `device_map` keeps some in
    memory or on disk and moves them for every pass (tensors that hooks bring in, times passes).
    `rule` is the rule that decided; `lossless` is False when it changes the law.
    `plan` says what the planner chose, foretold and gave up; None where `k` or `tree` was given.
    `processor_calls`, `processor_ms`: processors that were called in plain order, once per emitted token, and what each
    took; drafts are then judged token by token. Empty where all are known, or declared (`specdec.pure`), to be pure.
    `acceptance_z`: accepted tokens minus what theory expects of the very drafts, in standard errors (only with
    `Speculator(monitor=True)` and when sampling). Beyond +-5 something is wrong: run `specdec check`.
    """

    drafter: str = "none"
    rule: str = "greedy"
    lossless: bool = True
    exactness: str = "distribution"
    strict_width: int | None = None
    ms_strict_pass: float = 0.0
    ms_plain_pass: float = 0.0
    num_rows: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_emitted_tokens: int = 0
    num_steps: int = 0
    num_row_steps: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_recovered_tokens: int = 0
    num_bonus_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_reached_per_pos: list[int] = field(default_factory=list)
    acceptance_histogram: list[int] = field(default_factory=list)
    num_drafter_faults: int = 0
    last_drafter_fault: str | None = None
    acceptance_z: float | None = None
    ms_prefill: float = 0.0
    ms_first_draft: float = 0.0
    ms_first_verify: float = 0.0
    ms_draft: float = 0.0
    ms_verify: float = 0.0
    ms_rest: float = 0.0
    ms_total: float = 0.0
    bytes_moved: int = 0
    kv_bytes: int = 0
    kv_models: int = 1
    passes: PassesReport = field(default_factory=PassesReport)
    processor_calls: dict[str, int] = field(default_factory=dict)
    processor_ms: dict[str, float] = field(default_factory=dict)
    plan: PlanReport | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def per_position_acceptance(self) -> list[float]:
        pairs = zip(self.num_accepted_tokens_per_pos, self.num_reached_per_pos, strict=True)
        return [kept / reached if reached else 0.0 for kept, reached in pairs]

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.num_emitted_tokens / self.ms_total if self.ms_total else 0.0

    @property
    def bytes_moved_per_token(self) -> float:
        """Weights of the target fetched per emitted token."""
        return self.bytes_moved / max(1, self.num_emitted_tokens)

    @property
    def tokens_per_step(self) -> float:
        """Emitted tokens per forward pass of the target after the prefill, per row."""
        return self.num_emitted_tokens / max(1, self.num_row_steps)

    def add(self, trace: StepTrace, reached: list[int]) -> None:
        """Count one step. `reached[i]`: depths of row i's tree that a decision was taken at."""
        if self.num_steps == 0:
            self.ms_first_draft, self.ms_first_verify = trace.ms_draft, trace.ms_verify
        self.num_steps += 1
        self.ms_draft += trace.ms_draft
        self.ms_verify += trace.ms_verify
        self.ms_rest += trace.ms_rest
        for i in range(len(trace.rows)):
            accepted = trace.accepted[i]
            self.num_row_steps += 1
            self.num_drafts += trace.drafted[i] > 0
            self.num_draft_tokens += trace.drafted[i]
            self.num_accepted_tokens += accepted
            self.num_emitted_tokens += len(trace.emitted[i])
            self.num_recovered_tokens += trace.kinds[i].count("recovered")
            self.num_bonus_tokens += trace.kinds[i].count("bonus")
            for counts, upto in (
                (self.num_accepted_tokens_per_pos, accepted),
                (self.num_reached_per_pos, reached[i]),
            ):
                for position in range(upto):
                    _bump(counts, position)
            if trace.drafted[i]:
                _bump(self.acceptance_histogram, accepted)
        longest = max(len(self.num_accepted_tokens_per_pos), len(self.num_reached_per_pos))
        for counts in (self.num_accepted_tokens_per_pos, self.num_reached_per_pos):
            counts.extend([0] * (longest - len(counts)))

    def note(self, what: str) -> None:
        """Something that a user should know about the step at hand."""
        self.notes.append(f"step {self.num_steps}: {what}")

    def to_dict(self) -> dict[str, Any]:
        """All counts and derived figures, ready for JSON; `speculative_decoding` uses vLLM's per-request names."""
        out = asdict(self)
        out["per_position_acceptance"] = self.per_position_acceptance
        out["tokens_per_second"] = self.tokens_per_second
        out["tokens_per_step"] = self.tokens_per_step
        out["bytes_moved_per_token"] = self.bytes_moved_per_token
        out["speculative_decoding"] = {
            "mean_acceptance_length": self.mean_acceptance_length,
            "draft_acceptance_rate": self.draft_acceptance_rate,
            "acceptance_histogram": self.acceptance_histogram,
            "num_spec_steps": self.num_drafts,
            "num_accepted_draft_tokens": self.num_accepted_tokens,
            "num_draft_tokens": self.num_draft_tokens,
        }
        return out

    def summary(self) -> str:
        """A plain-text table for people."""
        positions = " ".join(f"{rate:.2f}" for rate in self.per_position_acceptance) or "-"
        lines = [
            ("drafter / rule", f"{self.drafter} / {self.rule}{'' if self.lossless else LOSSY}"),
            ("emitted tokens", f"{self.num_emitted_tokens} in {self.num_steps} steps ({self.num_rows} rows)"),
            ("tokens per second", f"{self.tokens_per_second:.1f}"),
            ("tokens per target pass", f"{self.tokens_per_step:.2f} of a row"),
            ("drafts", f"{self.num_drafts}, {self.num_row_steps - self.num_drafts} steps decoded plainly"),
            ("mean acceptance length", f"{self.mean_acceptance_length:.2f} tokens per draft"),
            ("acceptance rate", f"{self.draft_acceptance_rate:.2f} of {self.num_draft_tokens} drafted tokens"),
            ("acceptance by position", positions),
            (
                "emitted as",
                f"{self.num_accepted_tokens} accepted, {self.num_recovered_tokens} recovered, "
                f"{self.num_bonus_tokens} bonus",
            ),
            ("ms per step", self._phases()),
            ("prefill", self._prefill()),
            ("passes", self.passes.line()),
            ("KV cache", f"{self.kv_bytes / 2**20:.1f} MiB" + (", both models" if self.kv_models > 1 else "")),
        ]
        if self.bytes_moved:
            moved = (
                f"{self.bytes_moved_per_token / 2**20:.1f} MiB per emitted token, {self.bytes_moved / 2**20:.0f} in all"
            )
            lines.append(("weights fetched", moved))
        if not self.num_drafts:
            lines = [line for line in lines if line[0] not in OF_DRAFTS]
        if self.acceptance_z is not None:
            lines.append(("acceptance vs theory", f"{self.acceptance_z:+.2f} standard errors"))
        if self.strict_width is not None:
            cost = f"{self.ms_strict_pass:.2f} ms a row and pass, an ordinary one-token pass {self.ms_plain_pass:.2f}"
            lines.append(("exactness", f"{self.exactness}, {self.strict_width} nodes wide: {cost}"))
        if self.processor_calls:
            each = (
                f"{name} {count} calls, {self.processor_ms[name]:.1f} ms"
                for name, count in self.processor_calls.items()
            )
            lines.append(("in plain order", "; ".join(each)))
        if self.plan is not None:
            lines += self.plan.lines()
        if self.num_drafter_faults:
            lines.append(("drafter faults", f"{self.num_drafter_faults}, last: {self.last_drafter_fault}"))
        lines += [("note", note) for note in self.notes]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)

    def _phases(self) -> str:
        """Milliseconds of a step; the first one, which reads the prompt, is left out where there are others."""
        others, first = max(1, self.num_steps - 1), self.num_steps > 1
        draft = (self.ms_draft - first * self.ms_first_draft) / others
        verify = (self.ms_verify - first * self.ms_first_verify) / others
        said = f"draft {draft:.2f}, verify {verify:.2f}, rest {self.ms_rest / max(1, self.num_steps):.2f}"
        return said + " (after the first step)" * first

    def _prefill(self) -> str:
        said = f"{self.num_prompt_tokens} prompt tokens"
        if self.num_cached_tokens:
            said += f", {self.num_cached_tokens} of them reused from the cache"
        said += f": {self.ms_prefill:.1f} ms before the first step"
        return said + f", {self.ms_first_draft:.1f} of drafting and {self.ms_first_verify:.1f} of verifying in it"


def _bump(counts: list[int], index: int) -> None:
    while len(counts) <= index:
        counts.append(0)
    counts[index] += 1
