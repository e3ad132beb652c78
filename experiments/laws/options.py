"""How much is drawn, and which pairs of rule and drafter are judged. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

from specdec.experiments.frame import RunOptions, option


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is drawn. Nothing that was drawn decides when to stop.

    batches: small batch sizes. Each draws at least `small_samples` texts, and more while `small_seconds` last.
    small_limit: seconds after which a small batch size ends early.
    """

    samples: Annotated[int, option("Texts of each pair in wide batches.")] = 216_000
    seconds: Annotated[float, option("At most, of each wide cell.")] = 90.0
    chunk: Annotated[int, option("Rows of a wide batch.")] = 4000
    batches: tuple[int, ...] = (1, 3, 17)
    small_samples: Annotated[int, option("Texts at least of each small batch size.")] = 700
    small_seconds: Annotated[float, option("Of each small batch size.")] = 3.0
    small_limit: float = math.inf
    control_samples: Annotated[int, option("Texts in which a planted bug must be seen; 0: no planted bugs.")] = 100_000

    def within(self, seconds: float) -> Budget:
        """What one pair can have in so many seconds, most of it in wide batches."""
        small = max(0.0, 0.3 * seconds / max(1, len(self.batches)))
        return replace(
            self, seconds=min(self.seconds, 0.7 * seconds), small_seconds=min(self.small_seconds, small),
            small_limit=small,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LawsOptions(Budget, RunOptions):
    """One run."""

    minutes: Annotated[
        float | None, option("Of the whole run: pairs a rule is not made for get fewer samples (default: all).")
    ] = None
    only: Annotated[str | None, option("home (pairs a rule is made for: world.HOME) or others.")] = None
    rules: Annotated[tuple[str, ...], option("Only these.")] = ()
    drafters: Annotated[tuple[str, ...], option("Only these.")] = ()

    def __post_init__(self) -> None:
        self.one_of(("home", "others"), "only")
