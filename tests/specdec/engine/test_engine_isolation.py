"""One request's fault is that request's: whatever its own code raises or returns, all others get their text."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from engine_cases import DRAFTERS, Ask, alone, asks, assert_clean, engine, submit
from engine_plants import LAWLESS, PLANTS, RAISED, Plant, PureProcessor, calling, raising

from specdec.drafters import NgramDrafter
from specdec.engine import Engine, EngineFaultError, Handle, RequestFaultError
from specdec.engine.lane import Lane
from specdec.engine.waking import Waking

PROMPT = [5, 6, 7, 8]
CROWD = [
    Ask(ask.prompt, list(DRAFTERS)[i % len(DRAFTERS)], ask.seed, 10, [0, 1, 2, 4, 5][i % 5])
    for i, ask in enumerate(asks(12, seed=41))
]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "specdec-engine"]


def planted(served: Engine, plants: dict[str, Plant]) -> tuple[list[Handle], dict[str, Handle]]:
    """The crowd, with a bad request for each plant between its members."""
    good: list[Handle] = []
    bad: dict[str, Handle] = {}
    names = list(plants)
    for i, ask in enumerate(CROWD):
        good.append(submit(served, ask))
        for number in range(i, len(names), len(CROWD)):
            options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **plants[names[number]](5 + i % 4)}
            draft = list(DRAFTERS)[number % len(DRAFTERS)]
            bad[names[number]] = served.submit(PROMPT, max_new_tokens=12, draft=draft, seed=number, **options)
    return good, bad


def check(good: list[Handle], bad: dict[str, Handle]) -> None:
    plain = alone(Ask(tuple(PROMPT), "none", 0, 12, 0, extra={"eos_token_id": None}))[0]
    assert [handle.result(120).token_ids for handle in good] == [alone(ask)[0] for ask in CROWD]
    for name, handle in bad.items():
        with pytest.raises(RequestFaultError, match=f"request {handle.id} failed at its step") as error:
            handle.result(120)
        fault = error.value
        assert fault.request == handle.id, name
        assert fault.emitted == handle.token_ids, name
        if "leaves" not in name:  # those are sampled
            assert fault.emitted == plain[: len(fault.emitted)], name
        raised = next((kind for word, kind in RAISED.items() if name.endswith(f"raises {word}")), None)
        if raised is not None:
            kind = raised if isinstance(raised, type) else type(raised)
            assert isinstance(fault.__cause__, kind), (name, fault)


@pytest.mark.parametrize("threaded", [False, True])
def test_whatever_a_request_does_the_others_get_their_text(threaded: bool) -> None:
    served = engine(num_pages=80)
    if threaded:
        served.start()
    good, bad = planted(served, PLANTS)
    if not threaded:
        served.run()
    check(good, bad)
    assert served.threaded is threaded
    assert submit(served, CROWD[0]).result(60).token_ids == alone(CROWD[0])[0]
    assert served.metrics().num_finished["error"] == len(PLANTS)
    served.close()
    assert_clean(served)


@pytest.mark.filterwarnings("ignore:drafter .* failed:UserWarning")
def test_an_engine_that_does_not_look_whose_fault_it_is_loses_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the law's own isolation is taken away."""
    monkeypatch.setattr("specdec.engine.law.from_outside", lambda fault: True)
    served = engine(num_pages=80)
    good, _ = planted(served, {"last token": PLANTS["last token beyond the vocabulary"]})
    with pytest.raises(IndexError, match="out of bounds"):
        served.run()
    with pytest.raises(EngineFaultError, match="out of bounds") as error:
        good[0].result()
    assert isinstance(error.value.__cause__, IndexError)
    assert error.value.emitted == good[0].token_ids
    monkeypatch.undo()
    assert submit(served, CROWD[1]).result().token_ids == alone(CROWD[1])[0]  # the engine itself goes on
    served.close()
    assert_clean(served)


@pytest.mark.parametrize("left", LAWLESS)
def test_a_row_without_a_law_leaves_its_companions_their_drafts(left: str) -> None:
    """The drafter meets it before the decision does: behind tokens that are not emitted yet."""
    served = engine(num_pages=80)
    crowd = [Ask(ask.prompt, "chain", ask.seed, 14, 1) for ask in CROWD[:3]]
    good = [submit(served, ask) for ask in crowd]
    act = PureProcessor(LAWLESS[left], len(PROMPT) + 6)
    bad = served.submit(
        PROMPT, max_new_tokens=14, draft="chain", do_sample=True, seed=1, eos_token_id=None, logits_processor=[act]
    )
    served.run()
    assert [handle.result().token_ids for handle in good] == [alone(ask)[0] for ask in crowd]
    with pytest.raises(RequestFaultError, match="no law"):
        bad.result()
    assert served.metrics().num_drafter_faults == 0
    served.close()


