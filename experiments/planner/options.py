"""What a run about the planner can be told, and the workloads meant to make drafting look bad. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from specdec.experiments.frame import RunOptions, argument, option

SWEEP, NEVER_SLOWER = "sweep", "never-slower"


class Workload(NamedTuple):
    """One adversarial workload: what its prompts are, how long the texts get, and what drafts."""

    name: str
    prompts: str
    tokens: int
    draft: str


WORKLOADS = (
    Workload("random prompts, model", "random", 96, "model"),
    Workload("random prompts, both", "random", 96, "both"),
    Workload("untrained drafter", "held-out", 96, "junk"),
    Workload("long outputs, untrained drafter", "held-out", 256, "junk"),
    Workload("long outputs, ngram", "held-out", 256, "ngram"),
    Workload("long outputs, both", "held-out", 256, "both"),
)


@dataclass(frozen=True, kw_only=True)
class PlannerOptions(RunOptions):
    """One run about the planner."""

    what: Annotated[str, argument("sweep or never-slower.")]
    prompts: Annotated[int, option("Batches of prompts.")] = 8
    repeats: Annotated[int, option("Times each way meets each prompt; the median counts.")] = 1
    processes: Annotated[
        int,
        option("Do all of it so many times, each in a process of its own: where memory lies decides on a few percent."),
    ] = 1
    prompt_tokens: Annotated[int, option("Tokens of each prompt.")] = 128
    tokens: Annotated[int, option("New tokens per row (sweep).")] = 128
    temperatures: Annotated[tuple[float, ...], option("0 is greedy.")] = (0.0, 1.0)
    batches: Annotated[tuple[int, ...], option("Prompts per call.")] = (1, 4, 8)
    rule: Annotated[
        str,
        option("Of a sampling sweep; with coupled every way writes the same text, so few prompts tell settings apart."),
    ] = "auto"
    workloads: Annotated[tuple[str, ...], option("Of never-slower.")] = tuple(one.name for one in WORKLOADS)
    no_hf: Annotated[bool, option("never-slower: against no drafter only, which is the closer race.", "--no-hf")] = (
        False
    )
    seeded: Annotated[bool, option("Planned calls get seed=: each row is planned by itself.", "--seeded")] = False

    def __post_init__(self) -> None:
        self.one_of((SWEEP, NEVER_SLOWER), "what")
        self.at_least(1, "prompts", "repeats", "processes", "prompt_tokens", "tokens", "threads")
