"""Requests that were taken but that no step has seen yet: whoever submits one waits for no step to end."""

from __future__ import annotations

import threading

from specdec.engine.errors import EngineClosedError, QueueFullError
from specdec.engine.task import Task


class Arrivals:
    """Safe from any thread.

    Attributes:
        work: a condition, notified whenever something arrives.
    """

    def __init__(self) -> None:
        self.work = threading.Condition()
        self._closed = False
        self._tasks: dict[int, Task] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def close(self) -> None:
        """Nothing arrives from now on. Repeating it is no error."""
        with self.work:
            self._closed = True

    def refuse_closed(self) -> None:
        """Raises EngineClosedError: after the end."""
        if self._closed:
            raise EngineClosedError("expected an open engine, this one was closed: make another one")

    def refuse(self, waiting: int, most: int) -> None:
        """Raises EngineClosedError: after the end. QueueFullError: `most` requests wait already, here or there."""
        self.refuse_closed()
        if waiting + len(self._tasks) >= most:
            raise QueueFullError(
                f"expected fewer than {most} waiting requests: wait for some to finish and submit again, or give the "
                "engine a larger max_waiting"
            )

    def add(self, task: Task, waiting: int, most: int) -> None:
        """The next step takes it. Raises as `refuse`."""
        with self.work:
            self.refuse(waiting, most)
            self._tasks[task.handle.id] = task
            self.work.notify_all()

    def find(self, number: int) -> Task | None:
        """The request with this handle's number, if it is still here."""
        return self._tasks.get(number)

    def take_into(self, tasks: dict[int, Task]) -> list[Task]:
        """All that are here, which are in `tasks` before they are here no more: they can be found at any time."""
        with self.work:
            new = list(self._tasks.values())
            tasks.update(self._tasks)
            self._tasks = {}
            return new
