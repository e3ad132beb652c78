"""What the decode loop asks of a planner: how much every step drafts, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specdec.drafters import Budget
from specdec.trace import StepTrace


class Planner(Protocol):
    """Before every step `budget`, after it `learn`.

    What `budget` returns may depend on everything that happened before the step, never on a token drawn in it.
    """

    def budget(self, live: Sequence[int], left: Sequence[int | None], lengths: Sequence[int] = ()) -> Budget:
        """What the next trees may be.

        Args:
            live: batch index of every live row. left: tokens each may still emit, None without a limit.
            lengths: tokens each holds; only drafters that cannot read any number of them ask for it.
        """

    def learn(self, trace: StepTrace, reached: Sequence[int]) -> None:
        """The step's outcome.

        Args:
            trace: the step. reached: per row of it, levels of its tree that a decision was taken at.
        """
