"""Exceptions of code that is not ours: who is to blame, and how to report them without running more of that code."""

from __future__ import annotations

import signal
import threading
from types import CodeType


def from_outside(fault: BaseException) -> bool:
    """Did `fault` come from outside of the code that was called: Ctrl-C, or a signal handler (an exit, a time limit)?

    Python runs signal handlers in the main thread alone, between any two of its instructions. Everything else was
    raised by the code that was called, `SystemExit` and the like included.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if isinstance(fault, KeyboardInterrupt):
        return True
    codes = _handlers()
    step = fault.__traceback__
    while step is not None:
        if step.tb_frame.f_code in codes:
            return True
        step = step.tb_next
    return False


def _handlers() -> set[CodeType]:
    """The code of all signal handlers that are written in Python."""
    found = set()
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        function = getattr(handler, "__func__", handler)
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            found.add(code)
    return found


def described(fault: BaseException) -> str:
    """Type and text of an exception, also of one whose text cannot be had."""
    name = type(fault).__name__
    try:
        text = str(fault)
    except BaseException as second:
        if from_outside(second):
            raise
        return f"{name} (whose own text raises {type(second).__name__})"
    return f"{name}: {text}" if text else name
