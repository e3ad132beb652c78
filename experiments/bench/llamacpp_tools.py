"""llama.cpp's own programs on a pair: `python -m specdec.experiments.bench.llamacpp_tools`.

`llama-bench` times plain decoding of random tokens, `llama-speculative-simple` speculative decoding of a text with the
pair's draft model. Both clock themselves, without loading; neither goes through Python. Both must be on PATH: llama.cpp
builds them with `cmake --build . --target llama-bench llama-speculative-simple`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.frame import Command, Options, append_lines, dated, option, started
from specdec.experiments.pair import NewTokens
from specdec.shipped import DEFAULT_PAIR, pair_folder
from specdec.shown_errors import ExperimentError

BENCH = "llama-bench"
SPECULATIVE = "llama-speculative-simple"
TIMEOUT = 600
_CLOCK = re.compile(r"(encoded|decoded)\s+(\d+) tokens in\s+([\d.]+) seconds")
_COUNT = re.compile(r"(n_drafted|n_accept)\s*=\s*(\d+)")


@dataclass(frozen=True)
class ToolRun:
    """One timed call of one program, the prompt included as in the benchmark.

    tokens: new tokens. seconds: of prompt and new tokens. decode_seconds: of the new tokens alone (None: not told).
    drafted, accepted: draft tokens.
    """

    tool: str
    prompt: int
    prompt_tokens: int
    tokens: int
    seconds: float
    decode_seconds: float | None = None
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class ToolError(ExperimentError):
    """A program of llama.cpp failed or said something that is not understood."""


def run_bench(model: Path, options: BenchOptions, kv: str = "f32") -> list[ToolRun]:
    """`llama-bench` on a GGUF file: `options.rounds` times a prompt and what follows it.

    Args:
        kv: type of the K/V cache, "f32" or "f16".

    Raises:
        ToolError: it fails, or its JSON is not as expected.
    """
    lengths = f"{options.prompt_tokens},{options.new_tokens}"
    said = _call(
        BENCH, "-m", model, "-t", options.threads, "-p", 0, "-n", 0, "-pg", lengths, "-r", options.rounds,
        "-ctk", kv, "-ctv", kv, "-ngl", 0, "-o", "json",
    )  # fmt: skip
    return parse_bench(said.stdout, options)


def parse_bench(text: str, options: BenchOptions) -> list[ToolRun]:
    """The runs in `llama-bench -o json`'s output."""
    try:
        (test,) = json.loads(text)
        lengths = (test["n_prompt"], test["n_gen"])
        seconds = [nanoseconds * 1e-9 for nanoseconds in test["samples_ns"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ToolError(f"{BENCH}: expected a JSON list of one test, got {text[:200]!r} ({error!r})") from error
    if lengths != (options.prompt_tokens, options.new_tokens):
        raise ToolError(f"{BENCH}: expected {options.prompt_tokens} + {options.new_tokens} tokens, got {lengths}")
    return [ToolRun(BENCH, i, *lengths, taken) for i, taken in enumerate(seconds)]


def run_speculative(
    target: Path, draft: Path, prompts: Iterable[str], options: BenchOptions, k: int, kv: str = "f32"
) -> list[ToolRun]:
    """`llama-speculative-simple` with chains of `k` drafted tokens, one call per prompt and round.

    It reads text: what it makes of a prompt may be a token more or fewer than `options.prompt_tokens`.

    Raises:
        ToolError: it fails, or prints no times.
    """
    runs = []
    for i, prompt in enumerate(prompts):
        for _ in range(options.rounds):
            said = _call(
                SPECULATIVE, "-m", target, "-md", draft, "--spec-type", "draft-simple", "--spec-draft-n-max", k,
                "-p", prompt, "--no-escape", "-n", options.new_tokens, "--ignore-eos", "--temp", options.temperature,
                "--top-k", 0, "--top-p", 1, "--min-p", 0, "-s", options.seed, "-t", options.threads,
                "-c", 2 * (options.prompt_tokens + options.new_tokens), "-ngl", 0, "-ctk", kv, "-ctv", kv,
                "-ctkd", kv, "-ctvd", kv,
            )  # fmt: skip
            runs.append(replace(parse_speculative(said.stdout + said.stderr), prompt=i))
    return runs


def parse_speculative(text: str) -> ToolRun:
    """The run that `llama-speculative-simple` reports at the end of its output."""
    clock = {name: (int(count), float(seconds)) for name, count, seconds in _CLOCK.findall(text)}
    counts = {name: int(count) for name, count in _COUNT.findall(text)}
    if len(clock) != 2 or len(counts) != 2:
        raise ToolError(f"{SPECULATIVE}: expected its times and counts, got ...{text[-300:]!r}")
    (prompt_tokens, encoding), (tokens, decoding) = clock["encoded"], clock["decoded"]
    return ToolRun(
        SPECULATIVE, 0, prompt_tokens, tokens, encoding + decoding, decoding, counts["n_drafted"], counts["n_accept"]
    )


def _call(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    try:
        said = subprocess.run(
            [tool, *map(str, arguments)], capture_output=True, text=True, errors="replace", timeout=TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(f"{tool}: {error}") from error
    if said.returncode:
        raise ToolError(f"{tool}: exit code {said.returncode}: ...{(said.stdout + said.stderr)[-300:].strip()!r}")
    return said


def summary_line(runs: Sequence[ToolRun]) -> str:
    """One program's runs as a sentence."""
    rates = sorted(run.tokens_per_second for run in runs)
    line = f"{runs[0].tool}: {median(rates):.1f} tokens/s, prompt included [{rates[0]:.1f} to {rates[-1]:.1f}]"
    drafted = sum(run.drafted for run in runs)
    return line + (f", {sum(run.accepted for run in runs) / drafted:.2f} of the drafts accepted" if drafted else "")


@dataclass(frozen=True, kw_only=True)
class ToolOptions(Options):
    """What both programs are asked."""

    pair: Annotated[str | Path, option("Folder with target/ and draft/, or a shipped pair's name.")] = DEFAULT_PAIR
    num_prompts: Annotated[int, option("Held-out prompts.")] = BenchOptions.num_prompts
    prompt_tokens: Annotated[int, option("Tokens of each prompt.")] = BenchOptions.prompt_tokens
    new_tokens: NewTokens = BenchOptions.new_tokens
    k: Annotated[int, option("Drafted tokens per step.", "--k", "-k")] = 5
    dtype: Annotated[str, option("Of weights and K/V: f32 or f16.")] = "f32"
    threads: Annotated[int, option("Threads of both programs.")] = BenchOptions.threads
    rounds: Annotated[int, option("Times each prompt is run.")] = BenchOptions.rounds
    out: Annotated[Path, option("Folder for the JSONL file.")] = BenchOptions.out

    def check(self) -> None:
        pair_folder(self.pair)
        self.bench()

    def bench(self) -> BenchOptions:
        """The same as options of the benchmark."""
        return BenchOptions(**self.to_dict("k", "dtype"))


def run(options: ToolOptions) -> int:
    """Time llama-bench and llama-speculative-simple on a pair, greedy, with the benchmark's prompts and lengths."""
    # Here, so that --help and a wrong option answer at once.
    from specdec.pairing.gguf import export_pair

    asked, dtype = options.bench(), options.dtype
    here = [tool for tool in (BENCH, SPECULATIVE) if shutil.which(tool)]
    for tool in {BENCH, SPECULATIVE} - set(here):
        typer.echo(f"{tool}: n/a (not on PATH; build it from llama.cpp's sources)")
    if not here:
        return 1
    folder = pair_folder(options.pair)
    details = {**asked.to_dict(), "k": options.k, "weights": dtype}
    source = started(asked, asked.seed, pair=folder.name, options=details)
    models = asked.load()
    prompts = [models.tokenizer.decode(one.ids[0]) for one in asked.prompts(models)]
    runs: list[ToolRun] = []
    with TemporaryDirectory() as files:
        target, draft = export_pair(folder, Path(files), dtype)
        if BENCH in here:
            runs += run_bench(target, asked, dtype)
        if SPECULATIVE in here:
            runs += run_speculative(target, draft, prompts, asked, options.k, dtype)
    path = dated(options.out, "llamacpp", "jsonl")
    append_lines(path, "provenance", [source])
    append_lines(path, "run", map(asdict, runs))
    typer.echo(f"wrote {path}")
    for tool in here:
        typer.echo(summary_line([one for one in runs if one.tool == tool]))
    return 0


main = Command(ToolOptions, run)

if __name__ == "__main__":
    sys.exit(main())
