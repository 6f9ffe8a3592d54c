"""The application: endpoints, who is let in, how large a body may be, and errors in one shape."""

from __future__ import annotations

import hmac
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import cache
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tersor.engine.protocol import AsyncEngine
from tersor.engine.stats import ANSWERS
from tersor.errors import TersorError
from tersor.server import chat, completions, embeddings
from tersor.server.api import Api
from tersor.server.errors import ApiError, of_validation
from tersor.server.options import ServerOptions
from tersor.server.requests import ChatRequest, CompletionRequest, EmbeddingRequest
from tersor.server.sse import GONE
from tersor.server.tokenizing import DetokenizeRequest, TokenizeRequest, detokenize, tokenize

Body = TypeVar("Body", bound=BaseModel)

OPEN = ("/", "/health")
"""Paths that need no key: the page, which asks for one, and what load balancers ask."""

_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def create_app(engine: AsyncEngine, options: ServerOptions | None = None) -> FastAPI:
    """Return an application that answers with an engine; when it ends, so does the engine.

    Args:
        engine: any engine.
        options: how it lets in and what it reads; host and port mean nothing here.
    """
    api = Api(engine, options or ServerOptions())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await api.close()

    app = FastAPI(title="Tersor", openapi_url=None, lifespan=lifespan)
    _add_endpoints(app, api)
    paths = [route.path for route in app.routes if getattr(route, "path", "").startswith("/v1/")]  # type: ignore[attr-defined]

    async def wrong(request: Request, error: Exception) -> Response:
        told = _of_http(error, request, paths) if isinstance(error, HTTPException) else api.told(error)
        return JSONResponse(told.body(), told.status, told.headers)

    for kind in (ApiError, TersorError, HTTPException, Exception):
        app.add_exception_handler(kind, wrong)
    app.add_middleware(Gate, api=api, paths=frozenset(route.path for route in app.routes))  # type: ignore[attr-defined]
    return app


def _add_endpoints(app: FastAPI, api: Api) -> None:
    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(_page(), headers={"Content-Security-Policy": _POLICY})

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse(_health(api), 200 if api.engine.healthy else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        engine = api.engine
        text = api.metrics.text(engine.stats(), engine.healthy, api.front.queued, engine.copies())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/stats")
    async def stats() -> Response:
        return JSONResponse(_stats(api))

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(api)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        api.check_model(name)
        return JSONResponse(_model(api))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await chat.chat(api, await _body(api, request, ChatRequest), request)

    @app.post("/v1/completions")
    async def plain_completions(request: Request) -> Response:
        return await completions.complete(api, await _body(api, request, CompletionRequest), request)

    @app.post("/v1/embeddings")
    async def states(request: Request) -> Response:
        return await embeddings.embed(api, await _body(api, request, EmbeddingRequest), request)

    @app.post("/tokenize")
    async def tokens_of(request: Request) -> Response:
        return JSONResponse(await tokenize(api, await _body(api, request, TokenizeRequest)))

    @app.post("/detokenize")
    async def text_of(request: Request) -> Response:
        return JSONResponse(await detokenize(api, await _body(api, request, DetokenizeRequest)))


def _model(api: Api) -> dict[str, Any]:
    context = api.info.context
    return {"id": api.name, "object": "model", "created": api.begun, "owned_by": "tersor", "max_model_len": context}


def _health(api: Api) -> dict[str, Any]:
    """Whether the model answers, and of several copies how each stands: some of them answer for all."""
    states = [copy.state for copy in api.engine.copies()]
    status = "ok" if all(state == ANSWERS for state in states) else "degraded"
    return {"status": status if api.engine.healthy else "failed"} | ({"copies": states} if states else {})


def _stats(api: Api) -> dict[str, Any]:
    """What the page shows; counts only grow."""
    stats = api.engine.stats()
    return {
        "model": api.name,
        "context": api.info.context,
        "chat": api.prompts.template is not None,
        "healthy": api.engine.healthy,
        "seconds": time.monotonic(),
        "queued": api.front.queued,
        "running": stats.running,
        "waiting": stats.waiting,
        "pages_used": stats.pages_used,
        "pages_free": stats.pages_free,
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "generated_tokens": stats.generated_tokens,
        "copies": [asdict(copy) for copy in api.engine.copies()],
    }


async def _body(api: Api, request: Request, kind: type[Body]) -> Body:
    """Return the body of a request.

    Raises:
        ApiError: not JSON (other kinds of bodies are what a foreign page could send), too large, or not of its type.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json")
    most = api.options.max_body
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > most:
                raise ApiError(413, f"the body has more than {most} bytes: send less", headers={"Connection": "close"})
    except ClientDisconnect:
        raise ApiError(GONE, "the client went away") from None
    try:
        return kind.model_validate_json(bytes(data))
    except ValidationError as error:
        raise of_validation(error) from None


def _of_http(error: HTTPException, request: Request, paths: Iterable[str]) -> ApiError:
    """A path that there is not, or a method that it does not take."""
    said, allowed = str(error.detail), Headers(error.headers).get("allow")
    if error.status_code == 404:
        said = f"there is no {request.url.path}: here are {', '.join(paths)}"
    if error.status_code == 405 and allowed is not None:
        said = f"{request.url.path} does not take {request.method}: use {allowed}"
    return ApiError(error.status_code, said, headers=dict(error.headers or {}))


@cache
def _page() -> str:
    return resources.files("tersor.server").joinpath("page.html").read_text(encoding="utf-8")


_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class Gate:
    """Lets requests in that have the key, gives each an id, and counts them."""

    def __init__(self, app: ASGIApp, api: Api, paths: frozenset[str]) -> None:
        self._app, self._api, self._paths = app, api, paths
        key = api.options.api_key
        self._key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request of HTTP; what else comes passes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        begun, status = time.perf_counter(), GONE

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            if self._may(scope["path"], headers):
                await self._app(scope, receive, answer)
            else:
                told = ApiError(401, "no valid API key: send Authorization: Bearer KEY", code="invalid_api_key")
                await JSONResponse(told.body(), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, answer)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._api.metrics.requests[path, status] += 1
            if path.startswith("/v1/") and scope["method"] == "POST":
                self._api.metrics.whole.observe(time.perf_counter() - begun)

    def _may(self, path: str, headers: Headers) -> bool:
        """Whether a request has the key, compared in a time that does not depend on how much of it is right."""
        if self._key is None or path in OPEN:
            return True
        return hmac.compare_digest(headers.get("authorization", "").encode("latin-1"), self._key)
