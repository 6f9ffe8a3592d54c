"""A server under load, and at its end: clients that vanish, queues that are full, engines that fail, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from helpers.fake_engine import PAGE, FakeEngine
from helpers.served import Served, serving, tokenizer

from tersor.errors import InputError, TersorError
from tersor.server.options import ServerOptions
from tersor.server.serving import bind

COMPLETE = "/v1/completions"
LONG = {"prompt": "Hello", "max_tokens": 400}
PROGRAM = """
from types import SimpleNamespace
from helpers.fake_engine import FakeEngine
from tersor.server.options import ServerOptions
from tersor.server.serving import bind, serve

class Letters(SimpleNamespace):
    def __call__(self, text, **options):
        return {"input_ids": list(text.encode())}

    def decode(self, tokens, **options):
        return "".join(chr(97 + token % 26) for token in tokens)

options = ServerOptions(port=0)
tokenizer = Letters(all_special_tokens=[], bos_token_id=None, chat_template=None, added_tokens_decoder={})
engine = FakeEngine(tokenizer, step=0.02)
with bind(options) as place:
    print(f"http://127.0.0.1:{place.getsockname()[1]}", flush=True)
    serve(engine, options, place)
print("closed:", engine.closed)
"""


@pytest.fixture
def server() -> Iterator[Served]:
    """A server of its own for each test, since engines fail here."""
    with serving(FakeEngine(tokenizer())) as served:
        yield served


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETE, "/v1/chat/completions"])
def test_a_client_that_vanishes_frees_its_pages_within_a_step(server: Served, path: str, stream: bool) -> None:
    """Rules 14 and 16, streaming or not."""
    engine = server.engine
    engine.step = 0.02
    body: dict[str, Any] = {"max_tokens": 400, "stream": stream, "n": 2}
    body |= {"prompt": "Hello"} if path == COMPLETE else {"messages": [{"role": "user", "content": "Hello"}]}
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as client:
        data = httpx.Request("POST", server.url + path, json=body)
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(data.content)}\r\n\r\n".encode() + data.content)
        assert server.soon(lambda: engine.stats().pages_used == 2)
        if stream:
            assert b"200 OK" in client.recv(1000)
    begun = engine.steps
    assert server.soon(lambda: engine.stats().running == 0)
    assert engine.steps - begun <= 2 and len(engine.aborted) == 1
    assert server.idle() and engine.stats().pages_free == engine.pages
    assert server.soon(lambda: 'status="499"} 1' in server.http.get("/metrics").text or stream)


def test_a_client_that_leaves_while_it_waits_for_its_first_token_leaves_the_queue(server: Served) -> None:
    """Rule 14."""
    server.engine.paused = True
    with pytest.raises(httpx.ReadTimeout):
        server.post(COMPLETE, {**LONG, "stream": True}, timeout=0.1)
    assert server.soon(lambda: server.http.get("/stats").json()["queued"] == 0)
    assert server.idle()


def test_aborting_what_has_ended_or_never_was_is_no_error(server: Served) -> None:
    """Rule 15: ends and aborts race, and every answer is whole or gone."""
    engine = server.engine

    begun = time.perf_counter()
    server.post(COMPLETE, {"prompt": [99], "max_tokens": 6})
    alone = time.perf_counter() - begun

    def ask(number: int) -> int:
        patience = alone * (0.3 + number % 20 / 5) if number % 3 else 20
        try:
            done = server.post(COMPLETE, {"prompt": [number + 1], "max_tokens": 6}, timeout=patience)
        except httpx.TimeoutException:
            return 0
        assert done.json()["usage"]["completion_tokens"] == 6
        return 1

    with ThreadPoolExecutor(8) as pool:
        whole = sum(pool.map(ask, range(60)))
    assert whole >= 20 and server.idle()
    for name in ("unknown", *engine.aborted[:1], *engine.aborted[:1]):
        asyncio.run_coroutine_threadsafe(engine.abort(name), server.loop).result(5)
    assert engine.stats().pages_free == engine.pages
    assert server.complete(max_tokens=2).usage.completion_tokens == 2


def test_an_answer_that_pauses_goes_on_where_it_was(server: Served) -> None:
    """Rule 17, as a client sees a request that lost its pages and got them back."""
    said = "one two three four five six seven"
    server.engine.step = 0.01
    server.engine.say(said)
    text = ""
    for count, chunk in enumerate(server.complete(stream=True, max_tokens=40)):
        server.engine.paused = count == 2
        if server.engine.paused:
            time.sleep(0.1)
            server.engine.paused = False
        text += chunk.choices[0].text
    assert text == said


def test_a_request_that_can_never_fit_is_refused_alone(server: Served) -> None:
    """Rule 18."""
    server.engine.pages = 2
    with ThreadPoolExecutor(4) as pool:
        large = pool.submit(server.post, COMPLETE, {"prompt": [1] * (3 * PAGE), "max_tokens": 4})
        small = [pool.submit(server.post, COMPLETE, {"prompt": [2], "max_tokens": 4}) for _ in range(3)]
    assert large.result().status_code == 400 and "all pages together hold 128" in large.result().text
    assert [one.result().status_code for one in small] == [200] * 3


def test_prompts_share_pages_only_with_prompts_of_their_own_salt(server: Served) -> None:
    """Rule 24."""

    def cached(salt: str | None) -> int:
        answer = server.post(COMPLETE, {"prompt": [5] * 150, "max_tokens": 1, "cache_salt": salt}).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(None), cached("a"), cached("a"), cached("b"), cached(None)] == [0, 0, 128, 0, 128]
    assert [salt for *_, salt in server.engine.asked] == [None, "a", "a", "b", None]


def test_an_engine_that_fails_ends_its_streams_with_an_error_and_health_says_so(server: Served) -> None:
    """Rule 25."""
    assert server.http.get("/health").json() == {"status": "ok"}
    server.engine.step = 0.01
    with server.http.stream("POST", COMPLETE, json={**LONG, "stream": True}) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        server.loop.call_soon_threadsafe(server.engine.fail, "a step took the device down")
        *_, error, done = lines
    assert "a step took the device down" in error and '"code":"engine_failed"' in error
    assert done == "data: [DONE]"
    health = server.http.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "failed"})
    for body in (LONG, {**LONG, "stream": True}):
        refused = server.post(COMPLETE, body)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_failed"
    assert server.http.get("/stats").json()["healthy"] is False


def test_the_openai_client_raises_where_a_stream_fails(server: Served) -> None:
    """Rule 25."""
    server.engine.step = 0.01
    with pytest.raises(openai.APIError, match="went down"):
        for _ in server.complete(stream=True, max_tokens=400):
            server.loop.call_soon_threadsafe(server.engine.fail, "it went down")


def test_open_requests_end_before_the_server_does(server: Served) -> None:
    """Rule 25: a signal lets them finish, and the engine is closed after them."""
    server.engine.step = 0.01
    chunks = iter(server.complete(stream=True, max_tokens=30, stream_options={"include_usage": True}))
    next(chunks)
    server.stop()
    *_, last = chunks
    assert last.usage.completion_tokens == 30
    server.thread.join(10)
    assert not server.thread.is_alive() and server.engine.closed
    with pytest.raises(httpx.ConnectError):
        server.http.get("/health")


def test_a_signal_lets_open_requests_end_and_is_no_failure() -> None:
    """Rule 25, of a process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        body = {"prompt": "Hello", "max_tokens": 40, "stream": True}
        with (
            httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=20) as client,  # it need not listen yet
            client.stream("POST", f"{url}{COMPLETE}", json=body) as response,
        ):
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            process.send_signal(signal.SIGTERM)
            *_, last, done = lines
        assert '"finish_reason":"length"' in last and done == "data: [DONE]"
        assert process.wait(10) == 0
        assert process.stdout.read() == "closed: True\n"
    finally:
        process.kill()
        process.wait(10)


