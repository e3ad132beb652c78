"""Calls for the tests of what the planner measures, and stand-ins for its store and its patience."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_law import noisy_copy, tiny_llama
from models import PAD

from specdec.planner import factory
from specdec.planner.costs import Costs
from specdec.planner.measure import measure
from specdec.planner.store import CostStore

TARGET = tiny_llama(0)
DRAFT = noisy_copy(TARGET, 1)
GREEDY: dict[str, Any] = dict(do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=PAD)


def measured_quickly(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing is known beforehand, and nothing is kept.

    Returns:
        numbers of rows that are then measured.
    """
    monkeypatch.setattr(factory, "STORE", CostStore())
    monkeypatch.setenv("SPECDEC_CACHE", "off")
    rows: list[int] = []
    measuring: Callable[..., Costs] = measure

    def quick(*arguments: Any, **named: Any) -> Costs:
        costs = measuring(*arguments, seconds=0.01, **named)
        rows.append(arguments[4])
        return costs

    monkeypatch.setattr(factory, "measure", quick)
    return rows


def batch(rows: int) -> dict[str, Any]:
    ids = torch.randint(3, 8, (rows, 6), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"inputs": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def plain(rows: int, **arguments: Any) -> Any:
    target: Any = TARGET
    return target.generate(**batch(rows), **GREEDY, **arguments)
