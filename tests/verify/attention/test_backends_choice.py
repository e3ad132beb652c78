"""The choice between attention backends is measured; wrong or failing ones are never chosen; the user may decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import AttentionCase, clean, states
from torch import Tensor

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.attention.choose import VARIABLE, AttentionChoice, Backend
from specdec.verify.attention.fold import fold_attention
from specdec.verify.attention.plan import TreePlan

Case = AttentionCase
F64 = torch.float64


class TestTheChoice:
    """On a CPU with stand-ins for backends and clock."""

    def given(self, **fields: Any) -> tuple[Tensor, Tensor, Tensor, TreePlan, float]:
        given = clean(states(Case((20, 9), 3, **fields)))
        return given.query, given.key, given.value, given.plan, given.scale

    def choice(
        self, seconds: dict[str, float], **backends: Callable[..., Tensor]
    ) -> tuple[AttentionChoice, list[str]]:  # fmt: skip
        calls: list[str] = []
        table: dict[str, Backend] = {}
        current: list[str] = []

        def named(name: str, attend: Callable[..., Tensor]) -> Backend:
            def run(*args: Any) -> Tensor:
                calls.append(name)
                current[:] = [name]
                return attend(*args)

            return Backend(lambda *_: None, run)

        def clock(call: Callable[[], Tensor]) -> float:
            call()
            return seconds[current[0]]

        for name in seconds:
            table[name] = named(name, backends.get(name, fold_attention))
        return AttentionChoice(table, tuple(seconds), clock), calls

    def test_the_fastest_wins_and_is_remembered(self) -> None:
        choice, calls = self.choice({"fold": 3.0, "a": 1.0, "b": 2.0})
        args = self.given()
        choice(*args)
        assert list(choice.chosen.values()) == ["a"]
        calls.clear()
        choice(*args)
        assert calls == ["a"]

    def test_other_shapes_are_measured_again(self) -> None:
        choice, _ = self.choice({"fold": 3.0, "a": 1.0})
        choice(*self.given())
        choice(*self.given(dtype=torch.bfloat16))
        choice(*self.given(heads=8))
        assert len(choice.chosen) == 3

    def test_a_wrong_result_is_not_used_however_fast(self) -> None:
        choice, _ = self.choice({"fold": 3.0, "a": 1.0}, a=lambda *args: fold_attention(*args) * 1.001)
        with pytest.warns(RuntimeWarning, match="backend 'a' is off by 1.0e-03"):
            choice(*self.given())
        assert list(choice.chosen.values()) == ["fold"]

    def test_a_failing_candidate_is_not_used(self) -> None:
        def broken(*args: Any) -> Tensor:
            raise RuntimeError("no kernel image")

        choice, _ = self.choice({"fold": 3.0, "a": 1.0}, a=broken)
        with pytest.warns(RuntimeWarning, match="backend 'a' failed and is not used: no kernel image"):
            out = choice(*self.given())
        assert torch.equal(out, fold_attention(*self.given()))

    def test_nothing_is_measured_where_only_one_can_serve(self) -> None:
        choice = AttentionChoice(clock=lambda call: pytest.fail("measured"))
        assert choice.name(*self.given(dtype=F64)) == "fold"

    def test_the_environment_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        choice = AttentionChoice()
        monkeypatch.setenv(VARIABLE, "split")
        assert choice.name(*self.given()) == "split"

    def test_an_unknown_name_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "flsh")
        with pytest.raises(UnsupportedArgumentError, match="names no attention backend; use one of auto, fold, split"):
            AttentionChoice()(*self.given())

    @pytest.mark.parametrize("name", ["flash", "triton", "flash_attn"])
    def test_a_name_that_cannot_serve_is_refused_with_its_reason(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(VARIABLE, name)
        with pytest.raises(UnsupportedArgumentError, match=rf"{VARIABLE}={name}: .+; use another backend"):
            AttentionChoice()(*self.given(dtype=F64))

    def test_a_window_nobody_can_see_the_end_of_is_no_window(self) -> None:
        asked: list[int | None] = []

        def record(*args: Any) -> Tensor:
            asked.append(args[5])
            return fold_attention(*args)

        choice = AttentionChoice({"fold": Backend(lambda *_: None, record)}, ("fold",))
        choice(*self.given(), window=23)
        choice(*self.given(), window=22)
        assert asked == [None, 22]
