"""Draft models with few positions, and the warning that some rows get no drafts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import models
from torch import nn

from specdec.drafters import DrafterNoteWarning

POSITIONS = 24
TARGET: Any = models.target("gpt2")


def with_fewer_positions(model: Any, positions: int) -> Any:
    """A GPT-2 that knows only the first positions."""
    short = copy.deepcopy(model)
    short.config.n_positions = positions
    short.transformer.wpe = nn.Embedding.from_pretrained(model.transformer.wpe.weight[:positions].detach().clone())
    return short


NEAR = with_fewer_positions(models.draft("near", "gpt2"), POSITIONS)
SAME = with_fewer_positions(TARGET, POSITIONS)
"""Every greedy draft of this one is accepted."""


@contextmanager
def one_note() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [entry.category for entry in caught] == [DrafterNoteWarning], [str(entry.message) for entry in caught]
