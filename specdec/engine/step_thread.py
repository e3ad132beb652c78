"""The thread that takes an engine's steps."""

from __future__ import annotations

import threading
from collections.abc import Callable


class StepThread:
    """Calls `step` as long as there is work, and sleeps while there is none.

    Args:
        step: one step; it tells the requests it concerns about its errors itself.
        idle: whether there is nothing to do; asked under `work`.
        work: notified whenever there may be something to do.
    """

    def __init__(self, step: Callable[[], object], idle: Callable[[], bool], work: threading.Condition):
        self._step, self._idle, self._work = step, idle, work
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def current(self) -> bool:
        """Whether it is this thread that asks."""
        return self._thread is threading.current_thread()

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Repeating it is no error."""
        with self._work:
            if not self.alive:
                self._stopping = False
                self._thread = threading.Thread(target=self._drive, name="specdec-engine", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End the thread after the step at hand."""
        thread = self._thread
        with self._work:
            self._stopping = True
            self._work.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._thread = None

    def _drive(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._stopping or not self._idle())
                if self._stopping:
                    return
            try:
                self._step()
            except BaseException:
                # Every handle has been told; the thread must live on for the requests to come. No signal is heard here:
                # an exit, or whatever else it is, was raised by code that was called.
                continue
