"""What a report shows, in order: which cells go into which plot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from specdec.experiments.accept.metrics import CellStats, Runs
from specdec.experiments.accept.report import figures
from specdec.experiments.accept.report.figures import Curve
from specdec.experiments.accept.scores import Logs
from specdec.experiments.accept.setting import Setting

LARGEST_K = 8
"""Drawn at least that far."""


@dataclass(frozen=True)
class Panel:
    """One picture. draw: onto a matplotlib (sub)figure; height: in inches at the usual width."""

    title: str
    note: str
    height: float
    draw: Callable[[Any], None]


def panels(runs: Runs, logs: Logs) -> list[Panel]:
    """Those for which there is data."""
    every = [stats for cell in runs.cells() if not cell.is_plain and (stats := runs.stats(cell)) is not None]
    temperatures = list(dict.fromkeys(stats.cell.temperature for stats in every))
    first = {t: _first_rules(every, t) for t in temperatures}
    found = []

    def side_by_side(draw: Callable[[Any, float], None]) -> Callable[[Any], None]:
        def onto(figure: Any) -> None:
            for axes, temperature in zip(np.ravel(figure.subplots(1, len(temperatures))), temperatures, strict=True):
                draw(axes, temperature)

        return onto

    if every:
        found.append(Panel(
            "Acceptance by position", "Of the steps that reached a depth with a proposal there, how many kept it. Each "
            "setting with its usual rule.", 3.6,
            side_by_side(lambda axes, t: figures.by_position(axes, first[t], f"T = {t:g}")),
        ))  # fmt: skip
    curves = [made for t in temperatures if (made := _curve(runs, logs, every, t)) is not None]
    if curves:
        found.append(Panel(
            "Speed-up by k", "Lines: tokens per step (from the logged texts where there are any) times plain step time "
            "over step time, which is taken to grow linearly with k.", 3.9,
            lambda figure: figures.speed_by_k(figure.subplots(), curves),
        ))  # fmt: skip
    if every:
        found.append(Panel(
            "What a step costs and gives", "Up and left is better; grey lines are equal speeds, the dotted line joins "
            "the settings that no other beats on both axes, whiskers are 95 % intervals over prompts. Prompts are left "
            "out of these times.",
            3.9 * len(temperatures),
            lambda figure: _stacked(figure, temperatures, every),
        ))  # fmt: skip
    trees = _trees(runs, every)
    if trees:
        found.append(Panel("Where in the tree the kept tokens lie", "Per cent of steps whose kept path holds the node.",
                           4.2, lambda figure: _draw_trees(figure, trees)))  # fmt: skip
    bars = [stats for stats in every if stats.alpha_star == stats.alpha_star]
    if bars:
        found.append(Panel(
            "Acceptance against the optimum", "alpha*: the most any lossless rule could keep of the first level, for "
            "the law those tokens were drafted from. Differences are chance and the rule's choice of depth over the "
            "first level.", 1.2 + 0.17 * len(bars), lambda figure: figures.against_optimum(figure.subplots(), bars),
        ))  # fmt: skip
    if len(runs.domains()) > 1:
        usual = [stats for t in temperatures for stats in first[t]]
        found.append(Panel("By domain", "Each setting with its usual rule.", 0.9 + 0.24 * len(usual),
                           lambda figure: _domains(figure, runs, usual)))  # fmt: skip
    if every:
        found.append(Panel(
            "By output position", "Does acceptance change along the text? Whiskers: 95 % intervals over prompts.", 3.4,
            side_by_side(lambda axes, t: figures.by_output(axes, runs, first[t], f"T = {t:g}")),
        ))  # fmt: skip
    return found


def _first_rules(every: list[CellStats], temperature: float) -> list[CellStats]:
    """Each setting's cell with the rule that stands first in its list."""
    seen: dict[Setting, CellStats] = {}
    for stats in every:
        if stats.cell.temperature == temperature:
            seen.setdefault(stats.cell.setting, stats)
    return list(seen.values())


