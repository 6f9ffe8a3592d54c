"""Errors as OpenAI's clients read them: a status, and one JSON shape for all."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from tersor.errors import InputError

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """What a client is told instead of an answer.

    Attributes:
        status: of HTTP.
        message: one line: what is wrong, and what to do.
        param: the field that is wrong, where it is one.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """Return OpenAI's shape of an error."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def of_exception(error: BaseException, healthy: bool) -> ApiError:
    """Return what a client is told of an exception; `healthy` is whether the engine still runs."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if not healthy:
        return ApiError(503, f"the engine has failed: {error}", code="engine_failed")
    return ApiError(500, f"{type(error).__name__}: {error}")


def of_validation(error: ValidationError) -> ApiError:
    """Return 400 for a body that is not of its type; the first thing wrong is named."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg']}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{place} is not supported: leave it out", param=place, code="unsupported_parameter")
    return ApiError(400, f"{place or 'the body'}: {first['msg']}", param=place or None)
