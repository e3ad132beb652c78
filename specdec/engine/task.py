"""One request inside the engine: its text, where it stands, and what it has cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from specdec.engine.errors import RequestFaultError
from specdec.engine.handle import Handle, Result
from specdec.engine.params import Params
from specdec.kv.faults import described
from specdec.plain_order import PlainBatch
from specdec.request import Request
from specdec.stopping import Opinions

AGING_STEPS = 256
"""A waiting request becomes one priority more urgent after so many steps of the engine: none starves."""
_MEMORY = 0.95
"""Weight of the past in a request's acceptance, per draft."""
_COMMON_MEMORY = 0.99
"""The same in everybody's together."""
_PRIOR = 0.7
"""Chance that the next drafted token is kept, before anything is known."""
_BORROWED = 4.0
"""Drafts after which a request's own history counts as much as everybody's."""


class State(Enum):
    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    DONE = "done"


class LaneKey(NamedTuple):
    """Requests that agree in these decode in one lane. in_order: their processors are called in plain order."""

    draft: str
    rule: str
    do_sample: bool
    in_order: bool = False


class Acceptance:
    """How deep drafts get: `survival[d]` estimates the chance that at least `d + 1` drafted tokens are kept.

    Steps in which fewer levels were allowed say nothing about deeper ones.
    """

    def __init__(self, depth: int, common: Acceptance | None = None):
        self._common = common
        self._memory, self._trust = (_COMMON_MEMORY, 0.5) if common is None else (_MEMORY, _BORROWED)
        self._kept = [0.0] * depth
        self._seen = [0.0] * depth

    def observe(self, allowed: int, accepted: int) -> None:
        """A draft of up to `allowed` levels of which `accepted` were kept."""
        for depth in range(min(allowed, len(self._seen))):
            self._seen[depth] = self._memory * self._seen[depth] + 1.0
            self._kept[depth] = self._memory * self._kept[depth] + (accepted > depth)
        if self._common is not None:
            self._common.observe(allowed, accepted)

    def survival(self) -> list[float]:
        """Non-increasing, one entry per level. What no draft has shown yet goes on as the levels above it."""
        common = None if self._common is None else self._common.survival()
        out: list[float] = []
        last, onward = 1.0, _PRIOR
        for depth, (kept, seen) in enumerate(zip(self._kept, self._seen, strict=True)):
            if common is not None:
                onward = common[depth] / (common[depth - 1] if depth else 1.0)
            value = min(last, (kept + self._trust * last * onward) / (seen + self._trust))
            if common is None:
                onward = value / last
            last = max(value, 1e-6)
            out.append(value)
        return out


@dataclass(eq=False)
class Task:
    """Mutable; the engine's alone.

    text: prompt and emitted tokens. sequence: its id in the pool, None while it waits. done: tokens of `text` whose
        K/V the target has. steps: decoding steps so far, by which its noise is keyed: preemption changes nothing.
    tail: slots behind its text a step may write; nodes: of its largest tree, the root included.
    pinned: its text depends on how much is drafted for it, and is promised.
    granted: the priority it was admitted with. row: its row in its lane while it runs.
    opinions: what its stopping criteria said, where they may keep state.
    batch: what plain decoding would show its processors, where they are called in plain order.
    depth: levels it may draft in the step at hand. ending: why its text is complete, before its handle knows.
    """

    handle: Handle
    params: Params
    request: Request
    lane: LaneKey
    seed: int
    tail: int
    nodes: int
    pinned: bool
    submitted: float
    entered: int
    text: list[int] = field(default_factory=list)
    state: State = State.WAITING
    sequence: int | None = None
    done: int = 0
    granted: int = 0
    row: int = -1
    depth: int = 0
    steps: int = 0
    acceptance: Acceptance | None = None
    batch: PlainBatch | None = None
    opinions: Opinions | None = None
    cancelled: bool = False
    ending: str | None = None
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    @property
    def prompt_length(self) -> int:
        return len(self.handle.prompt_ids)

    @property
    def wanted(self) -> int:
        """Tokens of `text` whose K/V is needed before it can decode: all but the root."""
        return len(self.text) - 1

    @property
    def fixed_tokens(self) -> int:
        """Tokens of every step it must have."""
        return self.nodes if self.pinned else 1

    def fault(self, what: str, cause: BaseException | None = None) -> RequestFaultError:
        """The error it ends with where its own code failed."""
        emitted = self.handle.token_ids
        raised = "" if cause is None else f" ({described(cause)})"
        error = RequestFaultError(
            f"request {self.handle.id} failed at its step {self.steps}: {what}{raised}; {len(emitted)} tokens emitted "
            "before are in .emitted",
            self.handle.id,
            self.steps,
            emitted,
        )
        error.__cause__ = cause
        return error

    def put_back(self) -> None:
        """It waits again and holds nothing; what it held is forgotten elsewhere."""
        if self.sequence is not None:
            self.num_preemptions += 1
        self.sequence, self.done, self.row, self.state = None, 0, -1, State.WAITING

    def urgency(self, step: int) -> tuple[int, int]:
        """Sorts requests: priority, improved by waiting until it was admitted, then arrival."""
        if self.state is State.WAITING:
            return self.params.priority - (step - self.entered) // AGING_STEPS, self.handle.id
        return self.granted, self.handle.id

    def result(self, reason: str, now: float) -> Result:
        return Result(
            token_ids=self.text[self.prompt_length :],
            prompt_ids=list(self.handle.prompt_ids),
            finish_reason=reason,
            num_steps=self.steps,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            num_preemptions=self.num_preemptions,
            num_cached_tokens=self.num_cached_tokens,
            seconds_to_first_token=None if self.first_token is None else self.first_token - self.submitted,
            seconds=now - self.submitted,
        )


class Mark(NamedTuple):
    """Where a request stood before a step: decoding steps, and tokens its handle had."""

    num_steps: int
    num_tokens: int


def marks(tasks: Iterable[Task]) -> dict[Task, Mark]:
    """To be taken before a step that may have to be recovered from."""
    return {task: Mark(task.steps, task.handle.num_tokens) for task in tasks}
