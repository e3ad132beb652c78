"""The clients people have, against a real server: openai, LangChain, llm, curl, Prometheus."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer
from prometheus_client.parser import text_string_to_metric_families
from tiny_pair import TEMPLATE, save_pair

openai = pytest.importorskip("openai")

KEY = "the-key"
CHAT: list[Any] = [{"role": "user", "content": "hi"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder: Path = save_pair(tmp_path_factory.mktemp("chat-pair"), TEMPLATE)
    keys = folder / "keys"
    keys.write_text(KEY)
    with LiveServer(folder, "--api-key-file", str(keys), "--model-name", "tiny") as made:
        yield made


@pytest.fixture
def client(server: LiveServer) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_what_it_says_at_its_start(server: LiveServer) -> None:
    assert server.greeting[0].startswith(f"tiny at http://127.0.0.1:{server.port}/v1 (")
    assert server.greeting[1].startswith("drafted for by model")
    assert re.search("curl .*/v1/chat/completions", server.greeting[2])
    assert KEY not in "".join(server.greeting)


def test_openai(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    chat = client.chat.completions.create(model="tiny", messages=CHAT, n=2, **GREEDY)
    assert [choice.index for choice in chat.choices] == [0, 1]
    assert chat.usage.completion_tokens > 0
    text = client.completions.create(model="tiny", prompt="hi", logprobs=1, **GREEDY)
    assert len(text.choices[0].logprobs.tokens) == text.usage.completion_tokens
    raw = client.completions.with_raw_response.create(model="tiny", prompt="hi", extra_headers={"X-Request-Id": "mine"})
    assert raw.headers["x-request-id"] == "mine"
    extra = {"top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0, "draft": "none"}
    same = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=24, extra_body=extra)
    assert same.choices[0].message.content == chat.choices[0].message.content


def test_openai_streams(client: Any) -> None:
    whole = client.chat.completions.create(model="tiny", messages=CHAT, **GREEDY).choices[0].message.content
    stream = client.chat.completions.create(
        model="tiny", messages=CHAT, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert last.usage.total_tokens > 0
    with client.chat.completions.create(model="tiny", messages=CHAT, stream=True, max_tokens=400) as left:
        next(iter(left))


def test_openai_async(server: LiveServer, client: Any) -> None:
    whole = client.chat.completions.create(model="tiny", messages=CHAT, **GREEDY).choices[0].message.content

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0) as own:
            one = await own.chat.completions.create(model="tiny", messages=CHAT, **GREEDY)
            stream = await own.chat.completions.create(model="tiny", messages=CHAT, stream=True, **GREEDY)
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return [one.choices[0].message.content, "".join(parts)]

    assert asyncio.run(ask()) == [whole, whole]


def test_errors_reach_openais_client_as_its_own(server: LiveServer, client: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="tools are not supported") as refused:
        client.chat.completions.create(model="tiny", messages=CHAT, tools=[tool])
    assert refused.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(model="tiny", messages=CHAT, response_format={"type": "json_object"})
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt-9", messages=CHAT)
    with (
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="valid key"),
    ):
        stranger.models.list()


def test_langchain(server: LiveServer, client: Any) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        base_url=f"{server.address}/v1", api_key=KEY, model="tiny", temperature=0, max_tokens=24, max_retries=0
    )
    whole = client.chat.completions.create(model="tiny", messages=CHAT, **GREEDY).choices[0].message.content
    answer = model.invoke("hi")
    assert answer.content == whole
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(str(chunk.content) for chunk in model.stream("hi")) == whole
    with pytest.raises(openai.BadRequestError, match="tools are not supported"):
        model.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke("hi")
    model.root_client.close()

    async def ask() -> Any:
        answered = await model.ainvoke("hi")
        await model.root_async_client.close()  # or its sockets outlive their loop
        return answered.content

    assert asyncio.run(ask()) == whole


@pytest.mark.skipif(importlib.util.find_spec("llm") is None, reason="needs llm")
def test_llm(server: LiveServer, tmp_path: Path, client: Any) -> None:
    """Its models are named in a file of its own."""
    model = {"model_id": "tiny", "model_name": "tiny", "api_base": f"{server.address}/v1", "api_key_name": "specdec"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    (tmp_path / "keys.json").write_text(json.dumps({"specdec": KEY}))
    code = (
        "import llm; model = llm.get_model('tiny'); "
        "print(repr(model.prompt('hi', temperature=0, max_tokens=24, stream=False).text()))"
    )
    own = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own, check=True)
    whole = client.chat.completions.create(model="tiny", messages=CHAT, **GREEDY).choices[0].message.content
    assert done.stdout.strip() == repr(whole)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server: LiveServer) -> None:
    body = json.dumps({"model": "tiny", "messages": CHAT, "stream": True, **GREEDY})
    command = [
        "curl",
        "-sN",
        f"{server.address}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    stranger = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(stranger.stdout)["error"]["code"] == "invalid_api_key"
    done = subprocess.run([*command, "-H", f"Authorization: Bearer {KEY}"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith('data: {"id":"chatcmpl-')
    assert done.stdout.endswith("data: [DONE]\n\n")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_prometheus(server: LiveServer) -> None:
    command = ["curl", "-s", f"{server.address}/metrics", "-H", f"Authorization: Bearer {KEY}"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {"vllm:num_requests_running", "vllm:spec_decode_num_accepted_tokens_per_pos", "vllm:request_success",
            "vllm:generation_tokens", "vllm:kv_cache_usage_perc", "http_requests"} <= set(families)  # fmt: skip
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
        family = families[f"vllm:{name}_seconds"]
        counts = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
        assert family.type == "histogram"
        assert counts == sorted(counts)
        (count,) = [sample.value for sample in family.samples if sample.name.endswith("_count")]
        assert counts[-1] == count > 0
    positions = families["vllm:spec_decode_num_accepted_tokens_per_pos"].samples
    assert [sample.labels["position"] for sample in positions] == [str(i) for i in range(len(positions))]
    accepted = families["vllm:spec_decode_num_accepted_tokens"].samples[0].value
    assert sum(sample.value for sample in positions) == accepted > 0
