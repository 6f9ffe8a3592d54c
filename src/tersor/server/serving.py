"""An engine behind a port, until it is told to end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from types import FrameType

import uvicorn

from tersor.engine.config import EngineConfig
from tersor.engine.garbage import left_alone
from tersor.engine.protocol import AsyncEngine
from tersor.errors import TersorError, UnsupportedError
from tersor.server.app import create_app
from tersor.server.options import ServerOptions

_BACKLOG = 2048
"""Connections that may wait for the event loop."""


def server_of(engine: AsyncEngine, options: ServerOptions) -> uvicorn.Server:
    """Return a server that is ready to run."""
    config = uvicorn.Config(
        create_app(engine, options),
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=options.drain_seconds,
        lifespan="on",
        ws="none",
    )
    logging.getLogger("uvicorn.error").addFilter(_is_failure)
    return _Server(config)


class _Server(uvicorn.Server):
    """A server that a second SIGINT ends at once, and the engine with it: uvicorn's would leave that running."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Let open requests end; at a second SIGINT cut them off."""
        again = self.should_exit and sig == signal.SIGINT
        super().handle_exit(sig, frame)
        if again:
            self.force_exit = False
            for task in tuple(self.server_state.tasks):
                task.get_loop().call_soon_threadsafe(task.cancel)


def _is_failure(record: logging.LogRecord) -> bool:
    """Tell whether uvicorn says more than that an answer was cut off."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def bind(options: ServerOptions) -> socket.socket:
    """Return a socket that is bound where the options say; port 0 is a free one. Nobody is heard before `serve`.

    Raises:
        TersorError: the address is taken, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((options.host, options.port))
    except OSError as error:
        place.close()
        raise TersorError(f"cannot listen on {options.host} port {options.port}: {error.strerror or error}") from None
    return place


def serve(engine: AsyncEngine, options: ServerOptions, place: socket.socket | None = None) -> None:
    """Answer requests with an engine until SIGINT or SIGTERM; then open ones end first, and the engine after them.

    Args:
        engine: any engine; it is closed at the end.
        options: of the server.
        place: a socket that is bound already, see `bind`; none is bound where the options say.

    Raises:
        TersorError: the address is taken.
    """
    server = server_of(engine, options)
    with place or bind(options) as bound, _kept_alive():
        server.run(sockets=[bound])


def serve_model(
    model: str,
    options: ServerOptions,
    config: EngineConfig,
    *,
    revision: str | None = None,
    copies: int = 1,
    threads: int = 0,
    say: Callable[[str], None],
) -> None:
    """Load a model and serve it, see `serve`; a port that is taken is an error before the model is loaded.

    Args:
        model: a checkpoint directory or a hub id.
        options: of the server.
        config: of the engine, or of each of several.
        revision: branch, tag or commit of a hub id.
        copies: engines, above 1 each in a process of its own.
        threads: that torch has on a CPU for each of several engines; 0 leaves it to torch.
        say: told where the model answers, who may ask, and what becomes of copies.

    Raises:
        InputError, UnsupportedError, TersorError: as `LLM` and `serve`.
    """
    from tersor.engine.workers import follows
    from tersor.llm import LLM
    from tersor.server.engines import check_count

    check_count(copies)
    if follows(config):
        LLM(model, revision=revision, **asdict(config))  # ends the process
    with bind(options) as place, ExitStack() as stack:
        if copies > 1:
            engine: AsyncEngine = _copies(model, revision, config, copies, threads, say, stack)
        else:
            from tersor.engine.threaded import ThreadedEngine

            llm = stack.enter_context(closing(LLM(model, revision=revision, **asdict(config))))
            engine = ThreadedEngine(llm.core, llm.info)
        name, port = options.name or engine.info.name, place.getsockname()[1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        place.listen(_BACKLOG)  # who asks from now on is heard
        by = f", {copies} copies" if copies > 1 else ""
        say(f"{name} answers at http://{host}:{port}, context {engine.info.context} tokens{by}")
        if options.api_key is None and not _is_own(options.host):
            say(f"whoever reaches {options.host} may ask: --api-key lets in only those who know it")
        with left_alone():
            serve(engine, options, place)


def _copies(
    model: str,
    revision: str | None,
    config: EngineConfig,
    count: int,
    threads: int,
    say: Callable[[str], None],
    stack: ExitStack,
) -> AsyncEngine:
    """Return several engines as one, which `stack` ends; this process has no model but its tokenizer.

    Raises:
        InputError, UnsupportedError, TersorError: as `serve_model`.
    """
    from tersor.checkpoint.source import open_source
    from tersor.engine.copies import Copies
    from tersor.integrations.transformers.load import load_tokenizer
    from tersor.models.config import supported
    from tersor.server.engines import of_several

    load = of_several(model, revision, config, count, threads)
    with open_source(model, revision=revision) as source:  # a hub id is downloaded once, for all
        why = supported(source.config)
        if why:
            raise UnsupportedError(f"{source.label}: {why}")
        directory = source.directory
    copies = Copies(
        load,
        count,
        lambda: load_tokenizer(directory, trust_remote_code=config.trust_remote_code),
        say=say,
        parents=config.ranks > 1,
    )
    stack.callback(copies.end)
    return copies


def _is_own(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _kept_alive() -> Iterator[None]:
    """Let uvicorn's signals mean the end of the server alone: it raises them once more when it has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
