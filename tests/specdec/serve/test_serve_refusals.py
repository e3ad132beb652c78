"""What a server does not do, it says: a status, and why, in a body that clients understand."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process_server import InProcess, in_process

from specdec.kv import UnsupportedArgumentError
from specdec.serve import ServeOptions
from specdec.serve.choice import Choice, Piece

KEY = "a-key-that-nobody-may-see"


@pytest.fixture(scope="module")
def server(tiny_pair: Path) -> Iterator[InProcess]:
    with in_process(tiny_pair, ServeOptions(max_new_tokens=100, max_choices=4, max_prompt_tokens=60)) as made:
        yield made


def refused(found: Any, status: int, param: str | None = None, code: str | None = None) -> str:
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (param, code) in (
        (error["param"], error["code"]),
        (error["param"], None),
        (None, error["code"]),
        (None, None),
    )
    assert found.headers["x-request-id"]
    return str(error["message"])


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "no such field"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 101}, "max_tokens", "at most 100 new tokens"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"n": 5}, "n", "at most 4 texts"),
        ({"prompt": ["a", "b", "c"], "n": 2}, "n", "at most 4 texts"),
        ({"prompt": "x" * 61}, "prompt", "at most 60 tokens"),
        ({"prompt": "x" * 10_000}, "prompt", "10000 characters"),
        ({"prompt": [257]}, None, "expected ids in 0..256"),
        ({"prompt": []}, None, "prompt"),
        ({"stop": ["a", "b", "c", "d", "e"]}, None, "stop"),
        ({"stop": ""}, None, "stop"),
        ({"draft": "tea"}, "draft", "expected one of ['model', 'ngram', 'none']"),
        ({"logit_bias": {"257": 1}}, "logit_bias", "0..256"),
        ({"logit_bias": {"x": 1}}, None, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools", "tools are not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "only the response_format of type 'text'"),
        ({"echo": True}, "echo", "not echoed"),
        ({"best_of": 3}, "best_of", "ask for n texts"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "expected stream to be true"),
        ({"model": "gpt-9"}, "model", "expected 'tiny'"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"seed": "x"}, "seed", "integer"),
    ],
)
def test_fields_are_refused_by_name(server: InProcess, body: dict[str, Any], param: str | None, message: str) -> None:
    found = server.post("completions", **{"prompt": "x", **body})
    assert message in refused(found, 404 if "model" in body else 400, param)


@pytest.mark.parametrize(
    "body",
    [{"tools": []}, {"tool_choice": "auto"}, {"response_format": {"type": "text"}}, {"best_of": 1}, {"user": "me"},
     {"metadata": {"a": "b"}}, {"n": None, "stop": None, "temperature": None}, {"echo": False}, {"model": ""}],
)  # fmt: skip
def test_what_asks_for_nothing_is_taken(server: InProcess, body: dict[str, Any]) -> None:
    server.text(prompt="x", max_tokens=1, **body)


def test_a_model_without_a_template_has_no_chats(server: InProcess) -> None:
    found = server.post("chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert "use /v1/completions" in refused(found, 400, "messages", "no_chat_template")
    tool = server.post("chat/completions", messages=[{"role": "tool", "content": "5", "tool_call_id": "x"}])
    refused(tool, 400)


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"\xff", 400), (b"[" * 200_000, 400), (b'{"prompt": "x", "temperature": NaN}', 400), (b"", 400),
     (b'{"prompt": "\\ud800"}', 200), (b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}", 400)],
)  # fmt: skip
def test_bodies_that_are_no_requests(server: InProcess, body: bytes, status: int) -> None:
    found = server.request("POST", "/v1/completions", content=body, headers={"Content-Type": "application/json"})
    if status == 200:
        assert found.status_code in (200, 400)
    else:
        refused(found, status)


def test_addresses_methods_and_kinds(server: InProcess) -> None:
    refused(server.request("GET", "/v2/tea"), 404)
    assert "/openapi.json" in refused(server.request("POST", "/v1/embeddings", json={"input": "a"}), 404)
    refused(server.request("GET", "/v1/completions"), 405)
    assert "Content-Type" in refused(server.request("POST", "/v1/completions", content=b"{}"), 415)
    assert server.request("GET", "/health", headers={"X-Request-Id": "my-id.7"}).headers["x-request-id"] == "my-id.7"
    assert server.request("GET", "/health", headers={"X-Request-Id": "no good"}).headers["x-request-id"] != "no good"
    assert "access-control-allow-origin" not in server.request("GET", "/health", headers={"Origin": "http://a"}).headers


def test_names_it_may_be_asked_by(server: InProcess, tiny_pair: Path) -> None:
    """DNS rebinding: a page's own name that resolves to this machine."""

    def ask(at: InProcess, host: str) -> Any:
        return at.request("GET", "/health", headers={"Host": host})

    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:80", "[::1]", "[::1]:8000"):
        assert ask(server, host).status_code == 200
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.", ""):
        assert "--allowed-host" in refused(ask(server, host), 421, None, "unknown_host")
    proxied = InProcess(tiny_pair, ServeOptions(host="127.0.0.3", allowed_hosts=("Proxy.example",)))
    refused(ask(proxied, "127.0.0.3"), 503, None, "engine_stopped")
    refused(ask(proxied, "proxy.example:443"), 503, None, "engine_stopped")
    refused(ask(proxied, "evil.example"), 421, None, "unknown_host")
    everybody = InProcess(tiny_pair, ServeOptions(host="0.0.0.0"))
    refused(ask(everybody, "any.example"), 503, None, "engine_stopped")
    for made in (proxied, everybody):
        made.engine.close()


