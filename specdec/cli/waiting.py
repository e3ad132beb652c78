"""A spinner where a first call compiles and measures, in place of the log's line. Imports torch, by what it hears."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from specdec.verify.first_use import BEGINS, ENDS, LOGGER

WAITING = "first use on this machine: compiling and measuring, once (see specdec warmup)"
REDRAWS = 2
"""Per second: what turns must not compete with what is measured."""


class Spinner(logging.Handler):
    """Turns between the records of a first use; shows other warnings as they are."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console
        self._status = console.status(WAITING, refresh_per_second=REDRAWS)

    def emit(self, record: logging.LogRecord) -> None:
        phase = getattr(record, "first_use", None)
        if phase == BEGINS:
            self._status.start()
        elif phase == ENDS:
            self._status.stop()
        elif record.levelno >= logging.WARNING:
            self._console.print(self.format(record), markup=False)


@contextmanager
def spinner() -> Iterator[None]:
    """For commands without a bar of their own. It is gone before any text is shown: first uses lie before it. Where
    standard error is no terminal, the log's one line says the same."""
    if not sys.stderr.isatty():
        yield
        return
    handler, level = Spinner(Console(stderr=True)), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
