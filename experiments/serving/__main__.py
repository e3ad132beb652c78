"""`python -m specdec.experiments.serving`: throughput and latency of engines and servers."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from specdec.experiments.frame import Command, ResultFile, option, started
from specdec.experiments.pair import NewTokens, PairOptions, Seed
from specdec.shown_errors import ExperimentError


@dataclass(frozen=True, kw_only=True)
class ServingOptions(PairOptions):
    """One serving run. Every round has prompts of its own: nobody finds those of an earlier round among his shared
    prefixes."""

    needs_draft: ClassVar[bool] = False

    concurrency: Annotated[str, option("Requests under way at once, e.g. 1,4,8,16.")] = "1,4,8,16"
    requests: Annotated[int, option("Requests per run; 0 = four times the concurrency.")] = 0
    prompt_tokens: Annotated[int, option("Tokens of each prompt.")] = 128
    new_tokens: NewTokens = 128
    temperature: Annotated[float, option("0 is greedy.", "--temperature", "-t")] = 0.0
    k: Annotated[int, option("Length of drafted chains.", "--k", "-k")] = 4
    rounds: Annotated[int, option("Times every peer serves every workload.")] = 3
    peers: Annotated[
        str, option("Names or families of peers, separated by commas; empty = all that run in this process.")
    ] = ""
    llama_python: Annotated[str, option("The Python that llama-cpp-server runs by, if not by this one.")] = ""
    seed: Seed = 0
    out: Annotated[Path, option("Folder for the JSON file.")] = Path("serving-results")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "k", "rounds", "prompt_tokens")
        self.at_least(2, "new_tokens")
        self.at_least(0, "requests")
        if not all(level.isdecimal() and int(level) for level in self.concurrency.split(",")):
            raise ExperimentError(f"concurrency: expected positive numbers, got {self.concurrency!r}")

    @property
    def levels(self) -> list[int]:
        return [int(level) for level in self.concurrency.split(",")]


def run(options: ServingOptions) -> None:
    """Serve the same prompts in every way, alternating; print and keep what was measured."""
    from specdec.experiments.serving.measure import lines, measure
    from specdec.experiments.serving.servers import ending_by_sigterm, server_ways
    from specdec.experiments.serving.ways import Workload, all_ways
    from specdec.experiments.ways import select

    names = [name for name in options.peers.split(",") if name]
    here = all_ways(options.k)
    ways = select([*here, *server_ways(options.k, options.llama_python)], names or [way.name for way in here])
    source = started(options, options.seed, pair=options.chosen_pair().name)
    models = options.load()
    with ending_by_sigterm(), ExitStack() as ending:
        ready = {way.name: way.ready(models, max(options.levels), ending) for way in ways}
        result = ResultFile(options.out, "serving", source, temperature=options.temperature, runs=[])
        for level in options.levels:
            count = options.requests or 4 * level
            prompts = [
                ids[0].tolist()
                for ids in models.prompts(level + options.rounds * count, options.prompt_tokens, options.seed)
            ]
            warm, rest = Workload(prompts[:level], level, options.new_tokens, options.temperature), prompts[level:]
            works = [warm._replace(prompts=rest[i * count : (i + 1) * count]) for i in range(options.rounds)]
            found = measure(ready, warm, works, options.seed)
            result.content["runs"] += found
            result.write()
            print("\n".join(lines(found)), flush=True)
        result.finish()


main = Command(ServingOptions, run)

if __name__ == "__main__":
    sys.exit(main())
