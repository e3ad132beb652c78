"""From runs to figures: definitions in one place, those of Spec-Bench beside our own.

Terms. A *step* is one pass of the target; it emits its accepted tokens and one more. Counts are pooled over all steps
of a cell ("micro"): a mean of per-prompt means would weigh a short answer like a long one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Any, NamedTuple

import numpy as np

from specdec.experiments.accept.setting import PLAIN, Cell
from specdec.experiments.accept.store import Store
from specdec.experiments.intervals import Mean, Spread, ratio

Entry = dict[str, Any]


@dataclass(frozen=True)
class CellStats:
    """One cell's figures.

    tokens_per_step: emitted tokens per pass of the target. mean_acceptance_length: 1 + accepted tokens per step that
    could draft (the recovered or bonus token counts). acceptance_rate: accepted / drafted tokens. per_position: of
    the steps that reached a depth with a proposal there, how many kept it. alpha: how often a draft's first level was
    kept; alpha_star: the mean over the roots it is known for of the best any rule could do, alpha_there: alpha over
    the same `num_roots` roots. tokens_per_second: total tokens / total seconds, prompts included. speedup: against
    plain decoding of the same prompt: median and quartiles over prompts. ms: draft, verify, rest, per step;
    ms_prefill: per turn.
    """

    cell: Cell
    num_prompts: int
    num_tokens: int
    num_steps: int
    tokens_per_step: Mean
    mean_acceptance_length: float
    acceptance_rate: float
    per_position: list[float]
    reached: list[int]
    alpha: float
    alpha_star: float
    alpha_there: float
    num_roots: int
    tokens_per_second: float
    speedup: Spread | None
    ms: tuple[float, float, float]
    ms_prefill: float
    drafted_per_step: float

    def to_dict(self) -> dict[str, Any]:
        out = {**self.__dict__, "cell": str(self.cell), "tokens_per_step": self.tokens_per_step.to_dict()}
        return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in out.items()}


@dataclass(frozen=True)
class Runs:
    """All finished runs of a folder."""

    entries: list[Entry]
    options: dict[str, Any]
    sources: list[dict[str, Any]]

    @staticmethod
    def read(store: Store) -> Runs:
        """Raises ResultsError: see Store."""
        return Runs(list(store.entries("run")), store.asked(), list(store.entries("provenance")))

    def cells(self) -> list[Cell]:
        """Those that were run, in the order in which they were asked for, however many processes wrote them."""
        found = [Cell.parse(key) for key in dict.fromkeys(entry["cell"] for entry in self.entries)]
        settings = [str(PLAIN), *self.options.get("settings", ())]
        temperatures = list(self.options.get("temperatures", ()))

        def place(cell: Cell) -> tuple[int, int, int]:
            rules = cell.setting.rules(cell.temperature)
            return (
                temperatures.index(cell.temperature) if cell.temperature in temperatures else len(temperatures),
                settings.index(str(cell.setting)) if str(cell.setting) in settings else len(settings),
                rules.index(cell.rule) if cell.rule in rules else len(rules),
            )

        return sorted(found, key=place)

    def of(self, cell: Cell) -> list[Entry]:
        key = str(cell)
        return [entry for entry in self.entries if entry["cell"] == key]

    def stats(self, cell: Cell, keep: Callable[[Entry], bool] = lambda entry: True) -> CellStats | None:
        """The figures of a cell over the prompts to `keep`; None without any."""
        entries = [entry for entry in self.of(cell) if keep(entry)]
        if not entries:
            return None
        turns = [turn for entry in entries for turn in entry["turns"]]
        steps = sum(len(turn["accepted"]) for turn in turns)
        tokens = sum(len(turn["token_ids"]) for turn in turns)
        drafting = sum(1 for turn in turns for count in turn["drafted"] if count)
        accepted, drafted = (sum(sum(turn[name]) for turn in turns) for name in ("accepted", "drafted"))
        kept, reached = (_added(turn[name] for turn in turns) for name in ("kept_per_position", "reached_per_position"))
        watched = {name: sum(turn["watch"][name] for turn in turns) for name in ("star", "scanned", "scanned_first")}
        first = sum(1 for turn in turns for d, a in zip(turn["drafted"], turn["accepted"], strict=True) if d and a)
        seconds = sum(turn["seconds"] for turn in turns)
        ms = tuple(sum(turn[name] for turn in turns) / max(1, steps) for name in ("ms_draft", "ms_verify", "ms_rest"))
        return CellStats(
            cell=cell, num_prompts=len(entries), num_tokens=tokens, num_steps=steps,
            tokens_per_step=ratio([_tokens(e) for e in entries], [_steps(e) for e in entries]),
            mean_acceptance_length=1 + accepted / drafting if drafting else 1.0,
            acceptance_rate=_share(accepted, drafted), drafted_per_step=_share(drafted, drafting),
            per_position=[_share(k, r) for k, r in zip(kept, reached, strict=False)], reached=reached,
            alpha=_share(first, drafting), alpha_star=_share(watched["star"], watched["scanned"]),
            alpha_there=_share(watched["scanned_first"], watched["scanned"]), num_roots=watched["scanned"],
            tokens_per_second=_share(tokens, seconds),
            speedup=None if cell.is_plain else self._speedup(cell, entries),
            ms=(ms[0], ms[1], ms[2]), ms_prefill=sum(turn["ms_prefill"] for turn in turns) / len(turns),
        )  # fmt: skip

    def plain(self, temperature: float) -> Cell:
        return Cell(PLAIN, PLAIN.rules(temperature)[0], temperature)

    def _speedup(self, cell: Cell, entries: list[Entry]) -> Spread | None:
        plain = {entry["prompt"]: _speed(entry) for entry in self.of(self.plain(cell.temperature))}
        ratios = [_speed(entry) / plain[entry["prompt"]] for entry in entries if plain.get(entry["prompt"])]
        return Spread.of(ratios) if ratios else None

    def by_output_position(self, cell: Cell, width: int = 16) -> list[tuple[int, Mean, int]]:
        """(first output position of a bin, emitted tokens per step that began in it, number of steps)."""
        bins: dict[int, dict[str, list[int]]] = {}
        for entry in self.of(cell):
            for turn in entry["turns"]:
                emitted = [accepted + 1 for accepted in turn["accepted"]]
                for at, count in zip(accumulate([0, *emitted]), emitted, strict=False):
                    bins.setdefault(at // width, {}).setdefault(entry["prompt"], []).append(count)
        found = []
        for number, prompts in sorted(bins.items()):
            steps = [len(counts) for counts in prompts.values()]
            found.append((number * width, ratio([sum(counts) for counts in prompts.values()], steps), sum(steps)))
        return found

    def domains(self) -> list[str]:
        return list(dict.fromkeys(entry["domain"] for entry in self.entries))


class SpecBench(NamedTuple):
    """Figures as Spec-Bench's `evaluation/speed.py` defines them.

    mean_accepted_tokens: mean over all steps of accepted tokens *plus one*. tokens_per_second: mean over questions of
    a question's tokens / its seconds, turns added up. speedup: the ratio of two such means, not a mean of ratios.
    One thing is not copied: the original counts the baseline's tokens by tokenising its text again, which differs from
    what was generated; here both sides count generated tokens.
    """

    mean_accepted_tokens: float
    tokens_per_second: float
    baseline: float
    speedup: float

    def __str__(self) -> str:
        return f"{self.mean_accepted_tokens:.2f} / {self.speedup:.2f}x"


def spec_bench(runs: Runs, cell: Cell, domain: str | None = None) -> SpecBench:
    """The figures of a cell for one task, or overall."""

    plain = runs.plain(cell.temperature)
    ours, base = ([one for one in runs.of(of) if domain in (None, one["domain"])] for of in (cell, plain))
    lengths = [count + 1 for entry in ours for turn in entry["turns"] for count in turn["accepted"]]
    figures = (lengths, list(map(_speed, ours)), list(map(_speed, base)))
    length, speed, baseline = (float(np.mean(found)) if found else math.nan for found in figures)
    return SpecBench(length, speed, baseline, speed / baseline)


def _speed(entry: Entry) -> float:
    return _share(_tokens(entry), sum(turn["seconds"] for turn in entry["turns"]))


def _tokens(entry: Entry) -> int:
    return sum(len(turn["token_ids"]) for turn in entry["turns"])


def _steps(entry: Entry) -> int:
    return sum(len(turn["accepted"]) for turn in entry["turns"])


def _added(lists: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip_longest(*lists, fillvalue=0)]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
