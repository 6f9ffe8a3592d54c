"""Options of a server: one value with every default, which Python and the command line read."""

from __future__ import annotations

from dataclasses import dataclass, field

from tersor import settings
from tersor.errors import InputError
from tersor.server.parsers import Parsers


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server listens, whom it lets in and how it reads what the model writes.

    Attributes:
        host: address to listen on; only this machine unless told.
        port: port to listen on.
        api_key: what clients must send as their bearer token; `None` lets everyone in. Where nothing is said it is the
            variable TERSOR_API_KEY.
        max_queue: prompts that may wait for their first token; beyond them requests are refused with 429.
        name: what the model is called; `None` is the engine's name for it.
        tool_parser: how tool calls are written: auto (asks the chat template), hermes, llama3, mistral, none.
        reasoning_parser: how reasoning is written: auto (asks the chat template), think, gpt-oss, none.
        drain_seconds: how long open requests may go on once the server is told to end.
        max_body: bytes of a request's body at most.
        grammar_seconds: how long a grammar may take to compile.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default_factory=lambda: settings.get("TERSOR_API_KEY"), repr=False)
    max_queue: int = 1024
    name: str | None = None
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    drain_seconds: int = 30
    max_body: int = 64 << 20
    grammar_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, least in (("port", 0), ("max_queue", 1), ("drain_seconds", 0), ("max_body", 1)):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"{name} is {value}: it must be at least {least}")
        Parsers.of(self.tool_parser, self.reasoning_parser, None)
        if self.port > 65535:
            raise InputError(f"port is {self.port}: it must be at most 65535")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii()):
            raise InputError("the API key must be ASCII text and not empty")
