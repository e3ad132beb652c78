"""Who runs: admission, chunks of prefill, pages, and who gives way when there are too few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from specdec.engine.task import State, Task
from specdec.kv import OutOfPagesError, UnsupportedArgumentError
from specdec.kv.limits import MOST_ROWS, MOST_STEP_TOKENS, MOST_WAITING, checked_count
from specdec.kv.pool import KVPool


@dataclass(frozen=True)
class Limits:
    """max_rows: requests that run at once. max_step_tokens: tokens of all passes of the target in one step, draft nodes
    and chunks of prefill together. max_waiting: requests that may wait."""

    max_rows: int = 16
    max_step_tokens: int = 512
    max_waiting: int = 1024

    @staticmethod
    def checked(max_rows: int, max_step_tokens: int, max_waiting: int) -> Limits:
        """Limits an engine can keep.

        Raises:
            UnsupportedArgumentError: a number that is none, or out of its range.
        """
        rows = checked_count("max_rows", max_rows, 1, MOST_ROWS)
        tokens = checked_count(
            "max_step_tokens", max_step_tokens, 2 * rows, MOST_STEP_TOKENS, "two for each of max_rows at least"
        )
        return Limits(rows, tokens, checked_count("max_waiting", max_waiting, 1, MOST_WAITING))

    @property
    def prefill_share(self) -> int:
        """Tokens of a step that decoding leaves to prefill while there is any."""
        return max(1, self.max_step_tokens // 4)


class Chunk(NamedTuple):
    """The next `num_tokens` tokens of a prefill."""

    task: Task
    num_tokens: int


class Scheduler:
    """Waiting, prefilling and running requests, and the pages they hold.

    The most urgent request that has pages never has to give them up. So every step advances some request, and every
    request ends. Among waiting requests a short one does not overtake.

    Args:
        leave: takes a running request out of its lane.
    """

    def __init__(self, pool: KVPool, limits: Limits, leave: Callable[[Task], None]):
        assert pool.num_pages is not None, "an engine's pool is limited"
        self.pool = pool
        self.num_pages = pool.num_pages
        self.limits = limits
        self._leave = leave
        self.waiting: list[Task] = []
        self.prefilling: list[Task] = []
        self.running: list[Task] = []
        self.num_preemptions = 0

    @property
    def active(self) -> list[Task]:
        """Requests that hold pages, the most urgent first."""
        return sorted([*self.prefilling, *self.running], key=lambda task: task.urgency(0))

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.prefilling or self.running)

    @property
    def room(self) -> int:
        """Tokens that an empty pool holds."""
        return self.num_pages * self.pool.page_size

    @property
    def most_fixed(self) -> int:
        """Tokens per step that running requests may be sure of together."""
        return max(1, self.limits.max_step_tokens - self.limits.prefill_share)

    def refuse(self, task: Task) -> None:
        """Refuse what could never run, however empty the engine is.

        Raises:
            UnsupportedArgumentError
        """
        if task.fixed_tokens > self.most_fixed:
            raise UnsupportedArgumentError(
                f"max_step_tokens={self.limits.max_step_tokens} leaves {self.most_fixed} tokens a step to decoding, "
                f"but with a seed this request drafts {task.fixed_tokens - 1} tokens behind its root in every step: "
                "raise max_step_tokens, draft fewer tokens, or leave the seed out"
            )
        room, limit, prompt = self.room, task.request.criteria.max_length, task.prompt_length
        if limit is None:
            raise UnsupportedArgumentError(
                "expected max_new_tokens or max_length: without a limit no pool is certain to be large enough"
            )
        if limit + task.tail > room:
            raise UnsupportedArgumentError(
                f"the pool holds {room} tokens ({self.num_pages} pages of {self.pool.page_size}), but this request may "
                f"need {limit + task.tail} ({prompt} of the prompt, up to {limit - prompt} new, {task.tail} of a "
                "draft): lower max_new_tokens, shorten the prompt, or give the engine more num_bytes"
            )

    @property
    def may_admit(self) -> bool:
        """Whether some waiting request could be started now, pages permitting."""
        return any(self._has_seat(task) or self._outranked(task) for task in self.waiting)

    def admit(self, step: int) -> list[Task]:
        """Start waiting requests, the most urgent first, as long as there is room; returns them."""
        admitted = []
        for task in sorted(self.waiting, key=lambda task: task.urgency(step)):
            if self._prefix_is_coming(task):
                continue
            if not self._has_seat(task):
                victim = self._outranked(task)
                if victim is None:
                    break
                self.preempt(victim)
                if not self._has_seat(task):
                    break
            if not self._open(task):
                break
            task.granted = task.urgency(step)[0]
            self.waiting.remove(task)
            self.prefilling.append(task)
            task.state = State.PREFILLING
            admitted.append(task)
        return admitted

    def chunks(self, tokens: int) -> list[Chunk]:
        """What to prefill in this step, at most `tokens` tokens, the most urgent first; its pages are reserved."""
        out = []
        for task in sorted(self.prefilling, key=lambda task: task.urgency(0)):
            count = min(tokens, task.wanted - task.done)
            if count <= 0 or task.state is not State.PREFILLING or not self.reserve(task, count):
                continue
            tokens -= count
            out.append(Chunk(task, count))
        return [chunk for chunk in out if chunk.task.state is State.PREFILLING]

    def reserve(self, task: Task, slots: int) -> bool:
        """Pages for the next slots of an active request; less urgent ones give way. False: it had to itself."""
        assert task.sequence is not None
        while True:
            try:
                self.pool.extend(task.sequence, slots)
                return True
            except OutOfPagesError:
                victim = self.active[-1]
                self.preempt(victim)
                if victim is task:
                    return False

    def preempt(self, task: Task) -> None:
        """Back to waiting; its pages may be found again as long as nobody needs their place."""
        self.num_preemptions += 1
        task.num_preemptions += 1
        self.release(task, publish=True)
        task.state = State.WAITING
        self.waiting.append(task)

    def release(self, task: Task, publish: bool) -> None:
        """A request gives up its row and pages, whatever its state."""
        if task.state is State.RUNNING:
            self._leave(task)
            self.running.remove(task)
        elif task.state is State.PREFILLING:
            self.prefilling.remove(task)
        elif task.state is State.WAITING:
            self.waiting.remove(task)
        if task.sequence is not None:
            self.pool.rollback([task.sequence])
            length = self.pool.length(task.sequence)
            self.pool.close(task.sequence, task.text[:length] if publish else ())
            task.sequence = None
        task.done = 0

    def restart(self, tasks: Sequence[Task]) -> None:
        """Exactly these requests wait, and nobody holds anything."""
        self.num_preemptions += len(self.prefilling) + len(self.running)
        self.waiting, self.prefilling, self.running = list(tasks), [], []

    def started(self, task: Task) -> None:
        """A prefill is complete: its lane takes it in now."""
        self.prefilling.remove(task)
        self.running.append(task)
        task.state = State.RUNNING

    def _has_seat(self, task: Task) -> bool:
        active = [*self.prefilling, *self.running]
        fixed = sum(other.fixed_tokens for other in active)
        return len(active) < self.limits.max_rows and fixed + task.fixed_tokens <= self.most_fixed

    def _outranked(self, task: Task) -> Task | None:
        """The least urgent active request, if this one's own priority goes before it."""
        active = self.active
        return active[-1] if active and active[-1].granted > task.params.priority else None

    def _prefix_is_coming(self, task: Task) -> bool:
        """Is another request prefilling pages that this one could share soon?"""
        size = self.pool.page_size
        text = task.text[: task.wanted]
        shared = max((_common(text, other.text[: other.wanted]) for other in self.prefilling), default=0) // size * size
        return self.pool.sharing and shared > self.pool.match_prefix(text)

    def _open(self, task: Task) -> bool:
        """Take a sequence if the whole text and one step fit beside everybody's next page."""
        text = task.text[: task.wanted]
        sequence = self.pool.open(text)
        held = min(self.pool.length(sequence), self.pool.filled(sequence, "target"))
        self.pool.set_length(sequence, held)
        others = len(self.prefilling) + len(self.running)
        if (
            self.pool.pages_wanted(sequence, len(text) - held + task.tail) + others > self.pool.num_free_pages
            and others
        ):
            self.pool.close(sequence)
            return False
        task.sequence = sequence
        task.done = held
        task.num_cached_tokens = max(task.num_cached_tokens, min(task.done, task.prompt_length))
        return True


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens two texts share."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
