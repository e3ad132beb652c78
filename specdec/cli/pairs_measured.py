"""What a measured acceptance would give elsewhere: the steps of a `specdec accept` run at an estimate's costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specdec.pairing.errors import PairError
from specdec.pairing.roofline import Setting, step_cost
from specdec.pairing.schema import Pair


@dataclass(frozen=True)
class MeasuredGain:
    """One cell of a run.

    drafting: share of the steps that had a draft, for n-grams their hit rate. tokens_per_pass: over all steps.
    speedup: tokens_per_pass over what a step costs on average, in plain tokens.
    """

    drafter: str
    rule: str
    temperature: float
    drafting: float
    tokens_per_pass: float
    speedup: float


def measured_gains(folder: Path, pair: Pair, setting: Setting) -> list[MeasuredGain]:
    """Of every cell that drafted as the pair does (its model, or n-grams).

    Raises:
        PairError: no run in the folder, a damaged one, or none whose cells draft like that.
    """
    from specdec.experiments.accept.metrics import Runs
    from specdec.experiments.accept.store import Store
    from specdec.shown_errors import ExperimentError

    try:
        runs = Runs.read(Store(folder))
    except ExperimentError as error:
        raise PairError(f"--measured: {error}") from None
    found = []
    for cell in runs.cells():
        if cell.is_plain or (cell.setting.kind == "ngram") != (pair.draft.kind == "ngram"):
            continue
        turns = [turn for entry in runs.of(cell) for turn in entry["turns"]]
        drafted = [count for turn in turns for count in turn["drafted"]]
        costs = [step_cost(pair, setting, nodes, min(cell.setting.num_levels, nodes)) for nodes in drafted]
        tokens = sum(len(turn["token_ids"]) for turn in turns)
        hits = sum(1 for count in drafted if count)
        found.append(
            MeasuredGain(
                str(cell.setting), cell.rule, cell.temperature, hits / len(drafted), tokens / len(drafted),
                tokens / sum(costs),
            )
        )  # fmt: skip
    if not found:
        wanted = "ngram" if pair.draft.kind == "ngram" else "model"
        raise PairError(f"--measured: expected a run with settings of kind {wanted}, found none in {folder.name}")
    return found


def measured_table(gains: list[MeasuredGain]) -> list[dict[str, Any]]:
    """Ready for JSON."""
    return [asdict(gain) for gain in gains]


def measured_lines(gains: list[MeasuredGain], folder: Path) -> list[str]:
    """For people."""
    width = max(len(gain.drafter) for gain in gains)
    lines = [
        "",
        f"acceptance as measured by `specdec accept` in {folder.name}, at the costs above:",
        f"{'drafter':<{width}}  rule                 T  steps with drafts  tokens per pass  speed-up",
    ]
    for gain in gains:
        lines.append(
            f"{gain.drafter:<{width}}  {gain.rule:<19}  {gain.temperature:<3g} {gain.drafting:15.0%}  "
            f"{gain.tokens_per_pass:15.2f}  {gain.speedup:7.2f}x"
        )
    return lines
