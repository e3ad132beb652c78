"""Tokens as they come, from threads and from asyncio; counts and latencies that add up."""

from __future__ import annotations

import asyncio
import threading

import pytest
from engine_cases import Ask, alone, asks, assert_clean, engine, submit

from specdec.engine import Engine

PROMPT = [5, 6, 7, 8]


def test_tokens_as_they_come_from_several_threads() -> None:
    crowd = asks(8, seed=13)
    got: dict[int, list[int]] = {}
    with engine() as served:

        def use(i: int) -> None:
            got[i] = list(submit(served, crowd[i]))

        threads = [threading.Thread(target=use, args=(i,)) for i in range(len(crowd))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == {i: alone(ask)[0] for i, ask in enumerate(crowd)}
    assert_clean(served)


def test_iterating_without_a_thread_takes_the_steps() -> None:
    served = engine()
    crowd = asks(4, seed=14)
    handles = [submit(served, ask) for ask in crowd]
    seen = []
    for token in handles[0]:
        seen.append(token)
        assert handles[0].token_ids[: len(seen)] == seen
    assert seen == alone(crowd[0])[0]
    with pytest.raises(TimeoutError):
        engine().submit(PROMPT, max_new_tokens=100, eos_token_id=None).result(timeout=0.0)
    served.close()
    assert all(handle.done for handle in handles)


@pytest.mark.parametrize("threaded", [True, False])
def test_asyncio(threaded: bool) -> None:
    crowd = asks(6, seed=15)

    async def one(served: Engine, ask: Ask) -> list[int]:
        return [token async for token in submit(served, ask)]

    async def whole(served: Engine, ask: Ask) -> list[int]:
        return (await submit(served, ask).wait()).token_ids

    async def everybody(served: Engine) -> list[list[int]]:
        return await asyncio.gather(*(one(served, ask) if i % 2 else whole(served, ask) for i, ask in enumerate(crowd)))

    async def main() -> list[list[int]]:
        if not threaded:
            return await everybody(engine())
        async with engine() as served:
            return await everybody(served)

    assert asyncio.run(main()) == [alone(ask)[0] for ask in crowd]


def test_metrics_add_up() -> None:
    served = engine()
    handles = [submit(served, ask) for ask in asks(12, seed=16)]
    served.run()
    metrics = served.metrics()
    results = [handle.result() for handle in handles]
    assert metrics.num_generation_tokens == sum(len(result.token_ids) for result in results)
    assert metrics.num_accepted_tokens == sum(result.num_accepted_tokens for result in results)
    assert metrics.num_draft_tokens == sum(result.num_draft_tokens for result in results)
    assert sum(metrics.num_accepted_tokens_per_pos) == metrics.num_accepted_tokens
    assert list(metrics.num_accepted_tokens_per_pos) == sorted(metrics.num_accepted_tokens_per_pos, reverse=True)
    assert metrics.num_prompt_tokens == sum(len(result.prompt_ids) for result in results)
    assert metrics.time_to_first_token.count == 12
    assert 0 < metrics.time_to_first_token.p50 <= metrics.time_to_first_token.p99
    assert metrics.inter_token_latency.count <= metrics.num_generation_tokens - 12
    assert metrics.to_dict()["num_drafts"] == metrics.num_drafts
