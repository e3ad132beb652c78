"""Five hundred requests in random order, at random times, with cancellations, on too few pages: all as alone."""

from __future__ import annotations

import pytest
from engine_cases import asks, check_life, engine, random_life


@pytest.mark.slow
def test_five_hundred_requests() -> None:
    served = engine(num_pages=24, page_size=4, max_rows=8)
    life = random_life(served, asks(500, seed=5, shared=12), seed=6, cancel=0.05)
    assert sum(cancelled for _, _, cancelled in life) > 10
    check_life(served, life)
    assert served.metrics().num_preemptions > 50
    assert served.metrics().num_prefix_hit_tokens > 500