def test_a_second_interrupt_cuts_open_requests_off_without_a_word() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        body = {"prompt": "Hello", "max_tokens": 400, "stream": True}
        with (
            httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=20) as client,
            client.stream("POST", f"{url}{COMPLETE}", json=body) as response,
        ):
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            process.send_signal(signal.SIGINT)
            next(lines)
            time.sleep(0.3)  # a signal that is already under way would be one with the second
            process.send_signal(signal.SIGINT)
            with pytest.raises(httpx.HTTPError):
                list(lines)
        assert process.wait(10) == 0
        assert (process.stdout.read(), process.stderr.read()) == ("closed: True\n", "")
    finally:
        process.kill()
        process.wait(10)


def test_what_does_not_end_in_time_is_cut_off() -> None:
    with serving(FakeEngine(tokenizer()), drain_seconds=1) as server, ThreadPoolExecutor(1) as pool:
        server.engine.paused = True
        hung = pool.submit(server.post, COMPLETE, LONG)
        assert server.soon(lambda: server.engine.stats().waiting == 1)
        server.stop()
        server.thread.join(10)
        assert not server.thread.is_alive() and server.engine.closed and server.engine.stats().waiting == 0
        with pytest.raises(httpx.HTTPError):
            hung.result().raise_for_status()