def test_sizes_and_times(tiny_pair: Path) -> None:
    options = ServeOptions(max_body_bytes=200, body_seconds=0.05, request_seconds=1e-9, cors_origins=("http://a",))

    async def body() -> AsyncIterator[bytes]:
        yield b'{"prompt": "' + b"x" * 100
        yield b"x" * 150

    kind = {"Content-Type": "application/json"}
    with in_process(tiny_pair, options) as made:
        refused(made.post("completions", prompt="x" * 200), 413, None, "body_too_large")
        refused(made.request("POST", "/v1/completions", content=body(), headers=kind), 413, None, "body_too_large")
        for stream in (False, True):
            found = made.post("completions", prompt="x", stream=stream)
            assert "ask for fewer tokens" in refused(found, 408, None, "request_timeout")
        allowed = made.request("GET", "/health", headers={"Origin": "http://a"})
        assert allowed.headers["access-control-allow-origin"] == "http://a"
    slow = ServeOptions(body_seconds=0.05)

    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    with in_process(tiny_pair, slow) as made:
        found = made.request("POST", "/v1/completions", content=endless(), headers=kind)
        refused(found, 408, None, "body_timeout")


def test_crowds(tiny_pair: Path) -> None:
    made = InProcess(tiny_pair, ServeOptions(max_concurrent=0))
    found = made.post("completions", prompt="x")
    refused(found, 429, None, "too_many_requests")
    assert found.headers["retry-after"]
    made = InProcess(tiny_pair, max_waiting=1)
    made.engine.submit([5, 6], max_new_tokens=2)  # no thread takes steps: it waits
    refused(made.post("completions", prompt="x"), 503, None, "queue_full")
    refused(made.request("GET", "/health"), 503, None, "engine_stopped")
    made.engine.close()
    refused(made.post("completions", prompt="x"), 503, None, "shutting_down")


def test_a_server_that_ends_takes_nothing_new(tiny_pair: Path) -> None:
    with in_process(tiny_pair) as made:
        made.app.state.lifecycle.drain()
        refused(made.post("completions", prompt="x"), 503, None, "shutting_down")
        refused(made.request("GET", "/health"), 503, None, "shutting_down")
        assert made.app.state.lifecycle.drained()


def test_streams_that_outlast_the_end_are_told(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_process(tiny_pair, ServeOptions(drain_seconds=0.0)) as made:
        lifecycle, ready = made.app.state.lifecycle, Choice.ready

        def interrupted(choice: Choice) -> list[Piece]:
            pieces = ready(choice)
            lifecycle.drain()
            lifecycle.drained()
            return pieces

        monkeypatch.setattr(Choice, "ready", interrupted)
        events = made.events(prompt="x", max_tokens=400, ignore_eos=True)
        assert events[0]["choices"][0]["finish_reason"] is None
        assert events[-1]["error"]["code"] == "shutting_down"


def test_a_client_that_takes_nothing_is_let_go(tiny_pair: Path) -> None:
    async def ask(app: Any) -> None:
        body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 400, "ignore_eos": True}).encode()
        messages = iter([{"type": "http.request", "body": body}])
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1",
            "headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0"}, "scheme": "http",
        }  # fmt: skip

        async def receive() -> Any:
            for message in messages:
                return message
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            await asyncio.Event().wait()

        await app(scope, receive, send)

    with in_process(tiny_pair, ServeOptions(write_seconds=0.05)) as made:
        asyncio.run(ask(made.app))
        assert made.app.state.lifecycle.num_active == 0
        assert "specdec:client_disconnects_total 1.0" in made.request("GET", "/metrics").text


def test_what_fails_inside_says_nothing_of_it(
    tiny_pair: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(choice: Choice) -> list[Piece]:
        raise RuntimeError("the inside")

    monkeypatch.setattr(Choice, "ready", broken)
    with in_process(tiny_pair) as made, caplog.at_level(logging.ERROR, "specdec.serve"):
        for more in ({}, {"stream": True}, {"n": 2}):
            found = made.post("completions", prompt="x", **more)
            assert "the inside" not in refused(found, 500, None, "internal_error")
    assert "the inside" in caplog.text


def test_keys(tiny_pair: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"another\n\n  {KEY}  \n")
    with in_process(tiny_pair, ServeOptions(api_key_file=keys)) as made, caplog.at_level(logging.DEBUG):
        for header in ("", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer ", "Bearer \xe9"):
            for method, path in (("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/v1/models")):
                found = made.request(method, path, headers={b"Authorization": header.encode("latin-1")})
                refused(found, 401, None, "invalid_api_key")
        assert made.request("GET", "/health").status_code == 200
        for key in (KEY, "another"):
            given = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
            found = made.request("POST", "/v1/completions", headers=given, content=json.dumps({"prompt": "x"}))
            assert found.status_code == 200
    assert KEY not in caplog.text
    assert KEY not in "".join(capfd.readouterr())
    keys.write_text("\n")
    with pytest.raises(UnsupportedArgumentError, match="holds none"):
        InProcess(tiny_pair, ServeOptions(api_key_file=keys))
