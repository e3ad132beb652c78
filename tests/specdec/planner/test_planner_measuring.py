"""What measuring costs may run: nothing of the caller's, in no shape that the call does not have; and it may fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measuring_cases import DRAFT, GREEDY, TARGET, batch, measured_quickly, plain
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from specdec import ModelDrafter, NgramDrafter, Speculator
from specdec.drafters import Budget, Session
from specdec.monitor import Monitor
from specdec.planner import factory
from specdec.planner.costs import Costs
from specdec.planner.measure import kept_processors
from specdec.verify import DraftTree


@pytest.fixture(name="measured", autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return measured_quickly(monkeypatch)


class Watching:
    """The batch sizes it was shown."""

    def __init__(self) -> None:
        self.rows: set[int] = set()


class Seen(LogitsProcessor, Watching):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.rows.add(len(input_ids))
        return scores


class Warmer(TemperatureLogitsWarper):
    """A subclass of a known one is the caller's, whatever it calls itself."""

    seen: set[int] = set()  # noqa: RUF012 - a spy

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.add(len(input_ids))
        return super().__call__(input_ids, scores)


class Stop(MaxLengthCriteria, Watching):
    def __init__(self) -> None:
        super().__init__(10**6)
        self.rows = set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.rows.add(len(input_ids))
        return super().__call__(input_ids, scores, **kwargs)


class Stream(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.pieces.append(value)

    def end(self) -> None:
        pass


class Watch(Monitor):
    rows: set[int] = set()  # noqa: RUF012 - a spy

    def stepped(self, loop: Any) -> None:
        self.rows.add(loop.rows.batch_size)


@pytest.mark.parametrize("rows", [5, 7])
def test_a_batch_of_an_odd_size_with_a_processor_of_one_value_per_row(rows: int, measured: list[int]) -> None:
    spec = Speculator(TARGET, "ngram")
    out: Any = spec.generate(**batch(rows), **GREEDY, repetition_penalty=1.3)
    assert torch.equal(out, plain(rows, repetition_penalty=1.3))
    assert spec.report is not None
    assert spec.report.plan is not None
    assert not spec.report.notes
    assert sorted(measured) == [1, rows + 1], "tables are still those of the next size"


def test_nothing_of_the_callers_runs_while_costs_are_measured(measured: list[int]) -> None:
    processors, stop, asked, monitor = LogitsProcessorList([Seen(), Warmer(0.7)]), Stop(), set(), Watch()
    Warmer.seen.clear()
    Watch.rows.clear()
    steps: list[int] = []

    def allowed(row: int, ids: Tensor) -> list[int]:
        asked.add(row)
        return list(range(8))

    spec = Speculator(TARGET, [DRAFT, "ngram"], monitor=monitor)
    spec.generate(
        **batch(5), **{**GREEDY, "do_sample": True, "top_k": 0}, logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([stop]), prefix_allowed_tokens_fn=allowed,
        on_step=lambda trace: steps.append(trace.step),
    )  # fmt: skip
    assert sorted(measured) == [1, 6]
    assert spec.report is not None
    assert asked <= set(range(5))
    assert monitor.rows == {5}
    assert 6 not in processors[0].rows | Warmer.seen | stop.rows
    assert steps == list(range(spec.report.num_steps))
    assert spec.report.acceptance_z is None
    stream = Stream()
    row = {name: part[1:2] for name, part in batch(2).items()}
    spec.generate(**row, **GREEDY, streamer=stream)
    assert len(stream.pieces) == 1 + GREEDY["max_new_tokens"]


def test_which_processors_may_see_scratch_text() -> None:
    penalty = RepetitionPenaltyLogitsProcessor(1.2)
    given = LogitsProcessorList([TemperatureLogitsWarper(0.5), penalty, Warmer(0.5), Seen(), TopKLogitsWarper(3)])
    assert [type(one) for one in kept_processors(given)] == [TemperatureLogitsWarper, TopKLogitsWarper]


def test_tables_of_calls_with_other_processors_are_other_ones(measured: list[int]) -> None:
    spec = Speculator(TARGET, "ngram")
    settings: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3},
        {"logits_processor": LogitsProcessorList([Seen()])},
    ]
    for twice in range(2):
        for extra in settings:
            spec.generate(**batch(1), **GREEDY, **extra)
        assert measured == [1] * len(settings), "each is measured once" if twice else ""


class Odd(NgramDrafter):
    """A drafter of the caller's that keeps an eye on the shape of its sessions."""

    shapes: list[int] = []  # noqa: RUF012 - a spy
    asked: list[int] = []  # noqa: RUF012 - by identity of the object

    def start(self, session: Session) -> None:
        self.shapes.append(session.rows.batch_size)
        super().start(session)

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        self.asked.append(id(self))
        return super().propose(budget, uniforms)


class OddModel(ModelDrafter):
    shapes: list[int] = []  # noqa: RUF012 - a spy

    def start(self, session: Session) -> None:
        self.shapes.append(session.rows.batch_size)
        super().start(session)


@pytest.mark.parametrize("drafter", [Odd(k=3), OddModel(DRAFT, k=3)], ids=["ngram", "model"])
def test_a_drafter_of_ones_own_is_cloned_and_sees_the_calls_own_number_of_rows(
    drafter: Any, measured: list[int]
) -> None:
    drafter.shapes.clear()
    spec = Speculator(TARGET, drafter, k="auto")

    def planned() -> bool:
        assert spec.report is not None
        return spec.report.plan is not None

    out: Any = spec.generate(**batch(5), **GREEDY)
    assert torch.equal(out, plain(5))
    assert spec.report is not None
    assert planned()
    assert measured == [5]
    assert set(drafter.shapes) == {5}
    spec.generate(**batch(3), **{**GREEDY, "do_sample": True, "top_k": 0}, seed=1)
    assert set(drafter.shapes) == {5, 3}
    assert not planned()
    assert any("would have to draft for one row where the call has 3" in note for note in spec.report.notes)
    spec.generate(**batch(1), **{**GREEDY, "do_sample": True, "top_k": 0}, seed=1)
    assert planned()
    assert measured == [5, 1]


def test_the_callers_drafter_itself_runs_in_no_measurement(measured: list[int]) -> None:
    drafter = Odd(k=3)
    Odd.asked.clear()
    spec = Speculator(TARGET, drafter, k="auto")
    Speculator(TARGET, k=None).generate(**batch(1), **GREEDY)
    spec.planners.planner_for(_request(spec))  # type: ignore[union-attr]
    assert measured == [1]
    assert Odd.asked
    assert id(drafter) not in Odd.asked


def _request(spec: Speculator) -> Any:
    """What a call hands to its planner."""
    caught: list[Any] = []
    plans: Any = spec.planners
    call = plans.planner_for
    other = Odd.asked[:]

    def watched(request: Any, *rest: Any) -> Any:
        caught.append(request)
        return call(request, *rest)

    plans.planner_for = watched
    try:
        target: Any = spec.target
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(factory, "measure", _no_clock)
            spec.generate(**batch(1), **GREEDY)
    finally:
        plans.planner_for = call
    assert target is TARGET
    Odd.asked[:] = other
    return caught[0]


def _no_clock(*_: Any, **__: Any) -> Costs:
    raise RuntimeError("no clock")
