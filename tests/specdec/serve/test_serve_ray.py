"""Two replicas on a local Ray: one answers while the other dies, and whoever it served is told so."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of ray: it leaves sockets to the collector
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # one machine: then Ray's processes meet on the loopback device
ray = pytest.importorskip("ray")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
PATIENCE = 300
"""Seconds after which something is believed never to come."""
LONG = 1800
"""Tokens of a stream that is still under way when its replica dies."""


def awaited(what: Callable[[], Any]) -> Any:
    """What it gives, as soon as that is anything."""
    end = monotonic() + PATIENCE
    while not (found := what()):
        assert monotonic() < end, "never came"
        sleep(0.1)
    return found


def offspring() -> set[int]:
    """Processes that come from this one, as far as they are still its own."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of Ray's proxy, with two replicas behind it."""
    from ray import serve

    from specdec.serve.ray import app

    before, folder = offspring(), tempfile.mkdtemp(prefix="r", dir="/tmp")  # a socket's path must be short
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False,
        _node_ip_address="127.0.0.1", _temp_dir=folder,
    )  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app({"pair": "stdlib-python", "model_name": "std", "min_replicas": 2, "kv_mib": 32, "num_cpus": 0.5}))
        found = f"http://127.0.0.1:{port}"
        awaited(lambda: len(replicas()) == 2 and len({who(found, str(i)) for i in range(40)}) == 2)
        yield found
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    awaited(lambda: offspring() <= before)


def replicas() -> dict[str, Any]:
    """Actors by the names that answers carry."""
    names = ray.util.list_named_actors(all_namespaces=True)
    found = [name["name"] for name in names if name["name"].startswith("SERVE_REPLICA::")]
    return {name.rpartition("#")[2]: name for name in found}


def who(address: str, session: str) -> str:
    """The replica that answers a session."""
    return str(httpx.get(f"{address}/health", headers={"x-session-id": session}).headers["x-specdec-replica"])


def client(address: str, session: str) -> Any:
    return openai.OpenAI(
        base_url=f"{address}/v1", api_key="none", timeout=PATIENCE, default_headers={"x-session-id": session}
    )


def stream(address: str, session: str, tokens: int) -> Any:
    return client(address, session).completions.create(
        model="std", prompt="def main(argv):\n", max_tokens=tokens, temperature=0, stream=True, seed=1,
        extra_body={"ignore_eos": True},
    )  # fmt: skip


def test_a_stream_is_the_text_of_the_engine(address: str) -> None:
    import specdec

    target, draft, tokenizer = specdec.load_pair("stdlib-python", device="cpu")
    ids = tokenizer("def main(argv):\n", return_tensors="pt").input_ids
    wanted = specdec.Speculator(target, draft, k=4).generate(ids, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(wanted[0, ids.shape[1] :])
    for session in ("a", "b", "c"):
        chunks = list(stream(address, session, 40))
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
        assert chunks[-1].choices[0].finish_reason == "length"


def test_a_session_stays_with_its_replica(address: str) -> None:
    found = {session: {who(address, session) for _ in range(5)} for session in map(str, range(20))}
    assert all(len(answered) == 1 for answered in found.values())
    assert len(set().union(*found.values())) == 2


def test_one_dies_and_the_other_answers(address: str) -> None:
    sessions = {who(address, session): session for session in map(str, range(40))}
    (dying, lost), (_, kept) = sorted(sessions.items())
    broken, whole = stream(address, lost, LONG), stream(address, kept, 200)
    first = next(iter(broken)).choices[0].text
    ray.kill(ray.get_actor(replicas()[dying], namespace="serve"))
    seen = [first]
    with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):  # without an error it would be cut in silence
        seen += [chunk.choices[0].text for chunk in broken]
    assert len(seen) < LONG
    chunks = list(whole)
    assert chunks[-1].choices[0].finish_reason == "length"
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text.startswith(first)

    def answered() -> str:
        try:
            return "".join(chunk.choices[0].text for chunk in stream(address, lost, 200))
        except openai.APIError:
            return ""  # Ray has not noticed yet

    assert awaited(answered) == text
