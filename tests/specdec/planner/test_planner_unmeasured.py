"""Calls whose costs must not or cannot be measured go on, with a note."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from context_cases import SAME, with_fewer_positions
from exact_law import noisy_copy, tiny_llama
from measuring_cases import DRAFT, GREEDY, TARGET, batch, measured_quickly, plain
from torch import Tensor

from specdec import Speculator
from specdec.drafters import Budget, Drafter, Session
from specdec.planner import factory
from specdec.planner.costs import Costs
from specdec.planner.measuring_planner import MeasuringPlanner
from specdec.verify import DraftTree, Topology
from specdec.verify.purity import callers_code


@pytest.fixture(name="measured", autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return measured_quickly(monkeypatch)


@pytest.mark.parametrize("where", ["target", "draft", "inside", "patched", "everywhere"])
def test_models_that_carry_code_of_the_callers_are_not_measured(where: str, measured: list[int]) -> None:
    target, draft = tiny_llama(0), noisy_copy(TARGET, 1)
    shapes: set[int] = set()

    def hook(module: Any, arguments: Any, output: Any = None) -> None:
        shapes.update({5} if not arguments else {len(one) for one in arguments if isinstance(one, Tensor)})

    if where == "target":
        target.register_forward_hook(hook)
    elif where == "draft":
        draft.model.register_forward_pre_hook(hook)
    elif where == "inside":
        target.model.layers[0].mlp.register_forward_hook(hook)
    elif where == "patched":
        own = draft.forward
        draft.forward = functools.wraps(own)(lambda *a, **k: own(*a, **k))
    handle = torch.nn.modules.module.register_module_forward_hook(hook) if where == "everywhere" else None
    try:
        spec = Speculator(target, draft)
        out: Any = spec.generate(**batch(5), **GREEDY)
    finally:
        if handle is not None:
            handle.remove()
    assert torch.equal(out, plain(5))
    assert measured == []
    assert shapes <= {1, 2, 3, 4, 5}
    assert spec.report is not None
    assert any("would run in passes that the call does not make" in note for note in spec.report.notes)


def test_hooks_and_forwards_of_the_libraries_are_not_the_callers() -> None:
    model = tiny_llama(0)
    assert callers_code(model) is None
    model.model.layers[0].register_forward_hook(torch.nn.Module.forward)
    model.lm_head.forward = torch.nn.Linear.forward.__get__(model.lm_head)
    assert callers_code(model) is None
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert callers_code(model) == "a forward hook on module 'model.layers.0.mlp'"


FAULTS: dict[str, Callable[..., Any]] = {
    "any error": lambda *_, **__: (_ for _ in ()).throw(LookupError("nobody expected this")),
    "no words": lambda *_, **__: (_ for _ in ()).throw(AssertionError()),
}


@pytest.mark.parametrize("name", FAULTS)
def test_whatever_fails_while_measuring_the_call_goes_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "measure", FAULTS[name])
    spec = Speculator(TARGET, [DRAFT, "ngram"])
    out: Any = spec.generate(**batch(5), **GREEDY)
    assert torch.equal(out, plain(5))
    assert spec.report is not None
    said = {"any error": "nobody expected this", "no words": "AssertionError"}[name]
    assert [note for note in spec.report.notes if said in note and "not planned" in note]
    assert spec.report.num_draft_tokens > 0


def test_an_interrupt_while_measuring_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Costs:
        raise KeyboardInterrupt

    monkeypatch.setattr(factory, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Speculator(TARGET, DRAFT).generate(**batch(1), **GREEDY)


class Broken(Drafter):
    """Cannot even be cloned."""

    name, max_depth, max_nodes = "broken", 2, 2

    def start(self, session: Session) -> None:
        self._session = session

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        roots = self._session.rows.roots()
        return DraftTree.build(Topology.chain(1), torch.stack([roots, roots], 1))

    def clone(self) -> Drafter:
        raise TypeError("there is one of me")


def test_a_drafter_that_cannot_be_cloned_drafts_all_the_same() -> None:
    spec = Speculator(TARGET, Broken(), k="auto")
    out: Any = spec.generate(**batch(2), **GREEDY)
    assert torch.equal(out, plain(2))
    assert spec.report is not None
    assert [note for note in spec.report.notes if "there is one of me" in note]
    assert spec.report.num_draft_tokens > 0


def test_a_clock_that_stands_still_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    init = MeasuringPlanner.__init__

    def still(
        self: MeasuringPlanner, options: Any, rows: int, seconds: float, clock: Any, room: int | None = None
    ) -> None:
        init(self, options, rows, seconds, lambda: 1.0, room)

    monkeypatch.setattr(MeasuringPlanner, "__init__", still)
    spec = Speculator(TARGET, "ngram")
    spec.generate(**batch(1), **GREEDY)
    assert spec.report is not None
    assert [note for note in spec.report.notes if "too coarse" in note]


def test_scratch_texts_stay_within_the_positions_of_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model cut off in the middle of measuring would look as if its drafts cost nothing."""
    lengths: list[int] = []
    budget = MeasuringPlanner.budget

    def watched(self: MeasuringPlanner, live: Any, left: Any, held: Any = ()) -> Any:
        plan = budget(self, live, left, held)
        lengths.append(max(held) + plan.max_depth)
        return plan

    monkeypatch.setattr(MeasuringPlanner, "budget", watched)
    target: Any = models.target("gpt2")
    ids, mask = models.prompts((5,), models.VOCAB, 1)
    for draft, positions in ((with_fewer_positions(models.draft("near", "gpt2"), 100), 100), (SAME, 24)):
        lengths.clear()
        spec = Speculator(target, draft)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            spec.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=4, pad_token_id=0)
        assert 0 < max(lengths) <= positions
        assert spec.report is not None
        assert (spec.report.plan is None) == any("grew too long" in note for note in spec.report.notes)
