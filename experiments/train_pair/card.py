"""Model cards, filled from `training.json` and `evaluation.json` beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specdec.experiments.train_pair.evaluate import PairReport


def format_report(report: PairReport) -> str:
    """The numbers as plain text, one per line."""
    positions = " ".join(f"{rate:.3f}" for rate in report.acceptance_per_position)
    return _filled("report.txt", report=report, positions=positions).rstrip()


def shape_line(shape: dict[str, Any]) -> str:
    return (
        f"{shape['num_layers']} layer(s) x {shape['hidden']}, {shape['heads']} query heads, {shape['kv_heads']} "
        f"key/value head(s) of {shape['head_dim']}, MLP {shape['intermediate']}, tied embeddings"
    )


def pair_card(training: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The README of the pair folder."""
    recipe = training["recipe"]
    report = PairReport(**{**evaluation, "acceptance_per_position": tuple(evaluation["acceptance_per_position"])})
    tokens = recipe["tokens"] // recipe["tokens_per_step"] * recipe["tokens_per_step"]
    return _filled(
        "pair_card.md", training=training, recipe=recipe, corpus=training["corpus"], counts=training["num_parameters"],
        report=report, measured=format_report(report), tokens=tokens, epochs=tokens / training["tokens_per_epoch"],
        written=recipe["on_policy_batches"] * recipe["on_policy_rows"] * recipe["on_policy_length"],
        shapes={role: shape_line(recipe[role]) for role in ("target", "draft")},
    )  # fmt: skip


def model_card(role: str, training: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The README of one of the two models."""
    purpose = {"target": "the model whose text is generated", "draft": "the cheap model that proposes its tokens"}[role]
    return _filled(
        "model_card.md", role=role, purpose=purpose, num_parameters=training["num_parameters"][role],
        shape=shape_line(training["recipe"][role]), dtype=training["dtypes"][role],
        loss=evaluation[f"held_out_loss_{role}"],
    )  # fmt: skip


def _filled(template: str, **values: Any) -> str:
    return Path(__file__).with_name(template).read_text(encoding="utf-8").format(**values)


def write_cards(pair: Path) -> None:
    """Write the three cards from the two JSON files in `pair`."""
    training = json.loads((pair / "training.json").read_text())
    evaluation = json.loads((pair / "evaluation.json").read_text())
    (pair / "README.md").write_text(pair_card(training, evaluation))
    for role in ("target", "draft"):
        (pair / role / "README.md").write_text(model_card(role, training, evaluation))
