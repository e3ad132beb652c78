"""OpenAI's API: what the fields mean, against the models themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_server import InProcess, in_process
from tiny_pair import TEMPLATE, save_pair
from transformers import LogitsProcessorList

from specdec import Speculator
from specdec.serve.processors import CountPenalties

PROMPT = "hello 日本"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 30}
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    folder: Path = save_pair(tmp_path_factory.mktemp("chat-pair"), TEMPLATE)
    with in_process(folder) as made:
        yield made


def directly(server: InProcess, text: str, **options: Any) -> list[int]:
    """Token ids, by plain `generate`."""
    ids = server.tokenizer(text, return_tensors="pt").input_ids
    target: Any = server.engine.target
    out = target.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    made: list[int] = out[0, ids.shape[1] :].tolist()
    return made


def read(server: InProcess, ids: list[int]) -> str:
    return str(server.tokenizer.decode(ids, skip_special_tokens=True))


def test_a_completion_is_the_targets_text(server: InProcess) -> None:
    found = server.text(prompt=PROMPT, **GREEDY)
    ids = directly(server, PROMPT, max_new_tokens=30, do_sample=False)
    assert found["choices"][0]["text"] == read(server, ids)
    assert (found["object"], found["model"]) == ("text_completion", "tiny")
    prompt = len(server.tokenizer(PROMPT).input_ids)
    counts = {name: found["usage"][f"{name}_tokens"] for name in ("prompt", "completion", "total")}
    assert counts == {"prompt": prompt, "completion": len(ids), "total": prompt + len(ids)}
    assert found["usage"]["specdec"]["accepted_tokens"] > 0


@pytest.mark.parametrize("draft", ["model", "ngram", "none"])
def test_a_seed_makes_a_text_and_the_default_temperature_is_one(server: InProcess, draft: str) -> None:
    found = server.text(prompt=PROMPT, max_tokens=20, seed=5, n=2, draft=draft)
    speculator = {
        "model": Speculator(server.engine.target, server.engine._stepping.drafters["model"].inner.model, k=4),  # type: ignore[union-attr]
        "ngram": Speculator(server.engine.target, "ngram"),
        "none": Speculator(server.engine.target, None),
    }[draft]
    ids = server.tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = []
    for seed in (5, 6):
        out: Any = speculator.generate(ids, max_new_tokens=20, do_sample=True, temperature=1.0, top_k=0, seed=seed)
        expected.append(read(server, out[0, ids.shape[1] :].tolist()))
    assert [choice["text"] for choice in found["choices"]] == expected
    assert expected[0] != expected[1]


def test_a_chat_is_asked_in_the_models_template(server: InProcess) -> None:
    prompt = "system:be brief\nuser:hi\nbot:"
    found = server.text("chat/completions", messages=CHAT, **GREEDY)
    expected = read(server, directly(server, prompt, max_new_tokens=30, do_sample=False))
    assert found["choices"][0]["message"] == {"role": "assistant", "content": expected, "refusal": None}
    parts = [{"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
             CHAT[1]]  # fmt: skip
    same = server.text("chat/completions", messages=parts, temperature=0, max_completion_tokens=30)
    assert same["choices"] == found["choices"]
    assert found["usage"]["prompt_tokens"] == len(server.tokenizer(prompt).input_ids)


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_joins_to_the_whole(server: InProcess, chat: bool) -> None:
    path, body = ("chat/completions", {"messages": CHAT}) if chat else ("completions", {"prompt": PROMPT})
    body |= {**GREEDY, "max_tokens": 40, "n": 2, "logprobs": True if chat else 1}
    whole = server.text(path, **body)
    *chunks, last = server.events(path, **body, stream_options={"include_usage": True, "specdec": True})
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        mine = [chunk for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        entries = [chunk["choices"][0] for chunk in mine]
        texts = [entry["delta"].get("content", "") if chat else entry["text"] for entry in entries]
        assert "".join(texts) == (choice["message"]["content"] if chat else choice["text"])
        assert [entry["finish_reason"] for entry in entries] == [None] * (len(entries) - 1) + [choice["finish_reason"]]
        assert not chat or [entry["delta"].get("role") for entry in entries][:2] == ["assistant", None]
        tokens = [token for chunk in mine for token in chunk["specdec"]["tokens"]]
        assert "".join(token["text"] for token in tokens) == "".join(texts)
        assert {token["origin"] for token in tokens} >= {"drafted", "recovered"}
        assert [chunk["specdec"]["step"] for chunk in mine] == list(range(len(mine)))
        field = "content" if chat else "tokens"
        told = [one for entry in entries if entry["logprobs"] for one in entry["logprobs"][field]]
        assert told == choice["logprobs"][field]
        assert len(told) == len(tokens) > len(mine), "several tokens a step"


def test_logprobs_are_the_models(server: InProcess) -> None:
    found = server.text(prompt=PROMPT, temperature=0.5, seed=3, max_tokens=8, logprobs=2, presence_penalty=1.0)
    told = found["choices"][0]["logprobs"]
    chat = server.text("chat/completions", messages=CHAT, seed=3, max_tokens=8, logprobs=True, top_logprobs=2)
    content = chat["choices"][0]["logprobs"]["content"]
    prompts = [PROMPT, "system:be brief\nuser:hi\nbot:"]
    for prompt, tokens, logprobs in (
        (prompts[0], told["tokens"], told["token_logprobs"]),
        (prompts[1], [one["token"] for one in content], [one["logprob"] for one in content]),
    ):
        given = server.tokenizer(prompt).input_ids
        known = {server.tokenizer.decode([i]): i for i in range(len(server.tokenizer))}
        if len({*tokens} & {"\ufffd"}):
            continue  # several tokens read so
        ids = torch.tensor([given + [known[token] for token in tokens]])
        law = server.engine.target(ids).logits[0].float().log_softmax(-1)
        expected = [law[len(given) - 1 + i, ids[0, len(given) + i]].item() for i in range(len(tokens))]
        assert logprobs == pytest.approx(expected, abs=1e-4)
    assert [len(one["top_logprobs"]) for one in content] == [2] * 8
    assert all(bytes(one["bytes"]).decode(errors="replace") == one["token"] for one in content)
    assert all(len(one) <= 2 and max(one.values()) >= mine - 1e-5
               for one, mine in zip(told["top_logprobs"], told["token_logprobs"], strict=True))  # fmt: skip
    assert told["text_offset"][0] == 0


def test_stop_strings_cut_the_text_and_end_the_request(server: InProcess) -> None:
    whole = server.text(prompt=PROMPT, **GREEDY)["choices"][0]["text"]
    place = next(i for i in range(4, len(whole)) if "\ufffd" not in whole[i : i + 2])
    stop = whole[place : place + 2]
    for stops in (stop, ["never", stop]):
        found = server.text(prompt=PROMPT, **GREEDY, stop=stops)
        assert found["choices"][0]["text"] == whole[: whole.index(stop)]
        assert found["choices"][0]["finish_reason"] == "stop"
        assert found["usage"]["completion_tokens"] < 30
        events = server.events(prompt=PROMPT, **GREEDY, stop=stops, stream_options={"specdec": True})
        assert "".join(event["choices"][0]["text"] for event in events) == whole[: whole.index(stop)]
        tokens = [token["text"] for event in events for token in event["specdec"]["tokens"]]
        assert "".join(tokens) == whole[: whole.index(stop)]


def test_penalties_and_biases_reach_the_law(server: InProcess) -> None:
    given = len(server.tokenizer(PROMPT).input_ids)
    own = LogitsProcessorList([CountPenalties(given, 1.5, 0.5)])
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"presence_penalty": 1.5, "frequency_penalty": 0.5}, {"logits_processor": own}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    ]
    for body, options in cases:
        found = server.text(prompt=PROMPT, **GREEDY, **body)["choices"][0]["text"]
        expected = read(server, directly(server, PROMPT, max_new_tokens=30, do_sample=False, **options))
        assert found == expected
        assert found != server.text(prompt=PROMPT, **GREEDY)["choices"][0]["text"]
    token = server.tokenizer("x").input_ids[0]
    biased = server.text(prompt=PROMPT, seed=1, max_tokens=5, logit_bias={str(token): 100})
    assert biased["choices"][0]["text"] == "xxxxx"


def test_cold_and_cut_laws_are_greedy(server: InProcess) -> None:
    greedy = server.text(prompt=PROMPT, **GREEDY)["choices"][0]["text"]
    laws: list[dict[str, Any]] = [{"temperature": 1e-9}, {"top_k": 1}, {"top_p": 0}, {"min_p": 1}]
    for law in laws:
        assert server.text(prompt=PROMPT, max_tokens=30, **law)["choices"][0]["text"] == greedy


def test_several_prompts_of_text_and_tokens(server: InProcess) -> None:
    ids = [server.tokenizer(text).input_ids for text in ("one", "other")]
    texts = server.text(prompt=["one", "other"], **GREEDY, n=2)
    assert [choice["index"] for choice in texts["choices"]] == [0, 1, 2, 3]
    assert texts["choices"][0]["text"] == texts["choices"][1]["text"] != texts["choices"][2]["text"]
    again = server.text(prompt=ids, **GREEDY, n=2)
    assert again["choices"] == texts["choices"]
    assert server.text(prompt=ids[0], **GREEDY)["choices"][0] == texts["choices"][0]
    assert texts["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert server.text(prompt="", **GREEDY)["usage"]["prompt_tokens"] == 1


def test_limits_have_openais_defaults(server: InProcess) -> None:
    assert server.text(prompt=PROMPT, seed=1, ignore_eos=True)["usage"]["completion_tokens"] == 16
    room = 512 - len(server.tokenizer("system:be brief\nuser:hi\nbot:").input_ids)
    found = server.text("chat/completions", messages=CHAT, seed=1, ignore_eos=True)
    assert found["usage"]["completion_tokens"] == room


def test_who_is_there(server: InProcess) -> None:
    (model,) = server.request("GET", "/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 512)
    info = server.request("GET", "/specdec/info").json()
    assert info["drafters"] == ["model", "ngram", "none"]
    assert info["chat_template"] is True
    assert server.request("GET", "/health").json() == {"status": "ok"}
