"""What one decode step did and how long it took."""

from __future__ import annotations

from typing import NamedTuple


class StepTrace(NamedTuple):
    """One decode step. Lists are per row that took part, in the order of `rows` (indices into the batch).

    drafted, accepted: draft tokens proposed and kept. emitted: the token ids the step added (after any stop rule's
    cut). kinds: per emitted token "accepted", "recovered" (drawn after a rejection) or "bonus" (nothing was left
    to reject). Times in milliseconds.
    """

    step: int
    rows: list[int]
    drafted: list[int]
    accepted: list[int]
    emitted: list[list[int]]
    kinds: list[list[str]]
    ms_draft: float
    ms_verify: float
    ms_rest: float