def test_one_bad_prompt_leaves_all_others_as_they_are(server: Served) -> None:
    """Rule 26."""
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(server.post, COMPLETE, {"prompt": server.engine.broken if bad else "Hello", "max_tokens": 20})
            for bad in (False, True) * 4
        ]
    answers = [one.result() for one in asked]
    assert [one.status_code for one in answers] == [200, 500] * 4
    assert len({one.json()["choices"][0]["text"] for one in answers[::2]}) == 1
    assert "this prompt broke" in answers[1].json()["error"]["message"]
    together = server.post(COMPLETE, {"prompt": ["Hello", server.engine.broken], "max_tokens": 20})
    assert together.status_code == 500 and server.idle()
    assert server.http.get("/health").status_code == 200


def test_an_engine_that_forgets_a_request_is_an_error_and_no_short_answer(server: Served) -> None:
    async def forgetful(*_: Any, **__: Any) -> Any:
        for _ in ():
            yield

    server.engine.generate = forgetful  # type: ignore[method-assign]
    response = server.post(COMPLETE, LONG)
    assert response.status_code == 500 and "without an end" in response.json()["error"]["message"]


def test_requests_beyond_the_queue_are_told_to_come_again() -> None:
    with serving(FakeEngine(tokenizer()), max_queue=3) as server, ThreadPoolExecutor(8) as pool:
        server.engine.paused = True
        waiting = [pool.submit(server.post, COMPLETE, {"prompt": "a", "max_tokens": 2}) for _ in range(3)]
        assert server.soon(lambda: server.http.get("/stats").json()["queued"] == 3)
        for path, body in (
            (COMPLETE, LONG),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            for stream in (False, True):
                full = server.post(path, {**body, "stream": stream})
                assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
                assert full.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            server.complete()
        server.engine.paused = False
        assert [one.result().status_code for one in waiting] == [200] * 3
        assert server.complete(prompt=["a"] * 5, max_tokens=1).usage.completion_tokens == 5


def test_only_who_has_the_key_is_let_in() -> None:
    with serving(FakeEngine(tokenizer()), api_key="sesame") as server:
        assert server.complete(max_tokens=1).usage.completion_tokens == 1
        with httpx.Client(base_url=server.url) as stranger:
            for sent in (
                {},
                {"Authorization": "Bearer sesam"},
                {"Authorization": "sesame"},
                {"Authorization": "B\u00e9"},
            ):
                for path in (COMPLETE, "/v1/models", "/metrics", "/stats", "/tokenize", "/nothing"):
                    headers = {name: value.encode("latin-1") for name, value in sent.items()}
                    response = stranger.get(path, headers=headers)
                    assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert [stranger.get(path).status_code for path in ("/", "/health")] == [200, 200]
        with pytest.raises(openai.AuthenticationError):
            server.openai.with_options(api_key="wrong").models.list()


def test_many_streams_at_once_are_each_as_alone(server: Served) -> None:
    server.engine.rows, server.engine.pages = 200, 400

    def ask(number: int) -> str:
        chunks = server.events(COMPLETE, {"prompt": [number % 10 + 1], "max_tokens": 12})
        return "".join(one["choices"][0]["text"] for one in chunks)

    alone = [ask(number) for number in range(10)]
    with ThreadPoolExecutor(40) as pool:
        together = list(pool.map(ask, range(120)))
    assert together == [alone[number % 10] for number in range(120)]
    assert server.idle()


def test_options_that_cannot_be_are_refused() -> None:
    for options, words in (
        ({"port": 70000}, "port is 70000"),
        ({"max_queue": 0}, "max_queue is 0"),
        ({"api_key": ""}, "API key"),
        ({"api_key": "\u00e9"}, "API key"),
    ):
        with pytest.raises(InputError, match=words):
            ServerOptions(**options)
    assert ServerOptions().host == "127.0.0.1"


def test_the_key_may_come_from_the_environment_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServerOptions().api_key is None
    monkeypatch.setenv("TERSOR_API_KEY", "sesame")
    assert ServerOptions().api_key == "sesame" and "sesame" not in repr(ServerOptions())
    assert ServerOptions(api_key="other").api_key == "other"


def test_a_port_that_is_taken_is_one_line() -> None:
    with bind(ServerOptions(port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TersorError, match=f"cannot listen on 127.0.0.1 port {port}: "):
            bind(ServerOptions(port=port))
