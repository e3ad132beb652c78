"""The guard around a drafter: what it forgets after a fault, when it gives up, and what it passes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters import Budget, Drafter, DrafterFaultWarning, DrafterNoteWarning, FallbackGuard, Session
from specdec.drafters.base import CACHE_NAME
from specdec.drafters.guard import MAX_CONSECUTIVE_FAULTS
from specdec.verify import DraftTree, Rows, Topology, Verdict

NO_NOISE = torch.zeros(2, 9, dtype=torch.float64)
NOTHING: Any = None


class Spy:
    """A shared cache that notes whose K/V it was told to forget."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []

    def forget(self, name: str) -> None:
        self.forgotten.append(name)


class Scripted(Drafter):
    """Fails at the proposals it is told to."""

    name, max_depth, max_nodes = "scripted", 3, 3

    def __init__(self, fails: Callable[[int], bool], layers: int = 2):
        self.fails, self.layers = fails, layers
        self.num_calls = 0
        self.budgets: list[Budget] = []
        self.heard: list[str] = []

    @property
    def num_cache_layers(self) -> int:
        return self.layers

    def start(self, session: Session) -> None:
        self.session = session
        self.heard.append("start")

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        call, self.num_calls = self.num_calls, self.num_calls + 1
        self.budgets.append(budget)
        if self.fails(call):
            raise RuntimeError(f"call {call}")
        roots = self.session.rows.roots()
        return DraftTree.build(Topology.chain(2), torch.stack([roots, roots, roots], 1))

    def observe(self, verdict: Verdict, logits: Tensor) -> None:
        self.heard.append("observe")

    def join(self, rows: Any) -> None:
        self.heard.append(f"join {list(rows)}")

    def stop(self, rows: Any) -> None:
        self.heard.append(f"stop {list(rows)}")

    def finish(self) -> None:
        self.heard.append("finish")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DrafterFaultWarning)
        yield


def started(inner: Drafter, most_nodes: int | None = None) -> tuple[FallbackGuard, Spy]:
    rows, cache = Rows(torch.tensor([[3, 4], [5, 6]]), None, 8), Spy()
    guard = FallbackGuard(inner, most_nodes)
    shared: Any = cache
    guard.start(Session(rows, shared, NOTHING, do_sample=False, vocab=9))
    return guard, cache


def nodes(guard: FallbackGuard, depth: int = 3, most: int = 3) -> int:
    return guard.propose(Budget((depth, depth), most), NO_NOISE).tokens.shape[1]


def test_after_one_fault_its_kv_is_forgotten_and_the_next_step_drafts() -> None:
    guard, cache = started(Scripted(lambda call: call == 1))
    assert [nodes(guard) for _ in range(3)] == [3, 1, 3]
    assert cache.forgotten == [CACHE_NAME]
    assert (guard.num_faults, guard.last_fault) == (1, "RuntimeError: call 1")
    without, cache = started(Scripted(lambda call: True, layers=0))
    assert nodes(without) == 1
    assert cache.forgotten == [], "it keeps no K/V"


def test_it_gives_up_after_faults_in_a_row_only() -> None:
    most = MAX_CONSECUTIVE_FAULTS
    guard, _ = started(Scripted(lambda call: call % most != most - 1))  # one good proposal in eight
    assert [nodes(guard) for _ in range(4 * most)] == [*[1] * (most - 1), 3] * 4
    hopeless = Scripted(lambda call: True)
    guard, _ = started(hopeless)
    assert [nodes(guard) for _ in range(2 * most)] == [1] * (2 * most)
    assert hopeless.num_calls == guard.num_faults == most
    hopeless.fails = lambda call: False
    assert nodes(guard) == 1, "left alone for the rest of the call"
    guard.join([1])
    assert nodes(guard) == 3, "a new request, a new chance"


