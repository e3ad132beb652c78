"""`specdec accept score`: every rule, k and tree on the logged texts of a run, without running a model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from specdec.experiments.accept.counterfactual import reach_law, refusal
from specdec.experiments.accept.lookup import lookup_law
from specdec.experiments.accept.metrics import Runs
from specdec.experiments.accept.options import ScoreOptions
from specdec.experiments.accept.setting import Cell, Setting
from specdec.experiments.accept.show import text
from specdec.experiments.accept.steps import expected_steps
from specdec.experiments.accept.store import ResultsError, Store
from specdec.experiments.accept.summary import Summary
from specdec.experiments.display import console
from specdec.experiments.intervals import Mean, ratio, ratio_difference
from specdec.provenance import placeless

DEFAULT_SCORED = (
    *(f"model:k={k}" for k in (1, 2, 3, 4, 5, 6, 8)),
    *(f"model:tree={tree}:children={mode}" for tree in ("2,1,1,1,1,1", "3,2,1", "2,2,1") for mode in
      ("mixed", "sampled", "top")),
    *(f"ngram:k={k}" for k in (3, 6, 10)),
)  # fmt: skip


@dataclass(frozen=True)
class Score:
    """Expected figures of one setting, rule and temperature on the logged texts (see CellStats for the terms).

    tokens, steps: of each prompt's text, by prompt.
    """

    setting: Setting
    rule: str
    temperature: float
    tokens: dict[str, int]
    steps: dict[str, float]
    per_position: list[float]

    @property
    def cell(self) -> Cell:
        return Cell(self.setting, self.rule, self.temperature)

    @property
    def tokens_per_step(self) -> Mean:
        return ratio(list(self.tokens.values()), list(self.steps.values()))

    def to_dict(self) -> dict[str, Any]:
        return {"setting": str(self.setting), "rule": self.rule, "temperature": self.temperature,
                "num_texts": len(self.tokens), "tokens_per_step": self.tokens_per_step.to_dict(),
                "per_position": [None if math.isnan(rate) else rate for rate in self.per_position]}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """A score beside what the run's own calls measured on the same prompts; measured less expected, if any were."""

    score: Score
    measured: Mean | None
    difference: Mean | None

    @staticmethod
    def of(score: Score, runs: Runs) -> Comparison:
        """First turns only: later ones go on from other answers than the logged text."""
        found = {entry["prompt"]: entry["turns"][0] for entry in runs.of(score.cell) if entry["prompt"] in score.tokens}
        if not found:
            return Comparison(score, None, None)
        tokens, steps = ([len(turn[name]) for turn in found.values()] for name in ("token_ids", "accepted"))
        expected = tuple([part[prompt] for prompt in found] for part in (score.tokens, score.steps))
        return Comparison(score, ratio(tokens, steps), ratio_difference((tokens, steps), (expected[0], expected[1])))

    def to_dict(self) -> dict[str, Any]:
        means = {"measured": self.measured, "difference": self.difference}
        return {**self.score.to_dict(), **{name: mean and mean.to_dict() for name, mean in means.items()}}


class Logs:
    """The logged texts of a folder, by temperature."""

    def __init__(self, store: Store):
        asked = store.asked()
        self.limit = int(asked.get("new_tokens", 0))
        self.seed = int(asked.get("seed", 0))
        self.texts: dict[float, dict[str, Summary]] = {}
        for entry in store.entries("log"):
            summary = Summary.read(store.folder / "logs" / str(entry["file"]))
            self.texts.setdefault(float(entry["temperature"]), {})[entry["prompt"]] = summary

    def score(self, setting: Setting, rule: str, temperature: float) -> Score:
        """Raises ExperimentError: a setting or rule that cannot be scored."""
        texts = self.texts[temperature]
        found = {}
        for number, (prompt, summary) in enumerate(texts.items()):
            if setting.kind == "ngram":
                reach = lookup_law(summary, setting)
            else:
                reach = reach_law(summary, setting, rule, temperature, self.seed + number)
            found[prompt] = expected_steps(reach, self.limit)
        kept, reached = (np.sum([getattr(one, name) for one in found.values()], 0) for name in ("kept", "reached"))
        return Score(
            setting, rule, temperature, {prompt: one.tokens for prompt, one in found.items()},
            {prompt: one.steps for prompt, one in found.items()},
            [float(k / r) if r > 0 else math.nan for k, r in zip(kept, reached, strict=True)],
        )  # fmt: skip

    def scores(self, settings: Sequence[Setting], rules: Sequence[str] = ()) -> list[Score]:
        """All that can be scored; rules: only these (greedy texts have one rule whatever is asked)."""
        return [
            self.score(setting, rule, temperature)
            for temperature in self.texts
            for setting in settings
            if setting.kind == "ngram" or refusal(setting) is None
            for rule in setting.rules(temperature)
            if not rules or rule in rules or temperature == 0
        ]


def score_folder(options: ScoreOptions) -> None:
    """Print the scores of a run's logged texts, beside what its own runs measured.

    Raises:
        ExperimentError: no such run, no logs in it, damaged files, an unknown setting.
    """
    store = Store(options.folder)
    logs = Logs(store)
    if not logs.texts:
        raise ResultsError(
            f"{options.folder.name}: no logged texts; run `specdec accept` with --log on a pair with a draft model"
        )
    runs = Runs.read(store)
    wanted = [Setting.parse(text) for text in options.settings or DEFAULT_SCORED]
    unable = {str(setting): why for setting in wanted
              if setting.kind != "ngram" and (why := refusal(setting)) is not None}  # fmt: skip
    able = [setting for setting in wanted if str(setting) not in unable]
    found = [Comparison.of(score, runs) for score in logs.scores(able, options.rules)]
    table = Table(title="Counterfactual: expected on the logged texts, no model run", title_justify="left")
    for name in ("setting", "rule", "T", "tokens/step", "measured", "difference", "by position"):
        table.add_column(name, no_wrap=name != "setting", overflow="fold")
    for one in found:
        score, difference = one.score, one.difference
        table.add_row(
            str(score.setting), score.rule, f"{score.temperature:g}", score.tokens_per_step.text(),
            "" if one.measured is None else one.measured.text(),
            "" if difference is None else difference.text("+") + " *" * difference.excludes_zero,
            " ".join(text(rate).removeprefix("0") for rate in score.per_position[:8]),
        )  # fmt: skip
    page = console(140)
    page.print(table)
    differences = [one.difference for one in found if one.difference is not None]
    page.print("±: 95 % interval over prompts (Student's law)")
    if differences:
        page.print(
            f"*: {sum(one.excludes_zero for one in differences)} of {len(differences)} measured figures differ by more "
            "than the interval of their difference, where\nprompts are paired; 1 in 20 would by chance, and several "
            "together rather than one by one: all rows of a temperature share the logged texts"
        )
    for name, why in unable.items():
        page.print(f"not scored: {name}: {why}")
    if options.json is not None:
        result = {"options": placeless(store.asked()), "provenance": runs.sources,
                  "scores": [one.to_dict() for one in found]}  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
