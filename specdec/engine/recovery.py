"""What is left of a step that was interrupted from outside (Ctrl-C): every request goes on from what it was told."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from specdec.engine.stepping import Stepping
from specdec.engine.task import Mark, State, Task


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside the block further Ctrl-Cs wait: a recovery cut in two could not be told from a finished one.

    Signals reach the main thread only, and only Python's own handler is put off, at most one of its calls.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if came:
            usual(*came[0])


def recover(stepping: Stepping, tasks: Sequence[Task], before: Mapping[Task, Mark]) -> None:
    """Put every request back to waiting, or end it if its last tokens were handed over.

    An interruption may come between any two operations: K/V may be half-written, pages taken by nobody, drafters out
    of step with the text. So nothing is kept but the requests themselves; their K/V is computed again. What a handle
    was told stands and its step counts; where it was told nothing, the step is taken again from its beginning, with
    the same noise: nobody has seen what came of it, and an interruption does not depend on it.
    """
    for task in tasks:
        emitted = task.handle.token_ids
        mark = before.get(task, Mark(0, 0))
        told = len(emitted) > mark.num_tokens
        ended = task.ending if told else None
        task.text = [*task.handle.prompt_ids, *emitted]
        task.steps = mark.num_steps + told
        task.ending = None
        task.put_back()
        if task.handle.done:
            task.state = State.DONE
        elif ended is not None:
            stepping.done(task, ended)
    stepping.restart([task for task in tasks if task.state is State.WAITING])
