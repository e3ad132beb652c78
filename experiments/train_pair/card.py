"""Model cards, filled from `training.json` and `evaluation.json` beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specdec.experiments.train_pair.evaluate import PairReport

FRONT_MATTER = """---
license: psf-2.0
language: [en, code]
library_name: transformers
pipeline_tag: text-generation
tags: [speculative-decoding, code]
---
"""


def format_report(report: PairReport) -> str:
    """The numbers as plain text, one per line."""
    positions = " ".join(f"{rate:.3f}" for rate in report.acceptance_per_position)
    return "\n".join(
        [
            f"held-out loss, target              {report.held_out_loss_target:.3f} nats/token",
            f"held-out loss, draft               {report.held_out_loss_draft:.3f} nats/token",
            f"greedy acceptance per position     {positions}  (k={report.k})",
            f"mean acceptance length, greedy     {report.mean_acceptance_length:.2f}",
            f"greedy agreement at every token    {report.greedy_agreement:.3f}",
            f"acceptance at temperature 1        {report.sampled_acceptance:.3f}",
            f"repeated 8-grams in greedy texts   {report.repeated_share:.2f}",
            f"step cost, target                  {report.target_step_ms:.2f} ms",
            f"step cost, draft                   {report.draft_step_ms:.2f} ms",
            f"target step / draft step           {report.cost_ratio:.2f} median, "
            f"{report.cost_ratio_fastest:.2f} fastest  ({report.threads} threads)",
            f"measured on                        {report.num_prompts} prompts of {report.prompt_tokens} tokens, "
            f"{report.new_tokens} new tokens",
        ]
    )


def shape_line(shape: dict[str, Any]) -> str:
    return (
        f"{shape['num_layers']} layer(s) x {shape['hidden']}, {shape['heads']} query heads, {shape['kv_heads']} "
        f"key/value head(s) of {shape['head_dim']}, MLP {shape['intermediate']}, tied embeddings"
    )


def pair_card(training: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The README of the pair folder."""
    recipe, corpus, counts = training["recipe"], training["corpus"], training["num_parameters"]
    report = PairReport(**{**evaluation, "acceptance_per_position": tuple(evaluation["acceptance_per_position"])})
    tokens = recipe["tokens"] // recipe["tokens_per_step"] * recipe["tokens_per_step"]
    written = recipe["on_policy_batches"] * recipe["on_policy_rows"] * recipe["on_policy_length"]
    return f"""{FRONT_MATTER}
# stdlib-python: a small target and its draft

Two Llama models with one byte-level BPE tokenizer ({recipe["vocab_size"]} ids), trained from scratch on the Python
standard library. They exist to demonstrate, test and benchmark speculative decoding offline.

| | `target/` | `draft/` |
|---|---|---|
| parameters | {counts["target"]:,} | {counts["draft"]:,} |
| shape | {shape_line(recipe["target"])} | {shape_line(recipe["draft"])} |
| stored as | {training["dtypes"]["target"]} | {training["dtypes"]["draft"]} |
| held-out loss (nats/token) | {report.held_out_loss_target:.3f} | {report.held_out_loss_draft:.3f} |
| one cached forward of one token | {report.target_step_ms:.1f} ms | {report.draft_step_ms:.1f} ms |

## Measured

```
{format_report(report)}
```

Plain `transformers` forwards on prompts from held-out files; "per position" is conditional on the position being
reached. Times were taken beside other work on the same {report.cpu} cores: they matter as a ratio.
`python -m specdec.experiments.train_pair evaluate --pair DIR` prints them again.

## Data

Source files of the CPython {corpus["python_version"]} standard library (licence: PSF-2.0), read from the running
interpreter: {corpus["num_training_files"]} files, {corpus["num_training_bytes"]:,} bytes,
{training["tokens_per_epoch"]:,} tokens. {corpus["num_held_out_files"]} more files
({corpus["num_held_out_bytes"]:,} bytes) are held out whole, by a hash of their path. The text itself is not
redistributed here. sha256 of all paths and texts:
`{corpus["sha256"]}`.

## Recipe

```
python -m specdec.experiments.train_pair --preset cpu --tokens {recipe["tokens"]} --seed {recipe["seed"]}
```

1. Jointly: the target learns from {tokens:,} tokens ({tokens / training["tokens_per_epoch"]:.2f} epochs); in the same
   steps the draft learns from the target's logits.
2. The target is frozen and writes {written:,} tokens, half of the texts greedily and half at temperature 1; the draft
   reads them {recipe["on_policy_epochs"]} times, learning the target's law at every position.

Muon for hidden matrices, AdamW for the rest, float32. `training.json` holds every setting. The order of the data is a
function of the seed; the last digits of the weights depend on machine, threads and `--compile`.

## Limits

Tiny models, briefly trained on one narrow and repetitive domain: the text looks like Python and means little, greedy
continuations fall into loops, and acceptance rates and n-gram drafters look better here than on prose or chat. Do not
read the rates as those of large models.
"""


def model_card(role: str, training: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The README of one of the two models."""
    purpose = {"target": "the model whose text is generated", "draft": "the cheap model that proposes its tokens"}[role]
    return f"""{FRONT_MATTER}
# stdlib-python, {role}

The {role} of the pair `stdlib-python`: {purpose}. Llama, {training["num_parameters"][role]:,} parameters,
{shape_line(training["recipe"][role])}; stored as {training["dtypes"][role]}; held-out loss
{evaluation[f"held_out_loss_{role}"]:.3f} nats/token. Trained on the Python standard library (PSF-2.0).
Data, recipe, measurements and limits: the card of the pair, one folder up.
"""


def write_cards(pair: Path) -> None:
    """Write the three cards from the two JSON files in `pair`."""
    training = json.loads((pair / "training.json").read_text())
    evaluation = json.loads((pair / "evaluation.json").read_text())
    (pair / "README.md").write_text(pair_card(training, evaluation))
    for role in ("target", "draft"):
        (pair / role / "README.md").write_text(model_card(role, training, evaluation))
