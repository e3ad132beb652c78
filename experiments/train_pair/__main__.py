"""Command line of the recipe. Imports nothing heavy until the arguments are understood."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from specdec.experiments.train_pair.recipe import Recipe, preset

COMMANDS = ("train", "export", "evaluate")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m specdec.experiments.train_pair", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="{train,export,evaluate}")

    train = commands.add_parser(
        "train",
        help="train tokenizer, target and draft, then export and evaluate them (the default command)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_run_arguments(train)
    train.add_argument("--resume", action="store_true", help="go on with the checkpoint in --out")
    train.add_argument("--save-seconds", type=float, default=180.0, help="time between checkpoints")
    train.add_argument("--compile", action="store_true", help="compile the layers (1.25x on a CPU; needs a compiler)")

    export = commands.add_parser("export", help="write the pair of the checkpoint in --out, finished or not")
    add_run_arguments(export)
    export.add_argument("--pair", type=Path, required=True, help="folder to write target/ and draft/ into")

    evaluate = commands.add_parser("evaluate", help="print loss, acceptance and step cost of a pair")
    evaluate.add_argument("--pair", type=Path, required=True, help="folder with target/ and draft/")
    evaluate.add_argument("--json", type=Path, help="also write the numbers to this file")
    evaluate.add_argument("--card", action="store_true", help="also write evaluation.json and model cards into --pair")
    evaluate.add_argument("--prompts", type=int, default=40)
    evaluate.add_argument("--new-tokens", type=int, default=192)
    evaluate.add_argument("-k", type=int, default=4, help="length of the draft chain")
    evaluate.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    return parser


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=("tiny", "cpu", "gpu"), default="cpu", help="size of the run")
    parser.add_argument("--tokens", type=int, help="tokens of the joint phase (default: the preset's)")
    parser.add_argument(
        "--scheduled-tokens", type=int, help="shorten a run: the --tokens it was started with (with --cooldown-step)"
    )
    parser.add_argument(
        "--cooldown-step", type=int, help="shorten a run: step from which the rate falls to 0 at the new --tokens"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/stdlib-python"), help="folder of the run")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")


def recipe_of(args: argparse.Namespace) -> Recipe:
    recipe = preset(args.preset)
    return replace(
        recipe,
        seed=args.seed,
        tokens=args.tokens if args.tokens is not None else recipe.tokens,
        scheduled_tokens=args.scheduled_tokens,
        cooldown_step=args.cooldown_step,
    )


def run_train(args: argparse.Namespace) -> int:
    from specdec.experiments.train_pair.runner import open_state, train
    from specdec.experiments.train_pair.session import Interrupted, Session

    state = open_state(recipe_of(args), args.out, args.device, args.threads, resume=args.resume)
    session = Session(args.save_seconds)
    try:
        with session.listening():
            train(state, session, compile_layers=args.compile)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    args.pair = args.out / "pair"
    run_export(args)
    return run_evaluate(build_parser().parse_args(["evaluate", "--pair", str(args.pair), "--card"]))


def run_export(args: argparse.Namespace) -> int:
    from specdec.experiments.train_pair.export import export_pair
    from specdec.experiments.train_pair.runner import open_state

    if not (args.out / "checkpoint.safetensors").exists():
        raise FileNotFoundError(f"expected a checkpoint in {args.out}, found none; train first, or name another --out")
    state = open_state(recipe_of(args), args.out, args.device, args.threads, resume=True)
    export_pair(state, args.pair)
    print(f"wrote {args.pair} ({state.phase}, step {state.step})")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    import torch

    from specdec.experiments.train_pair.card import format_report, write_cards
    from specdec.experiments.train_pair.evaluate import evaluate_pair

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    report = evaluate_pair(args.pair, num_prompts=args.prompts, new_tokens=args.new_tokens, k=args.k)
    print(format_report(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    if args.card:
        (args.pair / "evaluation.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        write_cards(args.pair)
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in (*COMMANDS, "-h", "--help"):
        argv.insert(0, "train")
    args = build_parser().parse_args(argv)
    try:
        return {"train": run_train, "export": run_export, "evaluate": run_evaluate}[args.command](args)
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
