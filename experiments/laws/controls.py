"""Negative controls: the very judgement that passes the library must refuse each planted bug."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from specdec.drafters import Drafter, growth
from specdec.experiments.laws import bugs
from specdec.experiments.laws import false_drafters as false
from specdec.experiments.laws.judge import Counts
from specdec.experiments.laws.texts import write
from specdec.experiments.laws.world import chain, grown, target
from specdec.speculator import Speculator
from specdec.verify.rules import RULES

Plant = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Control:
    """One planted bug. plant: makes it while its context is open. seen_by: the test that must refuse it."""

    name: str
    rule: str
    drafter: Callable[[], Drafter] = chain
    plant: Plant = nullcontext
    seen_by: str = "joint"
    monitor: bool = False

    def run(self, samples: int, chunk: int) -> dict[str, Any]:
        """Draw until the bug is seen, at most `samples` texts (of the unfiltered setting)."""
        counts = Counts()
        with self.plant():
            spec = Speculator(
                target(), self.drafter(), rule=self.rule, monitor=bugs.Positions() if self.monitor else False
            )
            while counts.samples < samples:
                counts.add(write(spec, 0, counts.samples, min(chunk, samples - counts.samples)))
                found = counts.judge()
                if not found[self.seen_by]["passed"]:
                    break
        return {"control": self.name, "rule": self.rule, "seen_by": self.seen_by,
                "caught": not found[self.seen_by]["passed"], **found}  # fmt: skip


def _rule(kind: Any) -> Plant:
    return lambda: patch.dict(RULES, {kind.name: kind})


def _noise(kind: Any, name: str = "NoiseStream") -> Plant:
    return lambda: patch(f"specdec.batch.{name}", kind)


def _teller(kind: type[false.Mangling], temperature: float = 0.7) -> Callable[[], Drafter]:
    return lambda: chain(kind, temperature)


def _siblings(kind: type[false.Mangling]) -> Callable[[], Drafter]:
    return lambda: grown((2,), "sampled", kind)


PATHS = [[0], [1], [0, 0]]


def controls() -> Iterator[Control]:
    yield Control("accepts always", "rejection", plant=_rule(bugs.AcceptsAlways))
    yield Control("residual dropped", "rejection", plant=_rule(bugs.DropsResidual))
    yield Control("block stopped at the first reject", "block", plant=_rule(bugs.StopsAtFirstReject))
    yield Control(
        "residual of token-wise rejection in block", "block", lambda: chain(k=2, noise=1.0),
        _rule(bugs.TokenwiseResidualInBlock),
    )  # fmt: skip
    yield Control("one coin for all nodes", "naive", lambda: grown((2, 2), "top"), _rule(bugs.OneCoin))
    yield Control(
        "realised instead of nominal mass", "budget_flow", lambda: grown(PATHS, "mixed"), _rule(bugs.RealisedMass)
    )
    for rule in ("rejection", "block"):
        yield Control("accept reuses draft noise", rule, plant=_noise(bugs.AcceptReusesDraftNoise))
        yield Control("noise shared by steps", rule, plant=_noise(bugs.FrozenStep), seen_by="step 2")
    yield Control("recovery reuses draft noise", "rejection", plant=_noise(bugs.ResidualReusesDraftNoise))
    yield Control("recovery reuses accept noise", "rejection", plant=_noise(bugs.ResidualReusesAcceptNoise))
    yield Control(
        "block's coins keyed by absolute position", "block", plant=_noise(bugs.AcceptKeyedByPosition),
        seen_by="step 2", monitor=True,
    )  # fmt: skip
    yield Control("race without position", "coupled", plant=_noise(bugs.RaceWithoutPosition, "RaceStream"))
    for rule in ("rejection", "block"):
        yield Control("raw q instead of sampled q", rule, _teller(false.TellsRawLaw, 0.5))
        yield Control("q row of another position", rule, _teller(false.TellsRowOfNextPosition))
        yield Control("q row of another request", rule, _teller(false.TellsRowOfAnotherRequest))
        yield Control("unlikely draft token dropped", rule, _teller(false.DropsUnlikelyTokens))
    for rule in ("traversal", "recursive_rejection"):
        yield Control("sampled siblings reranked", rule, _siblings(false.RanksSiblingsByValue))
        yield Control("sampled sibling pruned", rule, _siblings(false.PrunesUnlikelyNodes))
        yield Control("q not renormalised without replacement", rule, _siblings(false.ForgetsToRenormalise))
    for rule in ("traversal", "budget_flow"):
        yield Control(
            "raw q instead of q off the top", rule, lambda: grown((2, 2), "mixed"),
            lambda: patch.object(growth, "mixed_children", false.raw_mixed_children),
        )  # fmt: skip
