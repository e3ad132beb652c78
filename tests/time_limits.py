"""A time limit for every test (pytest-timeout): what hangs fails with the stacks of all threads, and the suite goes on.

A test's own limit: `@pytest.mark.timeout(seconds)`. Three things hang differently:

* Python code that waits, for a lock or a thread: an alarm fails the test where it stands.
* C code that never comes back (a native pass whose threads do not meet) takes no alarms: after half as long again the
  stacks are written to stderr and the process ends; under xdist that is one worker, which names its test.
* A thread that is left behind and does not end keeps the interpreter from ending: so it is given a while, no more.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Generator
from typing import Any

import pytest

SLOW_SECONDS = 900
"""Limit of tests marked slow; that of all others is in pyproject.toml. Ten times what they take on two free cores."""
EXIT_SECONDS = float(os.environ.get("SPECDEC_EXIT_SECONDS", "60"))
"""For threads left behind by tests."""

_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    assert sys.__stderr__ is not None
    config.stash[_stderr] = os.dup(sys.__stderr__.fileno())  # while a test runs, the other one is captured


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Generator[None, object, object]:
    faulthandler.dump_traceback_later(1.5 * settings.timeout, exit=True, file=item.config.stash[_stderr])
    return (yield)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> Generator[None, object, object]:
    faulthandler.cancel_dump_traceback_later()
    return (yield)


def pytest_unconfigure(config: pytest.Config) -> None:
    left = [thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]
    if left:
        faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True, file=config.stash[_stderr])
