"""`python -m specdec.experiments.train_pair [train|export|evaluate]`; imports nothing heavy until it runs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from specdec.experiments.frame import Command, Options, option
from specdec.experiments.pair import NewTokens
from specdec.experiments.train_pair.recipe import Recipe, preset
from specdec.shown_errors import ExperimentError

if TYPE_CHECKING:
    from specdec.experiments.train_pair.state import TrainingState


Threads = Annotated[int | None, option("Torch threads (default: torch's own choice).")]


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Options):
    """Which run is meant."""

    preset: Annotated[str, option("Size of the run: tiny, cpu or gpu.")] = "cpu"
    tokens: Annotated[int | None, option("Tokens of the joint phase (default: the preset's).")] = None
    scheduled_tokens: Annotated[
        int | None, option("Shorten a run: the --tokens it was started with (with --cooldown-step).")
    ] = None
    cooldown_step: Annotated[
        int | None, option("Shorten a run: step from which the rate falls to 0 at the new --tokens.")
    ] = None
    seed: Annotated[int, option("Seed of weights and data.")] = 0
    out: Annotated[Path, option("Folder of the run.")] = Path("runs/stdlib-python")
    device: Annotated[str, option("auto, cpu or cuda.")] = "auto"
    threads: Threads = None

    def __post_init__(self) -> None:
        self.one_of(("auto", "cpu", "cuda"), "device")

    def check(self) -> None:
        self.recipe()

    def recipe(self) -> Recipe:
        """Raises ExperimentError: no such preset, or a recipe that cannot be trained."""
        chosen = preset(self.preset)
        return replace(
            chosen, seed=self.seed, tokens=chosen.tokens if self.tokens is None else self.tokens,
            scheduled_tokens=self.scheduled_tokens, cooldown_step=self.cooldown_step,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RecipeOptions):
    """How it is trained."""

    resume: Annotated[bool, option("Go on with the checkpoint in --out.", "--resume")] = False
    save_seconds: Annotated[float, option("Time between checkpoints.")] = 180.0
    compile: Annotated[bool, option("Compile the layers (1.25x on a CPU; needs a compiler).", "--compile")] = False


@dataclass(frozen=True, kw_only=True)
class ExportOptions(RecipeOptions):
    """Which run's pair is written, and where to."""

    pair: Annotated[Path, option("Folder to write target/ and draft/ into.")]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """Which pair is measured, on how much."""

    pair: Annotated[Path, option("Folder with target/ and draft/.")]
    json: Annotated[Path | None, option("Also write the numbers to this file.")] = None
    card: Annotated[bool, option("Also write evaluation.json and model cards into --pair.", "--card")] = False
    prompts: Annotated[int, option("Held-out prompts.")] = 40
    new_tokens: NewTokens = 192
    k: Annotated[int, option("Length of the draft chain.", "-k")] = 4
    threads: Threads = None


def train(options: TrainOptions) -> int:
    """Train tokenizer, target and draft, then export and evaluate them (the default command)."""
    from specdec.experiments.train_pair.on_policy import train_all
    from specdec.experiments.train_pair.session import Interrupted, Session

    state = _state(options, options.resume)
    session = Session(options.save_seconds)
    try:
        with session.listening():
            train_all(state, session, compile_layers=options.compile)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    pair = options.out / "pair"
    _export(options, pair)
    evaluate(EvaluateOptions(pair=pair, card=True))
    return 0


def export(options: ExportOptions) -> None:
    """Write the pair of the checkpoint in --out, finished or not."""
    _export(options, options.pair)


def _export(options: RecipeOptions, pair: Path) -> None:
    from specdec.experiments.train_pair.export import export_pair

    if not (options.out / "checkpoint.safetensors").exists():
        raise FileNotFoundError(
            f"expected a checkpoint in {options.out}, found none; train first, or name another --out"
        )
    state = _state(options, resume=True)
    export_pair(state, pair)
    print(f"wrote {pair} ({state.phase}, step {state.step})")


def _state(options: RecipeOptions, resume: bool) -> TrainingState:
    import torch

    from specdec.experiments.train_pair.state import TrainingState

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" != found:
        raise ExperimentError("expected a CUDA device for --device cuda, found none; use --device cpu")
    device = found if options.device == "auto" else options.device
    return TrainingState.create(options.recipe(), options.out, device, resume=resume)


def evaluate(options: EvaluateOptions) -> None:
    """Print loss, acceptance and step cost of a pair."""
    import torch

    from specdec.experiments.train_pair.card import format_report, write_cards
    from specdec.experiments.train_pair.evaluate import evaluate_pair

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    report = evaluate_pair(options.pair, num_prompts=options.prompts, new_tokens=options.new_tokens, k=options.k)
    print(format_report(report))
    for path in (options.json, options.pair / "evaluation.json" if options.card else None):
        if path is not None:
            path.write_text(json.dumps(asdict(report), indent=2) + "\n")
    if options.card:
        write_cards(options.pair)


main = Command(
    TrainOptions,
    train,
    train=Command(TrainOptions, train),
    export=Command(ExportOptions, export),
    evaluate=Command(EvaluateOptions, evaluate),
)

if __name__ == "__main__":
    sys.exit(main())