def _curve(runs: Runs, logs: Logs, every: list[CellStats], temperature: float) -> Curve | None:
    usual = _first_rules(every, temperature)
    chains = [stats for stats in usual if (stats.cell.setting.kind, stats.cell.setting.mode) == ("model", "chain")]
    if not chains:
        return None
    longest = max(chains, key=lambda stats: int(stats.cell.setting.get("k", 4)))
    rule = longest.cell.rule
    if temperature not in logs.texts:
        return curve(runs, chains, temperature, tokens_by_k(longest))

    def tokens(k: int) -> float:
        return logs.score(Setting.parse(f"model:k={k}"), rule, temperature).tokens_per_step.value

    return curve(runs, chains, temperature, tokens)


def curve(runs: Runs, chains: list[CellStats], temperature: float, tokens: Callable[[int], float]) -> Curve | None:
    """Speed(k) = tokens(k) t_plain / t_step(k), with t_step a straight line through the measured chains' step times.

    Args:
        chains: figures of chains of different k, one per k, at this temperature.
        tokens: tokens per step by k.

    Returns:
        None where fewer than two ks were measured.
    """
    plain = runs.stats(runs.plain(temperature))
    found = [(int(stats.cell.setting.get("k", 4)), stats) for stats in chains if stats.speedup is not None]
    if plain is None or len(found) < 2:
        return None
    found.sort(key=lambda pair: pair[0])
    ks = [k for k, _ in found]
    slope, intercept = np.polyfit(ks, [sum(stats.ms) for _, stats in found], 1)
    wanted = list(range(1, max(LARGEST_K, *ks) + 1))
    alone = sum(plain.ms)
    predicted = [tokens(k) * alone / float(intercept + slope * k) for k in wanted]
    return Curve(temperature, ks, [stats.speedup for _, stats in found if stats.speedup], wanted, predicted)


def tokens_by_k(longest: CellStats) -> Callable[[int], float]:
    """Tokens per step by k from the per-position acceptance of the longest measured chain, whose last rate goes on."""
    rates = longest.per_position

    def tokens(k: int) -> float:
        total, reached = 1.0, 1.0
        for depth in range(k):
            reached *= rates[min(depth, len(rates) - 1)] if rates else 0.0
            total += reached
        return total

    return tokens


def _stacked(figure: Any, temperatures: list[float], every: list[CellStats]) -> None:
    for axes, t in zip(np.ravel(figure.subplots(len(temperatures), 1)), temperatures, strict=True):
        figures.pareto(axes, [stats for stats in every if stats.cell.temperature == t], f"T = {t:g}")


def _trees(runs: Runs, every: list[CellStats]) -> list[tuple[CellStats, list[float]]]:
    """Up to four sampled cells of static trees, first rules first, with each node's share of steps."""
    found = []
    for temperature in dict.fromkeys(stats.cell.temperature for stats in every):
        for stats in _first_rules(every, temperature):
            widths = stats.cell.setting.widths
            if widths is None or max(widths) == 1:
                continue
            counts = np.zeros(1 + stats.cell.setting.num_nodes)
            for entry in runs.of(stats.cell):
                for turn in entry["turns"]:
                    nodes = turn["watch"]["nodes"]
                    counts[: len(nodes)] += nodes
            if counts[0]:
                found.append((stats, (counts / counts[0]).tolist()))
    return found[:4] if len(found) <= 4 else found[:: max(1, len(found) // 4)][:4]


def _draw_trees(figure: Any, trees: list[tuple[CellStats, list[float]]]) -> None:
    for axes, (stats, kept) in zip(np.ravel(figure.subplots(1, len(trees))), trees, strict=True):
        figures.tree(axes, stats, kept, stats.cell.setting.widths or ())


def _domains(figure: Any, runs: Runs, cells: list[CellStats]) -> None:
    domains = runs.domains()
    values = np.full((len(cells), len(domains)), np.nan)
    for i, stats in enumerate(cells):
        for j, domain in enumerate(domains):
            part = runs.stats(stats.cell, lambda entry, domain=domain: entry["domain"] == domain)  # type: ignore[misc]
            if part is not None:
                values[i, j] = part.tokens_per_step.value
    names = [f"{stats.cell.setting} ({stats.cell.rule}), T={stats.cell.temperature:g}" for stats in cells]
    figures.heat(figure.subplots(), values, names, domains, "tokens per step")
