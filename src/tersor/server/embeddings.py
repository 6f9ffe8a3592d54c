"""`/v1/embeddings`: the last states of texts or tokens."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tersor.engine.openai_answer import embeddings
from tersor.engine.outputs import EmbeddingRequestOutput
from tersor.server.answering import Job
from tersor.server.api import Api
from tersor.server.errors import ApiError
from tersor.server.requests import EmbeddingRequest
from tersor.server.sse import until_gone


async def embed(api: Api, request: EmbeddingRequest, http: Request) -> Response:
    """Return the last state of each input.

    Raises:
        ApiError: whatever is wrong with the request.
    """
    api.check_model(request.model)
    given = request.prompts()
    api.front.check_queue(len(given))
    jobs = [await api.prompts.run(_prepare, api, request, one) for one in given]
    answers = await until_gone(http.receive, _states(api, jobs))
    api.metrics.prompt_tokens += sum(len(job.tokens) for job in jobs)
    return await asyncio.to_thread(_shown, api, answers, request.encoding_format == "base64")


def _prepare(api: Api, request: EmbeddingRequest, given: str | list[int]) -> Job:
    """Check an input; called in the tokenizer's thread."""
    tokens, context = api.prompts.checked(given, "input"), api.info.context
    if len(tokens) > context:
        message = f"the input has {len(tokens)} tokens and the model's context is {context}"
        raise ApiError(400, message, param="input", code="context_length_exceeded")
    return Job(tokens, None, request.cache_salt)


async def _states(api: Api, jobs: list[Job]) -> list[EmbeddingRequestOutput]:
    found: dict[int, EmbeddingRequestOutput] = {}
    async with api.front.answering(jobs) as outputs:
        async for place, output in outputs:
            found[place] = EmbeddingRequestOutput.of(output)
    return [found[place] for place in range(len(jobs))]


def _shown(api: Api, answers: list[EmbeddingRequestOutput], as_base64: bool) -> Response:
    """Write numbers as text, which takes time where there are many: in a thread of its own."""
    return JSONResponse(embeddings(answers, model=api.name, as_base64=as_base64))