@pytest.mark.filterwarnings("ignore:drafter .* failed:UserWarning")
def test_drafts_that_one_request_can_spoil_change_other_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: drafters get the law as it is, with the NaN of one row in it."""
    monkeypatch.setattr("specdec.engine.lane.DraftingLaw", lambda law: law)
    served = engine(num_pages=80)
    good, _ = planted(served, PLANTS)
    served.run()
    assert [handle.result().token_ids for handle in good] != [alone(ask)[0] for ask in CROWD]
    served.close()


@pytest.mark.parametrize("name", ["step", "run", "close", "clear_prefix_cache"])
@pytest.mark.parametrize("threaded", [False, True])
def test_a_processor_cannot_use_the_engine_that_calls_it(name: str, threaded: bool) -> None:
    served = engine(num_pages=80)
    if threaded:
        served.start()
    good, bad = planted(served, {name: calling(served, name)})
    check(good, bad)
    with pytest.raises(RequestFaultError, match="in the middle of a step"):
        bad[name].result()
    served.close()
    assert_clean(served)


@pytest.mark.parametrize("threaded", [False, True])
def test_a_processor_cannot_wait_for_another_request(threaded: bool) -> None:
    served = engine(num_pages=80)
    other = submit(served, CROWD[0])
    if threaded:
        served.start()

    def wait(*_: Any) -> Any:
        return other.result(60)

    options = PLANTS["processor returns none"](5)
    options["logits_processor"][0].act = wait
    waiting = served.submit(PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
    with pytest.raises(RequestFaultError):
        waiting.result(60)
    assert other.result(60).token_ids == alone(CROWD[0])[0]
    served.close()
    assert_clean(served)


def test_ctrl_c_in_the_engines_own_thread_is_that_requests_fault() -> None:
    """No signal gets there; who waits in the main thread is interrupted himself."""
    served = engine(num_pages=80)
    with served:
        plants = {"keyboard": PLANTS["processor raises error"]}
        good, bad = planted(served, plants)
        options = PLANTS["processor raises error"](5)
        options["logits_processor"][0].act = raising(KeyboardInterrupt)
        pressed = served.submit(PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
        check(good, bad)
        with pytest.raises(RequestFaultError, match="KeyboardInterrupt"):
            pressed.result(60)
        assert served.threaded
    assert_clean(served)


class Broken(NgramDrafter):
    """Raises what no drafter should, in the method it is told to."""

    def __init__(self, method: str, error: Any):
        super().__init__(k=4)
        self.method, self.error = method, error


METHODS = ("start", "propose", "observe", "join", "stop", "finish", "nodes_within", "clone", "running")

for _name in METHODS:

    def _failing(self: Any, *arguments: Any, _name: str = _name) -> Any:
        if self.method == _name:
            raise self.error
        return getattr(NgramDrafter, _name)(self, *arguments)

    setattr(Broken, _name, _failing)


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), SystemExit(2), GeneratorExit()], ids=lambda e: type(e).__name__
)
@pytest.mark.filterwarnings("ignore:drafter .* failed:UserWarning")
def test_a_drafter_that_raises_costs_speed_only(error: BaseException) -> None:
    served = engine(num_pages=80, drafters={name: Broken(name, error) for name in METHODS})
    with served:
        handles = {name: submit(served, CROWD[0], draft=name, do_sample=False) for name in METHODS}
        plain = alone(Ask(CROWD[0].prompt, "none", 0, 10, 0))[0]
        assert {name: handle.result(60).token_ids for name, handle in handles.items()} == dict.fromkeys(METHODS, plain)
        assert served.threaded
    assert_clean(served)


def test_a_listener_whose_loop_is_gone_is_nobodys_loss() -> None:
    """An event loop that is closed between two tokens, while somebody is still noted as waiting in it."""
    served = engine()
    handle = submit(served, CROWD[0])
    loop = asyncio.new_event_loop()
    handle._waiting.append((Waking(loop), loop.create_future()))
    loop.close()
    served.run()
    assert handle.result().token_ids == alone(CROWD[0])[0]
    served.close()
    assert_clean(served)


def test_nobody_needs_to_keep_a_handle() -> None:
    with engine() as served:
        submit(served, CROWD[1])
        handle = submit(served, CROWD[0])
        submit(served, CROWD[2])
        assert handle.result(60).token_ids == alone(CROWD[0])[0]
    assert served.metrics().num_finished.get("error", 0) == 0
    assert_clean(served)


def test_a_thread_survives_an_exit_that_comes_from_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the engine's thread no signal is heard: it is a fault like any other, all are told, and it goes on."""
    served = engine()
    decide, times = Lane.decide, 0

    def once(self: Lane, *given: Any, **options: Any) -> Any:
        nonlocal times
        times += 1
        if times == 2:
            raise SystemExit
        return decide(self, *given, **options)

    monkeypatch.setattr(Lane, "decide", once)
    with served:
        handles = [submit(served, ask) for ask in CROWD[:4]]
        with pytest.raises(EngineFaultError, match="SystemExit"):
            [handle.result(60) for handle in handles]
        assert submit(served, CROWD[0]).result(60).token_ids == alone(CROWD[0])[0]
        assert served.threaded
    assert_clean(served)