def test_another_call_begins_with_nothing_held_against_it() -> None:
    inner = Scripted(lambda call: True)
    guard, cache = started(inner)
    for _ in range(MAX_CONSECUTIVE_FAULTS):
        nodes(guard)
    inner.fails = lambda call: False
    guard.start(inner.session)
    assert (guard.num_faults, guard.last_fault) == (0, None)
    assert nodes(guard) == 3
    assert cache.forgotten == [CACHE_NAME] * MAX_CONSECUTIVE_FAULTS


def test_one_warning_a_call() -> None:
    inner = Scripted(lambda call: call % 2 == 0)
    guard, _ = started(inner)
    for _ in range(2):
        inner.num_calls = 0
        guard.start(inner.session)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(6):
                nodes(guard)
        assert [entry.category for entry in caught] == [DrafterFaultWarning]
        assert "scripted" in str(caught[0].message)
        assert guard.num_faults == 3


def test_what_a_drafter_has_to_say_is_told_once_a_call() -> None:
    inner = Scripted(lambda call: False)
    guard, _ = started(inner)
    nodes(guard)
    inner.notes = ["first", "second"]
    assert guard.notes == inner.notes
    for begin in (lambda: None, lambda: guard.start(inner.session)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            begin()
            nodes(guard)
            guard.join([0])
        assert [(entry.category, str(entry.message)) for entry in caught] == [(DrafterNoteWarning, "first")]
    assert guard.num_faults == 0


def test_a_drafter_is_not_asked_for_nothing() -> None:
    inner = Scripted(lambda call: False)
    guard, _ = started(inner)
    assert (nodes(guard, depth=0), nodes(guard, most=0)) == (1, 1)
    assert inner.num_calls == 0
    assert (nodes(guard, depth=1, most=1), inner.num_calls) == (3, 1)


def test_a_narrow_pass_has_room_for_fewer_nodes() -> None:
    inner = Scripted(lambda call: False)
    guard, _ = started(inner, most_nodes=1)
    assert guard.max_nodes == 1
    assert guard.nodes_within(3) == 1
    assert nodes(guard) == 1, "two drafted tokens do not fit: a fault"
    assert guard.num_faults == 1
    wide, _ = started(inner, most_nodes=2)
    assert nodes(wide) == 3
    assert wide.num_faults == 0
    assert FallbackGuard(inner, 50).max_nodes == 3
    assert wide.clone().max_nodes == 2
    assert wide.clone().inner is not inner


def test_everything_else_is_passed_on_and_a_fault_there_is_counted_too() -> None:
    inner = Scripted(lambda call: False)
    guard, cache = started(inner)
    guard.observe(NOTHING, NO_NOISE)
    guard.join([1])
    guard.stop([0])
    guard.finish()
    assert inner.heard == ["start", "observe", "join [1]", "stop [0]", "finish"]
    guard.finish()
    assert inner.heard[-2:] == ["stop [0]", "finish"], "a call is finished once"

    class Blind(Scripted):
        def observe(self, verdict: Verdict, logits: Tensor) -> None:
            raise ValueError("cannot look")

    guard, cache = started(Blind(lambda call: False))
    for _ in range(3):
        assert nodes(guard) == 3
        guard.observe(NOTHING, NO_NOISE)
    assert guard.num_faults == 3
    assert cache.forgotten == [CACHE_NAME] * 3


@pytest.mark.parametrize("token", [8, 9])
def test_leading_levels_of_a_sick_tree_are_kept_only_if_they_are_sound(token: int) -> None:
    """The second level's law is NaN; a token that is none of the target's may not get through with the first."""

    class Sick(Scripted):
        def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
            roots = self.session.rows.roots()
            laws = torch.full((2, 2, 9), 1 / 9)
            laws[:, 1] = float("nan")
            return DraftTree.build(Topology.chain(2), torch.stack([roots, torch.tensor([1, token]), roots], 1), laws)

    guard, _ = started(Sick(lambda call: False))
    tree = guard.propose(Budget((2, 2), 3), NO_NOISE)
    assert int(tree.num_nodes.max()) == (2 if token < 9 else 1)
    assert guard.num_faults == 1
