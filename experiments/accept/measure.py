"""One unit of work: one prompt, all its turns, in one cell."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from specdec.experiments.accept.options import AcceptOptions
from specdec.experiments.accept.setting import Cell
from specdec.experiments.accept.watch import Watch
from specdec.experiments.pair import Models
from specdec.experiments.ways import Generate, speculating
from specdec.experiments.workloads import Prompt
from specdec.speculator import Speculator
from specdec.trace import StepTrace

KIND_LETTERS = {"accepted": "a", "recovered": "r", "bonus": "b"}


def seed_of(options: AcceptOptions, prompt: Prompt, turn: int) -> int:
    """A seed that depends on the run's seed, the prompt and the turn, not on when or where the unit runs."""
    digest = hashlib.sha256(f"{options.seed}/{prompt.id}/{turn}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def run_unit(
    models: Models, speculator: Speculator, cell: Cell, prompt: Prompt, options: AcceptOptions
) -> dict[str, Any]:
    """Generate every turn and write down what happened, ready for JSON.

    Per turn: `token_ids` emitted; `kinds`, one letter per token (a accepted, r recovered, b bonus); `drafted` and
    `accepted` tokens per step; `seconds` of the whole call without the time of watching it; milliseconds by phase.
    """
    turns: list[dict[str, Any]] = []
    answers: list[str] = []
    for number in range(len(prompt.turns)):
        ids = models.turn_ids(prompt, answers, options.new_tokens, options.prompt_tokens)
        turns.append(_turn(models, speculator, cell, ids, seed_of(options, prompt, number), options))
        answers.append(models.tokenizer.decode(turns[-1]["token_ids"], skip_special_tokens=True))
    return {"cell": str(cell), "prompt": prompt.id, "domain": prompt.domain, "turns": turns}


def generating(speculator: Speculator, temperature: float, options: AcceptOptions) -> Generate:
    """The run's way to generate with a drafter and rule."""
    return speculating(speculator, options.new_tokens, temperature, top_k=options.top_k, top_p=options.top_p)


def _turn(
    models: Models, speculator: Speculator, cell: Cell, ids: list[int], seed: int, options: AcceptOptions
) -> dict[str, Any]:
    traces: list[StepTrace] = []
    speculator.monitor = watch = Watch()
    given = torch.tensor([ids], device=models.target.device)
    out, report, _ = generating(speculator, cell.temperature, options)(given, seed, traces.append)
    assert report is not None
    return {
        "prompt_tokens": len(ids),
        "token_ids": out[0, len(ids) :].tolist(),
        "kinds": "".join(KIND_LETTERS[kind] for trace in traces for kind in trace.kinds[0]),
        "drafted": [trace.drafted[0] for trace in traces],
        "accepted": [trace.accepted[0] for trace in traces],
        "kept_per_position": report.num_accepted_tokens_per_pos,
        "reached_per_position": report.num_reached_per_pos,
        "seconds": round(report.ms_total / 1e3 - watch.seconds, 6),
        **{name: round(getattr(report, name), 3) for name in ("ms_prefill", "ms_draft", "ms_verify")},
        "ms_rest": round(report.ms_rest - 1e3 * watch.seconds, 3),
        "faults": report.num_drafter_faults,
        "watch": watch.to_dict(),
    }
