"""The lanes of one engine: made when a request first needs one, kept for those to come."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specdec.drafters import FallbackGuard
from specdec.engine.lane import Lane
from specdec.engine.task import LaneKey, Task
from specdec.kv.faults import from_outside
from specdec.kv.paged import PagedKVCache
from specdec.kv.pool import KVPool


class Lanes:
    """Lanes by their key.

    Args:
        drafters: by name; lanes clone them. names: under which of the pool's models each keeps its K/V, if any.
        vocab, device: the target's.
    """

    def __init__(
        self,
        pool: KVPool,
        drafters: Mapping[str, FallbackGuard | None],
        names: Mapping[str, str],
        vocab: int,
        device: torch.device,
    ):
        self._pool, self._drafters, self._names = pool, drafters, names
        self._vocab, self._device = vocab, device
        self._lanes: dict[LaneKey, Lane] = {}

    @property
    def live(self) -> list[Lane]:
        """Those with somebody in them."""
        return [lane for lane in self._lanes.values() if lane.rows.live]

    def of(self, key: LaneKey) -> Lane:
        """The lane of such requests."""
        if key not in self._lanes:
            names = {"draft": self._names[key.draft]} if key.draft in self._names else {}
            drafter, cache = _own(self._drafters[key.draft]), PagedKVCache(self._pool, (), names)
            self._lanes[key] = Lane(key, drafter, cache, self._vocab, self._device)
        return self._lanes[key]

    def leave(self, task: Task) -> None:
        """Take a running request out of its lane."""
        self._lanes[task.lane].leave(task)

    def close(self) -> None:
        """Let go of all of them, with their drafters and sessions."""
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            lane.close()


def _own(drafter: FallbackGuard | None) -> FallbackGuard | None:
    """A drafter for one lane; None, which is plain decoding, where it cannot be had."""
    try:
        return None if drafter is None else drafter.clone()
    except BaseException as fault:
        if from_outside(fault):
            raise
        return None
