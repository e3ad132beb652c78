"""Whose fault an exception is: Ctrl-C and signal handlers are nobody's, everything else is that of the code called."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import pytest
from engine_cases import Ask, alone, asks, assert_clean, engine, submit
from engine_plants import PLANTS, UnreadableError

from specdec.engine import RequestFaultError
from specdec.kv.faults import described, from_outside


def caught(call: Any) -> BaseException:
    try:
        call()
    except BaseException as fault:
        return fault
    raise AssertionError("nothing was raised")


def raising(error: BaseException | type[BaseException]) -> Any:
    def call() -> None:
        raise error

    return call


class Alarm:
    """A time limit as programs make one: a signal handler that raises."""

    def __init__(self) -> None:
        self.rung = 0

    def ring(self, number: int, frame: FrameType | None) -> None:
        self.rung += 1
        raise TimeoutError("the program's own time limit")


def ring() -> None:
    signal.raise_signal(signal.SIGALRM)


@pytest.fixture
def alarm() -> Any:
    one = Alarm()
    before = signal.signal(signal.SIGALRM, one.ring)
    yield one
    signal.signal(signal.SIGALRM, before)


def test_what_comes_from_outside(alarm: Alarm) -> None:
    assert from_outside(caught(raising(KeyboardInterrupt)))
    assert from_outside(caught(ring))
    for error in (TimeoutError("own"), SystemExit(1), GeneratorExit(), ValueError("x")):
        assert not from_outside(caught(raising(error)))
    in_a_thread: list[bool] = []
    thread = threading.Thread(target=lambda: in_a_thread.append(from_outside(caught(raising(KeyboardInterrupt)))))
    thread.start()
    thread.join()
    assert in_a_thread == [False]


def test_what_is_said_of_a_fault() -> None:
    assert described(ValueError("why")) == "ValueError: why"
    assert described(StopIteration()) == "StopIteration"
    assert described(UnreadableError()) == "UnreadableError (whose own text raises RuntimeError)"


@pytest.mark.parametrize("plant", ["processor raises error", "pure processor raises error", "criterion raises error"])
def test_a_time_limit_that_strikes_in_a_requests_code_is_not_its_fault(plant: str, alarm: Alarm) -> None:
    """It strikes who waits; all requests go on from where they were. The one in whose code it struck does if that code
    is known to keep nothing; else it ends with an error that says so, for nobody knows how far the code had come."""
    crowd = asks(4, seed=61)
    served = engine()
    handles = [submit(served, ask) for ask in crowd]
    options = PLANTS[plant](6)
    (thing,) = options.get("logits_processor") or options["stopping_criteria"]

    def act(ids: Any, scores: Any) -> Any:
        if not alarm.rung:
            ring()
        return scores if "processor" in plant else ids.new_zeros(1, dtype=bool)

    thing.act = act
    struck = served.submit(
        [5, 6, 7, 8], do_sample=False, max_new_tokens=9, eos_token_id=None, pad_token_id=0, **options
    )
    with pytest.raises(TimeoutError):
        served.run()
    served.run()
    assert alarm.rung == 1
    assert [handle.result().token_ids for handle in handles] == [alone(ask)[0] for ask in crowd]
    plain = Ask((5, 6, 7, 8), "none", 0, 9, 0, extra={"eos_token_id": None})
    if plant.startswith("pure"):
        assert struck.result().token_ids == alone.__wrapped__(plain)[0]
    else:
        with pytest.raises(RequestFaultError, match=r"a step was interrupted .* was called; that may keep state"):
            struck.result()
    served.close()
    assert_clean(served)


def test_the_same_error_of_its_own_is_its_fault(alarm: Alarm) -> None:
    served = engine()
    options = PLANTS["processor raises error"](6)
    options["logits_processor"][0].act = raising(TimeoutError("own"))
    handle = served.submit([5, 6, 7, 8], do_sample=False, max_new_tokens=9, pad_token_id=0, **options)
    served.run()
    with pytest.raises(RequestFaultError):
        handle.result()
    served.close()
    assert_clean(served)
