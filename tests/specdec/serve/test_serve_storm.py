"""A server in a storm: every text is right, nothing is held afterwards, and SIGTERM lets streams end.

The whole storm, and others:
    STORM_STREAMS=1000 STORM_SEED=7 python -m pytest -q -s tests/specdec/serve/test_serve_storm.py
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from pathlib import Path

import pytest
from live_server import Connection, LiveServer
from serving_storm import Ask, Oracle, ServingStorm

STREAMS = int(os.environ.get("STORM_STREAMS", "60"))
SEED = int(os.environ.get("STORM_SEED", "1"))
QUEUE = "vllm:request_queue_time_seconds"
MOST_MIB = 64
"""What a second storm, of the same requests, may add to a server's memory."""


@pytest.fixture(scope="module")
def oracle(tiny_pair: Path) -> Oracle:
    return Oracle(tiny_pair)


def idle(server: LiveServer) -> dict[str, float]:
    """Its metrics, as soon as it does nothing."""
    while True:
        found = server.metrics()
        if not found["vllm:num_requests_running"] and not found["vllm:num_requests_waiting"]:
            return found
        time.sleep(0.05)


def p99(metrics: dict[str, float]) -> str:
    """The bound of the bucket it lies in."""
    count = metrics[f"{QUEUE}_count"]
    buckets = [(name, value) for name, value in metrics.items() if name.startswith(f"{QUEUE}_bucket")]
    return next(re.findall(r'le="(.*?)"', name)[0] for name, value in buckets if value >= 0.99 * count)


@pytest.mark.timeout(max(120, STREAMS))
def test_a_storm_leaves_no_trace_and_sigterm_lets_streams_end(tiny_pair: Path, oracle: Oracle) -> None:
    many = str(2 * STREAMS + 16)
    with LiveServer(tiny_pair, "--max-concurrent", many, "--max-waiting", many) as server:
        memory = []
        for seed in (SEED, SEED):  # the second one finds what the first one has left
            storm = ServingStorm(server, oracle, seed, STREAMS)
            storm.run()
            found = idle(server)
            assert found["vllm:kv_cache_usage_perc"] == 0, "pages are held"
            memory.append(server.resident_mib)
        statuses = {name: value for name, value in found.items() if name.startswith("http_requests")}
        print(
            f"\ntwice {STREAMS} clients {dict(storm.ends)}: {statuses}, ended by {ends(found)}, left early "
            f"{found['specdec:client_disconnects_total']:.0f}; 99 % waited {p99(found)} s at most; MiB {memory}"
        )
        assert memory[1] - memory[0] < MOST_MIB
        assert not [name for name in statuses if 'status="5' in name]
        assert found["specdec:client_disconnects_total"] > 0
        asyncio.run(drained(server, oracle))
        code, errors = server.end()
    assert (code, errors) == (0, "")


def ends(metrics: dict[str, float]) -> dict[str, int]:
    return {
        re.findall(r'reason="(\w+)"', name)[0]: int(value)
        for name, value in metrics.items()
        if name.startswith("vllm:request_success_total")
    }


async def drained(server: LiveServer, oracle: Oracle) -> None:
    """Streams under way when the signal comes end as they would have; who comes later is told."""
    asks = [Ask(f"long {i}", 300, None, "model") for i in range(6)]
    bodies = [{**ask.body, "stream": True, "ignore_eos": True} for ask in asks]
    open_ones = [await Connection.post(server.port, "/v1/completions", body) for body in bodies]
    assert [await one.begun() for one in open_ones] == [200] * len(asks)
    server.process.send_signal(signal.SIGTERM)
    status, told = 200, {}
    while status == 200:  # the signal is not there yet
        late = await Connection.post(server.port, "/v1/completions", asks[0].body)
        status, told = await late.begun(), await late.whole()
        await late.close()
    assert (status, told["error"]["code"]) == (503, "shutting_down")
    for one in open_ones:
        last = [event async for event in one.events()][-1]
        assert last["choices"][0]["finish_reason"] == "length"
        await one.close()


def test_the_storm_sees_wrong_texts(tiny_pair: Path) -> None:
    """Negative control: an oracle of another seed."""
    one, other = (Oracle(tiny_pair) for _ in range(2))
    ask = Ask("abc", 12, 5, "model")
    other._known[ask, 0] = one.text(Ask("abc", 12, 6, "model"))
    assert other.text(ask) != one.text(ask)
