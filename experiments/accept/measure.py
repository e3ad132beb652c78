"""One unit of work: one prompt, all its turns, in one cell."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from specdec.experiments.accept.cells import Cell
from specdec.experiments.accept.models import Models
from specdec.experiments.accept.options import AcceptOptions
from specdec.experiments.accept.watch import Watch
from specdec.experiments.workloads import Prompt
from specdec.speculator import Speculator
from specdec.trace import StepTrace

KIND_LETTERS = {"accepted": "a", "recovered": "r", "bonus": "b"}


class Speculators:
    """One Speculator per setting and rule, built when first needed."""

    def __init__(self, models: Models):
        self._models = models
        self._built: dict[tuple[str, str], Speculator] = {}

    def get(self, cell: Cell) -> Speculator:
        key = (str(cell.setting), cell.rule)
        if key not in self._built:
            drafter = cell.setting.build(self._models.draft)
            self._built[key] = Speculator(self._models.target, drafter, rule=cell.rule)
        return self._built[key]


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
        ids = models.turn_ids(prompt, answers, options)
        turns.append(_turn(models, speculator, cell, ids, seed_of(options, prompt, number), options))
        answers.append(models.tokenizer.decode(turns[-1]["token_ids"], skip_special_tokens=True))
    return {"cell": str(cell), "prompt": prompt.id, "domain": prompt.domain, "turns": turns}


def _turn(
    models: Models, speculator: Speculator, cell: Cell, ids: list[int], seed: int, options: AcceptOptions
) -> dict[str, Any]:
    traces: list[StepTrace] = []
    watch = Watch()
    speculator.monitor = watch
    given = torch.tensor([ids], device=models.device)
    out = speculator.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=options.new_tokens, seed=seed,
        on_step=traces.append, **options.sampling(cell.temperature),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    report = speculator.report
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
        "ms_prefill": round(report.ms_prefill, 3),
        "ms_draft": round(report.ms_draft, 3),
        "ms_verify": round(report.ms_verify, 3),
        "ms_rest": round(report.ms_rest - 1e3 * watch.seconds, 3),
        "faults": report.num_drafter_faults,
        "watch": watch.to_dict(),
    }
