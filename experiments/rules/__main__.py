"""`python -m specdec.experiments.rules`: which rule accepts most of which drafts, and what does it cost?"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

from specdec.experiments.frame import Command, ResultFile, RunOptions, option, started


@dataclass(frozen=True, kw_only=True)
class RulesOptions(RunOptions):
    """Which tables are made, and of how much."""

    overhead: Annotated[bool, option("Time the rules instead.", "--overhead")] = False
    only: Annotated[str | None, option("pair or instances: one of the two tables.")] = None
    temperatures: Annotated[tuple[float, ...], option("Of the pair's laws.")] = (0.6, 1.0, 1.5)
    prompts: Annotated[int, option("Texts per setting and rule, one batch.")] = 12
    tokens: Annotated[int, option("Tokens of each text.")] = 48
    timed: Annotated[int, option("Prompts timed alone, 0 for none.")] = 2
    num_instances: Annotated[int, option("Random problems of each size.")] = 60
    vocab: Annotated[int, option("Of --overhead.")] = 128_000
    repeats: Annotated[int, option("Of --overhead.")] = 15

    def __post_init__(self) -> None:
        self.one_of(("pair", "instances"), "only")


def run(options: RulesOptions) -> None:
    """Which rule accepts most of which drafts?

    Without options: tokens per step and per second of every rule on the shipped pair's real logits, and E[accepted] of
    every rule on random enumerable instances beside the optimum. --overhead: what a decision costs at V = 128,000 and
    64 nodes.
    """
    from specdec.experiments.display import progress
    from specdec.experiments.pair import Models
    from specdec.experiments.rules import instances, overhead, pair

    source = started(options, settings=options.to_dict("out"))
    result = ResultFile(options.out, f"rules-{'overhead' if options.overhead else 'table'}", source)
    found = result.content
    if options.overhead:
        found["overhead"] = overhead.table(options.vocab, options.repeats)
        show(found["overhead"], ("draft", "rule", "cpu_ms", "quartiles", "ms"))
    if not options.overhead and options.only != "instances":
        size = pair.Size(prompts=options.prompts, tokens=options.tokens, timed=options.timed)
        models = Models.load()
        found["pair"] = []
        for temperature in options.temperatures:
            with progress(len(pair.rivals()) + 1, f"T={temperature:g}") as advance:
                found["pair"] += pair.table(models, temperature, size, advance)
            result.write()  # what takes long is kept as soon as it is there
        show(found["pair"], ("temperature", "setting", "rule", "nodes", "measured", "expected", "z",
                             "tokens_per_cpu_second", "vs_plain"))  # fmt: skip
    if not options.overhead and options.only != "pair":
        with progress(len(instances.SIZES) * len(instances.TAKES)) as advance:
            found["instances"] = instances.table(options.num_instances, advance=advance)
        show(found["instances"], ("vocab", "children", "depth", "draft", "rule", "accepted", "optimum", "worst_share"))
    result.finish()


def show(entries: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """A table of some fields."""
    from specdec.experiments.display import table

    print("\n".join(table(names, ([_text(entry[name]) for name in names] for entry in entries))))


def _text(value: Any) -> Any:
    if isinstance(value, dict):
        return f"{value['value']:.3f} ±{value['error']:.3f}"
    if isinstance(value, list):
        return "-".join(_text(one) for one in value)
    return f"{value:.3f}" if isinstance(value, float) else value


main = Command(RulesOptions, run)

if __name__ == "__main__":
    sys.exit(main())
