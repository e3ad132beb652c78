"""What `submit` returns: the tokens of one request as they come, step by step, its result, and how to cancel it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from specdec.engine.step_output import StepOutput
from specdec.engine.waking import Waking
from specdec.kv import SpecdecError


@dataclass(frozen=True)
class Result:
    """How a request ended.

    token_ids: what it emitted, in plain `generate`'s length; prompt_ids: what it was given.
    finish_reason: "length" (its limit), "stop" (a stop rule), "cancelled" or "timeout".
    num_steps: target passes it took part in after its prefill. num_cached_tokens: of its prompt, found in the pool.
    seconds_to_first_token, seconds: since it was submitted; None without any token.
    """

    token_ids: list[int]
    prompt_ids: list[int]
    finish_reason: str
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    seconds_to_first_token: float | None = None
    seconds: float = 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Emitted tokens per target pass, before stop rules cut the last run."""
        return 1.0 + self.num_accepted_tokens / self.num_steps if self.num_steps else 1.0


class Driver(Protocol):
    """What a handle needs of its engine."""

    @property
    def threaded(self) -> bool:
        """Whether a thread of the engine's own takes the steps."""

    def step(self) -> bool: ...

    def cancel(self, handle: Handle) -> None: ...


class Steps:
    """The steps of one request, for `for` and `async for`, each time from the first one."""

    def __init__(self, handle: Handle):
        self._handle = handle

    def __iter__(self) -> Iterator[StepOutput]:
        return self._handle._each_step()

    def __aiter__(self) -> AsyncIterator[StepOutput]:
        return self._handle._each_step_soon()


class Handle:
    """One request. Iterating, waiting and cancelling are safe from any thread.

    Where the engine has no thread of its own, whoever waits takes its steps: all requests get on meanwhile.
    """

    def __init__(self, engine: Driver, number: int, prompt: Sequence[int]):
        self.id = number
        self.prompt_ids = list(prompt)
        self._engine = engine
        self._steps: list[StepOutput] = []
        self._result: Result | None = None
        self._error: SpecdecError | None = None
        self._changed = threading.Condition()
        self._waiting: list[tuple[Waking, asyncio.Future[None]]] = []

    @property
    def done(self) -> bool:
        return self._result is not None or self._error is not None

    @property
    def token_ids(self) -> list[int]:
        """The tokens so far."""
        return [token for step in self._steps for token in step.token_ids]

    @property
    def num_steps(self) -> int:
        """Steps that emitted something so far."""
        return len(self._steps)

    @property
    def num_tokens(self) -> int:
        return self._steps[-1].stop if self._steps else 0

    def cancel(self) -> None:
        """End the request with the tokens it has. It is no error if it is done already."""
        self._engine.cancel(self)

    def __iter__(self) -> Iterator[int]:
        """Tokens as they are emitted, from the first one.

        Raises:
            TargetFaultError: after the last token, where the target failed on this request.
        """
        for step in self.steps():
            yield from step.token_ids

    async def __aiter__(self) -> AsyncIterator[int]:
        async for step in self.steps():
            for token in step.token_ids:
                yield token

    def steps(self) -> Steps:
        """What every step emitted, from the first one, for `for` and `async for`: tokens, where each came from, and
        log-probabilities where `logprobs=` was asked for. Raises as iterating over tokens does."""
        return Steps(self)

    def steps_from(self, start: int, most: int | None = None) -> list[StepOutput]:
        """Those there are from number `start` on, at most `most`; waits for none."""
        return self._steps[start : None if most is None else start + most]

    def result(self, timeout: float | None = None) -> Result:
        """Wait until the request is done.

        Raises:
            TimeoutError: it is not, after `timeout` seconds. TargetFaultError: the target failed on it.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while not self.done:
            self._more_than(len(self._steps), deadline)
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _more_than(self, have: int, deadline: float | None) -> bool:
        """Wait for more than `have` steps (True) or for the end (False)."""
        while True:
            ended = self.done  # asked first: the last step may come between two looks, and the end follows it
            if len(self._steps) > have:
                return True
            if ended:
                return False
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"request {self.id} is not done yet; it has {self.num_tokens} tokens")
            if not self._engine.threaded:
                self._engine.step()
                continue
            with self._changed:
                if len(self._steps) <= have and not self.done:
                    self._changed.wait(0.1 if left is None else min(0.1, left))

    async def wait(self) -> Result:
        """`result()` for asyncio. Cancelling the awaiting task leaves the request running: see `cancel`."""
        while not self.done:
            await any_more([self], [self.num_steps])
        return self.result()

    def _each_step(self) -> Iterator[StepOutput]:
        sent = 0
        while self._more_than(sent, None):
            yield self._steps[sent]
            sent += 1
        if self._error is not None:
            raise self._error

    async def _each_step_soon(self) -> AsyncIterator[StepOutput]:
        sent = 0
        while True:
            await any_more([self], [sent])
            if not (more := self.steps_from(sent)):
                break
            for step in more:
                yield step
            sent += len(more)
        if self._error is not None:
            raise self._error

    def push(self, step: StepOutput) -> None:
        """The engine's: what one more step emitted."""
        self._steps.append(step)
        self._wake()

    def finish(self, result: Result | None, error: SpecdecError | None = None) -> None:
        """The engine's: no more tokens."""
        self._result, self._error = result, error
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
            waiting, self._waiting = self._waiting, []
        for waking, future in waiting:
            waking.wake(future)


async def any_more(handles: Sequence[Handle], have: Sequence[int]) -> None:
    """Wait, in asyncio, until one of several requests of one engine has more than so many steps, or is done."""

    def there() -> bool:
        return any(one.done or one.num_steps > had for one, had in zip(handles, have, strict=True))

    while not there():
        if not handles[0]._engine.threaded:
            await asyncio.to_thread(handles[0]._engine.step)
            continue
        waking = Waking.here()
        with waking.future() as future:
            for one in handles:
                with one._changed:
                    one._waiting.append((waking, future))
            try:
                if not there():  # asked again: a step may have come before anybody was told to wake us
                    await future
            finally:
                for one in handles:
                    with one._changed:
                        one._waiting = [pair for pair in one._waiting if pair[1] is not future]
