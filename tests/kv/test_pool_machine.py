"""Random histories of a KV pool against dicts of lists: contents, lengths, holders and free pages always agree.

The suite runs a quick profile, always the same. Ten thousand histories, new ones each time:

    POOL_HISTORIES=10000 python -m pytest -q tests/kv/test_pool_machine.py -k random
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from pool_machine import PoolMachine

from specdec.kv import CacheStateError
from specdec.kv.pool_pages import SequencePages

HISTORIES = int(os.environ.get("POOL_HISTORIES", "60"))


def histories(count: int, phases: Sequence[Phase] = tuple(Phase)) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        PoolMachine,
        settings=settings(
            max_examples=count,
            derandomize="POOL_HISTORIES" not in os.environ,
            database=None,
            stateful_step_count=30,
            suppress_health_check=quiet,
            phases=phases,
            report_multiple_bugs=False,
        ),
    )


@pytest.mark.timeout(120 + HISTORIES)
def test_random_histories() -> None:
    histories(HISTORIES)


@pytest.mark.slow
def test_many_random_histories() -> None:
    histories(5 * HISTORIES)


def _no_copies(self: SequencePages, spans: Any) -> Any:
    new, _ = _MISSING(self, spans)
    return new, []


def _writes_to_published_pages(self: SequencePages, spans: Any) -> Any:
    new, copies = _MISSING(self, spans)
    return new, [(sequence, i) for sequence, i in copies if self._allocator.refs[sequence.pages[i]] > 1]


def _forgets_to_release(self: SequencePages, sequence: Any, first: int) -> None:
    del sequence.pages[first:]
    sequence.published = min(sequence.published, first)


def _publishes_the_tail(self: SequencePages, sequence: Any, tokens: Any) -> int:
    own, sequence.length = sequence.length, max(sequence.filled.values())
    try:
        return _PUBLISH(self, sequence, [*tokens, *[9] * 50])
    finally:
        sequence.length = own


_MISSING, _PUBLISH = SequencePages._missing, SequencePages.publish


@pytest.mark.parametrize(
    ("owner", "method", "broken"),
    [
        (SequencePages, "_missing", _no_copies),
        (SequencePages, "_missing", _writes_to_published_pages),
        (SequencePages, "release_from", _forgets_to_release),
        (SequencePages, "publish", _publishes_the_tail),
    ],
    ids=["no-copy-on-write", "no-copy-of-published-pages", "leaks-pages", "publishes-drafts"],
)
def test_broken_pools_are_found(owner: type, method: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, method, broken)
    with pytest.raises((AssertionError, CacheStateError, ExceptionGroup)):
        histories(2000, [Phase.generate])
