"""The page at `/`: a chat and live numbers, one file that asks nobody else for anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.browser import CHROMIUM, Browser
from helpers.fake_engine import FakeEngine
from helpers.served import THINKS, Served, serving, tokenizer

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture
def server() -> Iterator[Served]:
    with serving(FakeEngine(tokenizer(THINKS), step=0.003, pages=20)) as served:
        yield served


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def ask(browser: Browser, text: str) -> None:
    """Type a message and send it."""
    browser.value(f"document.getElementById('text').value = {text!r}; document.getElementById('send').click()")


def texts(browser: Browser, kind: str) -> list[str]:
    """The texts of all boxes of a kind."""
    return browser.value(f"[...document.querySelectorAll('article.{kind}')].map(one => one.lastChild.textContent)")


def test_the_page_is_one_file_that_names_no_other_host(server: Served) -> None:
    response = server.http.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert not re.search(r"https?:|//\w+\.|<link(?! rel=\"icon\" href=\"data:)|@import|\bsrc=", response.text)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy


def test_its_numbers_are_there_for_programs(server: Served) -> None:
    server.complete(prompt=[4] * 130, max_tokens=3)
    server.complete(prompt=[4] * 130, max_tokens=3)
    found = server.http.get("/stats").json()
    assert (found["model"], found["healthy"], found["chat"]) == ("tiny-lm", True, True)
    assert (found["prompt_tokens"], found["cached_tokens"], found["generated_tokens"]) == (260, 128, 6)
    assert found["pages_used"] + found["pages_free"] == 20


@needs_chromium
def test_a_chat_streams_and_numbers_move(server: Served, browser: Browser) -> None:
    browser.requests.clear()
    sly = "It is <b>text</b> <img src=x onerror=alert(1)> \U0001f642"
    server.engine.say("<think>Hm.</think>" + sly, "And more.")
    browser.open(server.url + "/")
    ask(browser, "What is it?")
    assert browser.until("document.querySelectorAll('article.assistant[data-done]').length === 1")
    assert texts(browser, "user") == ["What is it?"] and texts(browser, "assistant") == [sly]
    assert browser.value("document.querySelector('details span').textContent") == "Hm."
    assert browser.value("document.querySelectorAll('article img, article b').length") == 0
    ask(browser, "Go on")
    assert browser.until("document.querySelectorAll('article.assistant[data-done]').length === 2")
    prompt = server.engine.tokenizer.decode(server.engine.asked[-1][0])
    assert prompt == f"<|endoftext|>[user]What is it? [assistant]{sly} [user]Go on[assistant]"
    assert browser.until("/^[0-9.]+$/.test(document.getElementById('rate').textContent)")
    assert browser.value("document.getElementById('pages').textContent") == "0 %"
    assert browser.value("document.title") == "tiny-lm - Tersor"
    assert browser.requests and all(one.startswith((server.url, "data:")) for one in browser.requests)
    assert not browser.problems


@needs_chromium
def test_stopping_an_answer_frees_it_and_errors_are_shown(server: Served, browser: Browser) -> None:
    server.engine.step = 0.02
    browser.open(server.url + "/")
    ask(browser, "Never ends")
    assert browser.until("document.querySelector('article.assistant span')?.textContent.length > 10")
    assert browser.until("document.getElementById('running').textContent === '1'")
    assert browser.value("document.getElementById('pages').textContent") == "5 %"
    browser.value("document.getElementById('send').click()")
    assert server.idle()
    server.loop.call_soon_threadsafe(server.engine.fail, "gone")
    assert browser.until("document.getElementById('send').textContent === 'Send'")
    ask(browser, "Still there?")
    assert browser.until("document.querySelectorAll('article.error').length === 1")
    assert "the engine has failed" in texts(browser, "error")[0]
    assert browser.until("document.getElementById('model').textContent.includes('failed')")


@needs_chromium
def test_a_page_without_the_key_asks_for_it(browser: Browser, tmp_path: Path) -> None:
    with serving(FakeEngine(tokenizer()), api_key="sesame") as server:
        browser.open(server.url + "/")
        assert browser.until("!document.getElementById('key').hidden")
        browser.value(
            "key = document.getElementById('key'); key.value = 'sesame'; key.dispatchEvent(new Event('change'))"
        )
        server.engine.say("Welcome.")
        ask(browser, "Hello")
        assert browser.until("document.querySelectorAll('article.assistant[data-done]').length === 1")
        assert texts(browser, "assistant") == ["Welcome."]
