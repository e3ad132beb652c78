"""Ctrl-C anywhere in a step of an engine without a thread ends nobody's request and leaves no trace in any text."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from engine_cases import Ask, alone, asks, assert_clean, engine, submit

import specdec
from specdec.engine import Engine, Handle
from specdec.engine import engine as engine_module
from specdec.engine.lane import Lane
from specdec.engine.passes import EnginePasses
from specdec.engine.scheduler import Scheduler
from specdec.engine.stepping import Stepping
from specdec.engine.task import Mark

HOME = str(Path(specdec.__file__).parent.parent)


class Interrupter:
    """Raises KeyboardInterrupt at a chosen line of the library's own code, counted from the beginning of a step."""

    def __init__(self, line: int):
        self.left, self.where = line, ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(HOME) or "/.venv" in code.co_filename or "/tests/" in code.co_filename:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.where = f"{code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def live_through(monkeypatch: pytest.MonkeyPatch, crowd: list[Ask], seed: int) -> tuple[Engine, list[Handle], set[str]]:
    """The crowd's requests, served with an interruption in about every other step."""
    rng, places = random.Random(seed), set()
    step = Stepping.step

    def interrupted(self: Stepping) -> Any:
        if rng.random() < 0.5:
            return step(self)
        trace = Interrupter(int(2 ** rng.uniform(0, 12)))
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            return step(self)
        finally:
            sys.settrace(before)
            if trace.where:
                places.add(trace.where)

    monkeypatch.setattr(Stepping, "step", interrupted)
    served = engine(num_pages=40)
    handles = [submit(served, ask) for ask in crowd]
    for _ in range(2000):
        try:
            served.run()
            break
        except KeyboardInterrupt:
            assert not served._is_prepared
    return served, handles, places


@pytest.mark.parametrize("seed", range(4))
def test_texts_are_those_of_undisturbed_requests(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    crowd = asks(8, seed=20 + seed, shared=6)
    wanted = [alone(ask)[0] for ask in crowd]
    served, handles, places = live_through(monkeypatch, crowd, seed)
    assert [handle.result().token_ids for handle in handles] == wanted
    assert len(places) > 5
    assert_clean(served)
    monkeypatch.undo()
    assert submit(served, crowd[0]).result().token_ids == wanted[0]


def test_a_recovery_that_loses_count_of_steps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the step is taken again with another step's noise."""
    monkeypatch.setattr(
        engine_module, "marks", lambda tasks: {task: Mark(task.steps + 1, task.handle.num_tokens) for task in tasks}
    )
    crowd = [Ask(ask.prompt, "chain", ask.seed, 16, 1) for ask in asks(8, seed=20)]
    _, handles, _ = live_through(monkeypatch, crowd, 0)
    assert [handle.result().token_ids for handle in handles] != [alone(ask)[0] for ask in crowd]


PLACES: list[tuple[type, str]] = [
    (EnginePasses, "step"),
    (Scheduler, "admit"),
    (Scheduler, "reserve"),
    (Lane, "propose"),
    (Lane, "decide"),
    (Lane, "advance"),
    (Handle, "push"),
    (Handle, "finish"),
    (Stepping, "done"),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[f"{owner.__name__}.{name}" for owner, name in PLACES])
def test_who_waits_is_interrupted_and_all_others_go_on(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, after: bool
) -> None:
    crowd = asks(5, seed=31)
    served = engine()
    handles = [submit(served, ask) for ask in crowd]
    call, calls = getattr(owner, name), 0

    def once(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != 3:
            return call(self, *arguments, **options)
        if after:
            call(self, *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, once)
    interrupted = False
    for handle in handles:
        try:
            handle.result()
        except KeyboardInterrupt:
            interrupted = True
    assert interrupted
    assert [handle.result().token_ids for handle in handles] == [alone(ask)[0] for ask in crowd]
    assert all(list(handle) == handle.token_ids for handle in handles)
    assert_clean(served)
    served.close()


def test_a_last_step_that_nobody_was_told_of_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C behind the decision that ends a request, before its handle hears of it."""
    crowd = asks(5, seed=32)
    emit, ends = Stepping._emit, []

    def interrupted(self: Stepping, lane: Lane, emitted: Any) -> None:
        if emitted.reason is not None:
            ends.append(emitted.task)
            if ends.count(emitted.task) == 1:
                raise KeyboardInterrupt
        emit(self, lane, emitted)

    monkeypatch.setattr(Stepping, "_emit", interrupted)
    served = engine()
    handles = [submit(served, ask) for ask in crowd]
    for _ in crowd:
        with pytest.raises(KeyboardInterrupt):
            served.run()
    served.run()
    assert [handle.result().token_ids for handle in handles] == [alone(ask)[0] for ask in crowd]
    assert_clean(served)


def test_an_interrupted_engine_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine()
    handles = [submit(served, ask) for ask in asks(4, seed=5)]
    served.step()
    with monkeypatch.context() as patched:
        patched.setattr(Lane, "decide", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            served.run()
    served.close()
    assert all(handle.done for handle in handles)
    assert_clean(served)


def test_a_second_interruption_waits_for_the_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real signal in the middle of it: texts stay, and both are heard."""
    drafts = ["best", "dyspec", "tree", "chain"]
    crowd = [Ask(a.prompt, draft, a.seed, 12, 1) for a, draft in zip(asks(4, seed=8), drafts, strict=True)]
    step, restart, steps, impatient = Stepping.step, Stepping.restart, 0, 0

    def interrupted(self: Stepping) -> Any:
        nonlocal steps
        steps += 1
        done = step(self)
        if steps in (2, 5):
            raise KeyboardInterrupt
        return done

    def restarted(self: Stepping, tasks: Any) -> None:
        nonlocal impatient
        impatient += 1
        signal.raise_signal(signal.SIGINT)
        restart(self, tasks)

    monkeypatch.setattr(Stepping, "step", interrupted)
    monkeypatch.setattr(Stepping, "restart", restarted)
    served = engine()
    handles = [submit(served, ask) for ask in crowd]
    usual, heard = signal.getsignal(signal.SIGINT), 0
    for _ in range(10):
        try:
            served.run()
            break
        except KeyboardInterrupt:
            heard += 1
            assert signal.getsignal(signal.SIGINT) is usual
    assert heard == impatient == 2
    assert [handle.result().token_ids for handle in handles] == [alone(ask)[0] for ask in crowd]
    assert_clean(served)
