"""The page in a real browser: what streams is shown and counted, by keyboard alone, on a phone, and in failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, Browser, Page
from page_server import TOKENS, PageServer, passes, running
from tiny_pair import TEMPLATE, save_pair

import specdec
from specdec.engine import Engine
from specdec.serve import create_app

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")

TEXT = "".join(TOKENS)
ANSWER = "[...document.querySelectorAll('.answer')].at(-1)"
DONE = "document.querySelector('.turn') && document.querySelector('#stop').hidden"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[PageServer, str]]:
    server = PageServer()
    with running(server.app) as url:
        yield server, url


def opened(browser: Browser, url: str, **options: Any) -> Page:
    page = browser.page(**options)
    page.goto(url)
    page.until("document.querySelector('#examples button')")
    return page


def ask(page: Page, prompt: str) -> None:
    page.run("document.getElementById('prompt').focus()")
    page.type(prompt)
    page.press("Enter")


def shown(page: Page, answer: str = ANSWER) -> list[list[list[str]]]:
    """Per pass, texts and origins, as they are marked."""
    script = "[...pass.children].map((token) => [token.textContent, token.className.split(' ')[1]])"
    found: list[list[list[str]]] = page.run(f"[...{answer}.querySelectorAll('.pass')].map((pass) => {script})")
    return found


def expected(draft: str) -> list[list[list[str]]]:
    return [[[text, origin] for text, origin in step] for step in passes(TOKENS, draft)]


def test_tokens_are_marked_and_counted(browser: Browser, served: tuple[PageServer, str]) -> None:
    server, url = served
    page = opened(browser, url)
    ask(page, "What is rain?")
    page.until(DONE)
    assert shown(page) == expected("ngram")
    figures = page.run(f"{ANSWER}.querySelector('.figures').textContent")
    steps = len(expected("ngram"))
    assert f"{len(TOKENS) / steps:.2f} tokens per pass" in figures
    assert f"{len(TOKENS)} tokens in {steps} passes" in figures
    assert page.run(f"{ANSWER}.querySelector('.bar').ariaLabel").count(",") == 2, "three origins"
    assert page.run(f"{ANSWER}.querySelector('.text').ariaBusy") == "false"
    styles = {
        origin: page.run(f"getComputedStyle({ANSWER}.querySelector('.{origin}')).textDecoration")
        for origin in ("drafted", "recovered", "bonus")
    }
    assert [word for style in styles.values() for word in ("solid", "wavy", "dotted") if word in style]
    assert len({style.split("rgb")[0] for style in styles.values()}) == 3, "told apart without colours"
    ask(page, "And then?")
    page.until(f"document.querySelectorAll('.turn').length === 2 && {DONE}")
    assert server.bodies[-1]["messages"] == [
        {"role": "user", "content": "What is rain?"},
        {"role": "assistant", "content": TEXT},
        {"role": "user", "content": "And then?"},
    ]
    assert page.complaints == []
    assert all(one.startswith(url) for one in page.requested), "nobody else is asked for anything"


def test_beside_no_drafts_with_settings(browser: Browser, served: tuple[PageServer, str]) -> None:
    server, url = served
    page = opened(browser, url)
    page.run("document.getElementById('compare').click(); document.getElementById('draft').value = 'self:int4'")
    for field, value in (("temperature", "0.7"), ("max-tokens", "40")):
        page.run(f"document.getElementById('{field}').value = '{value}'")
    page.run("document.querySelector('#examples button').click()")
    page.until("document.querySelector('.verdict')")
    ours, plain = sorted(server.bodies[-2:], key=lambda body: body["draft"] == "none")
    assert (ours["draft"], plain["draft"]) == ("self:int4", "none")
    assert {**ours, "draft": ""} == {**plain, "draft": ""}
    assert (ours["temperature"], ours["max_tokens"]) == (0.7, 40)
    assert isinstance(ours["seed"], int), "one seed for both"
    assert "Same text" in page.run("document.querySelector('.verdict').textContent")
    assert page.run("document.querySelectorAll('.answer')[1].querySelectorAll('.token:not(.plain)').length") == 0
    assert page.run("document.querySelectorAll('.note').length") == 2, "both are cut at 40 tokens"
    page.run("document.getElementById('draft').value = 'none'")
    page.run("document.getElementById('draft').dispatchEvent(new Event('change'))")
    assert page.run("document.getElementById('compare').disabled"), "nothing to compare"
    page.run("document.getElementById('temperature').value = '-1'")
    before = len(server.bodies)
    ask(page, "Again")
    page.until("document.querySelector('#settings').open")
    assert len(server.bodies) == before, "nothing is asked for with settings that are none"


def test_escape_stops_and_shift_enter_does_not_send(browser: Browser, served: tuple[PageServer, str]) -> None:
    server, url = served
    page, left = opened(browser, url), server.left
    for _ in range(20):  # by Tab alone to the message, and on
        page.press("Tab")
        if page.run("document.activeElement.id") == "prompt":
            break
    page.type("ha")
    page.press("Enter", shift=True)
    assert page.run("document.getElementById('prompt').value") == "ha\n"
    page.run("document.getElementById('prompt').value = ''")
    ask(page, "hang")
    page.until("document.querySelector('.pass')")
    assert not page.run("document.getElementById('stop').hidden")
    page.press("Escape")
    page.until(DONE)
    assert page.run(f"{ANSWER}.querySelector('.note').textContent") == "stopped"
    while server.left == left:  # the server has been told
        page.run("new Promise((told) => setTimeout(told, 10))")
    ask(page, "go on")
    page.until(f"document.querySelectorAll('.turn').length === 2 && {DONE}")
    assert server.bodies[-1]["messages"][1] == {"role": "assistant", "content": "".join(TOKENS[:3])}
    assert page.complaints == []


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("busy", "The server is busy"), ("break", "broke off"), ("fail", "NaN in its logits")],
)
def test_what_fails_is_said_in_words(browser: Browser, served: tuple[PageServer, str], prompt: str, said: str) -> None:
    page = opened(browser, served[1])
    served[0].seen.clear()
    ask(page, prompt)
    if prompt != "busy":
        page.until("document.querySelector('.pass')")
    served[0].seen.set()
    page.until(f"{DONE} && document.querySelector('.error')")
    assert said in page.run("document.querySelector('.error[role=alert]').textContent")
    assert page.run("document.getElementById('prompt').value") == ("busy" if prompt == "busy" else "")
    assert not page.run("document.getElementById('send').hidden")


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser) -> None:
    server = PageServer(key="sesame", chat_template=False)
    with running(server.app) as url:
        page = browser.page()
        page.goto(url)
        page.until("!document.getElementById('key-row').hidden")
        page.type("sesame")
        page.press("Enter")
        page.until("document.querySelector('#examples button') && document.getElementById('key-row').hidden")
        ask(page, "def read(")
        page.until(DONE)
        assert server.bodies[-1]["prompt"] == "def read(", "a model without a chat template goes on with texts"
        assert page.run(f"{ANSWER}.querySelector('.text').textContent") == TEXT
        assert page.run("localStorage.length") == 0
        assert page.run("document.cookie") == ""


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_sticks_out_of_a_phone(browser: Browser, served: tuple[PageServer, str], dark: bool) -> None:
    page = opened(browser, served[1], width=390, height=844, dark=dark)
    page.run("document.getElementById('compare').click()")
    ask(page, "x" * 300)
    page.until("document.querySelector('.verdict')")
    page.run("document.getElementById('settings').open = true")
    out = "[...document.body.querySelectorAll('*')].filter((one) => one.getBoundingClientRect().right > 390.5)"
    assert page.run(f"{out}.map((one) => one.outerHTML.slice(0, 80))") == []
    light = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(light) < 200) == dark


def test_on_a_real_server(browser: Browser, tmp_path: Path) -> None:
    """Bytes that are no characters yet, drafts of a model, stop at the end of text; the text is the library's own."""
    target, draft, tokenizer = specdec.load_pair(str(save_pair(tmp_path, TEMPLATE)))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)["input_ids"]
    engine = Engine(target, draft, k=3, drafters={"ngram": "ngram"}, adaptive=False, num_pages=64)
    with running(create_app(engine, tokenizer, "tiny")) as url:
        page = opened(browser, url)
        page.run("document.getElementById('compare').click(); document.getElementById('max-tokens').value = '48'")
        ask(page, "hi")
        page.until("document.querySelector('.verdict')")
        texts = page.run("[...document.querySelectorAll('.text')].map((one) => one.textContent)")
        origins = page.run("[...document.querySelector('.answer').querySelectorAll('.token')].map((t) => t.className)")
        told = page.run("document.querySelector('.verdict').textContent")
        assert page.complaints == []
    assert engine.pool.num_held_pages == 0
    spec = specdec.Speculator(target)
    wanted = spec.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)[0, len(ids) :]
    assert texts == [tokenizer.decode(wanted, skip_special_tokens=True)] * 2
    assert "Same text" in told
    assert {"token drafted", "token recovered"} <= set(origins)
