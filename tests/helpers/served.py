"""A server on a free port of this machine, in a thread, with an engine that has no model."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from transformers import PreTrainedTokenizerBase

from helpers.fake_engine import FakeEngine
from helpers.tiny_lm import TINY
from tersor.engine.protocol import AsyncEngine
from tersor.integrations.transformers import load
from tersor.server.options import ServerOptions
from tersor.server.serving import bind, server_of

TEMPLATE = (
    "{{ bos_token }}{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message must come first') }}{% endif %}"
    "[{{ message.role }}]{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}{% if not loop.last %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
HERMES = TEMPLATE + "{# <tool_call> #}"
THINKS = HERMES + "{# <think> </think> #}"


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    """Return a tokenizer of the bundled model, with a chat template."""
    made = load.load_tokenizer(TINY)
    made.chat_template = template
    return made


@dataclass
class Served:
    """A server that runs.

    Attributes:
        engine: behind it.
        url: of it.
        loop: event loop in which it runs.
        openai, http: clients.
        stop: tells it to end, as a signal would.
        thread: in which it runs.
    """

    engine: FakeEngine
    url: str
    loop: asyncio.AbstractEventLoop
    openai: openai.OpenAI
    http: httpx.Client
    stop: Callable[[], None]
    thread: threading.Thread

    def chat(self, **fields: Any) -> Any:
        """Ask for a chat completion by the openai client, greedy and short unless told."""
        fields = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64, **fields}
        return self.openai.chat.completions.create(model="tiny-lm", **fields)

    def complete(self, **fields: Any) -> Any:
        """Ask for a completion by the openai client."""
        return self.openai.completions.create(model="tiny-lm", **{"prompt": "Hello", "max_tokens": 8, **fields})

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Send a body as JSON."""
        return self.http.post(path, json=body, **options)

    def events(self, path: str, body: Any) -> list[Any]:
        """Return the events of a stream; the last one must be `[DONE]`, which is left out."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream"), response.read()
            lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def soon(self, holds: Callable[[], bool], seconds: float = 5.0) -> bool:
        """Wait until something holds; return whether it did in time."""
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True

    def idle(self) -> bool:
        """Whether the engine holds nothing any more, soon."""
        return self.soon(lambda: (one := self.engine.stats()).running + one.waiting + one.pages_used == 0)


@contextmanager
def serving(engine: AsyncEngine | FakeEngine, **options: Any) -> Iterator[Served]:
    """Serve with an engine while the block runs."""
    chosen = ServerOptions(port=0, **options)
    place = bind(chosen)
    url = f"http://127.0.0.1:{place.getsockname()[1]}"
    server = server_of(engine, chosen)
    begun: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        begun.append(asyncio.get_running_loop())
        await server.serve(sockets=[place])

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end
        time.sleep(0.002)

    def stop() -> None:
        server.should_exit = True

    key = chosen.api_key or "none"
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20) as client,
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=20) as http,
    ):
        try:
            yield Served(engine, url, begun[0], client, http, stop, thread)  # type: ignore[arg-type]
        finally:
            stop()
            thread.join(20)
            place.close()
    assert not thread.is_alive()
