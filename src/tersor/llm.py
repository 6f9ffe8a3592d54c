"""Which texts follow these prompts, and what is their last state? A model and its engine, asked from Python.

import tersor

model = tersor.LLM("tiny-fp6")
outputs = model.generate(["The first rule"], tersor.SamplingParams(max_tokens=20, temperature=0))
print(outputs[0].outputs[0].text)
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tersor.checkpoint.source import open_source
from tersor.engine.batch_items import Item, answer_once
from tersor.engine.build import build
from tersor.engine.config import EngineConfig
from tersor.engine.core import Core
from tersor.engine.garbage import left_alone
from tersor.engine.limits import Limits
from tersor.engine.offline import OfflineEngine
from tersor.engine.outputs import Answer, EmbeddingRequestOutput, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.protocol import ModelInfo
from tersor.engine.scheduler import Scheduler
from tersor.engine.workers import gather
from tersor.errors import CheckpointError, InputError, TersorError
from tersor.integrations.transformers.load import load_tokenizer
from tersor.models.planned import placed
from tersor.ops.attention_form import PAGE
from tersor.planner.plan import read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STREAM = "stream"
"""What the request of a stream is called."""

Prompt: TypeAlias = "str | Sequence[int]"
"""A text, or its tokens."""

_PROMPTS = "give a text, a list of tokens, or a list of either"


class LLM:
    """A model that answers prompts.

    Attributes:
        config: how its engine runs.
        tokenizer: of the model.
        info: its name and sizes.
        core: the engine.
        runner: who computes its steps.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        plan: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        """Load a model.

        With `tensor_parallel` and its like above 1 other processes compute a part of it each. Under torchrun every
        process makes the model; in all but the first, this call follows the first one until it ends, and then ends the
        process.

        Args:
            model: a directory or a Hub id; plain, or compressed by `tersor quantize`.
            revision: branch, tag or commit of a Hub id.
            tokenizer: of the model, where it is loaded already.
            plan: file of a plan for this model (`tersor plan`), instead of a placement.
            options: fields of `EngineConfig`.

        Raises:
            InputError: an option that there is not; a plan of another model or version, or not run by the engine.
            UnsupportedError: the engine does not have the architecture, CUDA graphs are insisted on and impossible, or
                weights are to be offloaded from what is no GPU.
            CheckpointError: no whole checkpoint.
            ShapeError: it cannot be placed on so many ranks.
            TersorError: it does not fit in the device's memory, what is offloaded not in that of the host or on the
                disk, or a rank cannot be started.
        """
        self.config = config = EngineConfig.of(**options)
        with open_source(model, revision=revision) as source:
            if plan is not None:
                if options.get("placement") is not None:
                    raise InputError("a plan and a placement both say who has what: give one of the two")
                options.pop("placement", None)
                self.config = config = EngineConfig.of(placement=placed(read(Path(plan)), source), **options)
            self._team = team = gather(config, source)
            try:
                with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as pool:
                    if tokenizer is None and team.first:  # meanwhile: transformers takes seconds to import
                        trusted = config.trust_remote_code
                        loading = pool.submit(load_tokenizer, source.directory, trust_remote_code=trusted)
                    seat = team.seat
                    built = build(source, config, seat.device, seat.ranks, seat.line, seat.stages, seat.place)
                team.before_end(built.runner.release)
                if not team.first:
                    built.runner.follow()
                    raise SystemExit(0)
                if tokenizer is None:
                    tokenizer = loading.result()
                generation = generation_config(source.directory)
            except BaseException:
                team.close()
                raise
            name = source.label
        self.tokenizer, self.runner, self._asked = tokenizer, built.runner, threading.Lock()
        decoder = built.runner.decoder.config
        vocabulary = decoder.vocabulary
        self.info = ModelInfo(name, built.context, vocabulary, self.tokenizer)
        limits = Limits(
            pages=built.pages,
            page_size=PAGE,
            max_rows=built.runner.max_rows,
            max_step_tokens=config.max_step_tokens,
            context=built.context,
            share_prefixes=config.prefix_caching,
            stages=seat.stages.count,
        )
        told = (generation.get("eos_token_id"), decoder.ends or None, tokenizer.eos_token_id)
        ends = next((one for one in told if one is not None), ())
        self.core = Core(
            Scheduler(limits),
            built.runner,
            self.tokenizer,
            (ends,) if isinstance(ends, int) else ends,
            defaults=generation,
            seed=config.seed,
            vocabulary=vocabulary,
            team=team,
            ahead=not built.runner.repeats,  # such a launch waits until most of the step has run
        )

    def close(self) -> None:
        """End the processes that compute the model together with this one; the model answers no more. Idempotent."""
        self._team.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_finished: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts, all at once; return one output each, in their order.

        Where prefixes are cached, prompts run in the order of a plan (`engine.offline`), and equal ones that are greedy
        run once; tokens do not depend on it.

        Args:
            prompts: texts, or lists of tokens; one alone is a list of one.
            params: for all, or one each; `None` is what the model's generation config says.
            on_finished: told of each as it ends.

        Raises:
            InputError: a prompt that can never be served, as many params as there are not prompts, a stream that is
                open, or another thread that asks; nothing runs.
        """
        found: dict[str, RequestOutput] = {}
        with self._alone():
            listed = self._listed(prompts)
            each = _one_each(params, len(listed))
            items = []
            for index, ((_, tokens), one) in enumerate(zip(listed, each, strict=True)):
                self.core.check(f"prompt {index}", tokens.size, one)
                items.append(Item(f"{index}", tokens, self.core.settled(one)))
            with closing(self._answered(items)) as outputs:
                for output in outputs:
                    assert isinstance(output, RequestOutput)
                    output.prompt = listed[int(output.request_id)][0]
                    found[output.request_id] = output
                    if on_finished is not None:
                        on_finished(output)
        return [found[item.key] for item in items]

    def embed(self, prompts: Prompt | Sequence[Prompt]) -> list[EmbeddingRequestOutput]:
        """Return the last state of each prompt, in their order.

        It is the last token's row behind the model's last norm, at length 1: sentence-transformers' last-token pooling
        and normalization, and what vLLM makes of a decoder that is to embed. A token that the tokenizer puts behind a
        text is its last. Prompts that begin alike compute what they share once, as in `generate`.

        Args:
            prompts: texts, or lists of tokens; one alone is a list of one.

        Raises:
            InputError: a prompt that can never be served, a stream that is open, or another thread that asks; nothing
                runs.
            TersorError: a state is not finite.
        """
        found: dict[str, EmbeddingRequestOutput] = {}
        with self._alone():
            listed = self._listed(prompts)
            items = [Item(f"{index}", tokens, None) for index, (_, tokens) in enumerate(listed)]
            for item in items:
                self.core.check(f"prompt {item.key}", item.tokens.size, None)
            with closing(self._answered(items)) as outputs:
                for output in outputs:
                    assert isinstance(output, EmbeddingRequestOutput)
                    if output.error is not None:
                        raise TersorError(f"prompt {output.request_id}: {output.error}")
                    found[output.request_id] = replace(output, prompt=listed[int(output.request_id)][0])
        return [found[item.key] for item in items]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[RequestOutput]:
        """Continue a prompt and yield the output while it grows, the last time finished.

        Every output holds all there is so far: of a text whole characters, and nothing that may begin a stop text. A
        stream that is closed early ends the request; the model answers nothing else before it has ended.

        Args:
            prompt: a text, or tokens.
            params: `None` is what the model's generation config says.

        Raises:
            InputError: at the first output, a prompt that can never be served, another stream that is open, or another
                thread that asks.
        """
        with ExitStack() as held:
            held.enter_context(self._alone())
            ((text, tokens),) = self._listed([prompt])
            self.core.add(_STREAM, tokens.tolist(), params or SamplingParams(), prompt=text)
            ended = not self.core.unfinished
            try:
                while not ended:
                    outputs = self.core.step()
                    if ended := not self.core.unfinished:
                        held.close()  # who keeps the generator may ask again
                    yield from outputs
            finally:
                if not ended:
                    self.core.abort(_STREAM)
                    while self.core.unfinished:
                        self.core.step(partial=False)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold that nobody else asks, whose outputs would be taken for those of this call.

        Raises:
            InputError: a stream is open, or another thread asks.
        """
        free = self._asked.acquire(blocking=False)
        try:
            if not free or self.core.unfinished:
                raise InputError(
                    "a stream of this model is open, or another thread asks it: read the stream to its end, or close "
                    "it, before asking again"
                )
            yield
        finally:
            if free:
                self._asked.release()

    def _answered(self, items: list[Item]) -> Generator[Answer]:
        """Yield outputs as they end: by a plan where prompts may share prefixes, else in the order of arrival."""
        if self.config.prefix_caching and len(items) > 1:
            yield from answer_once(OfflineEngine(self.core), items, lambda: False)
            return
        asked = {item.key: item for item in items}
        try:
            for item in items:
                self.core.add(item.key, item.tokens.tolist(), item.params)
            with left_alone():
                while self.core.unfinished:
                    for output in self.core.step(partial=False):
                        yield asked[output.request_id].answer(output)
        except BaseException:
            for item in items:
                self.core.abort(item.key)
            while self.core.unfinished:
                self.core.step(partial=False)
            raise

    def chat(
        self,
        conversations: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer conversations by the model's chat template.

        Args:
            conversations: lists of messages (`role`, `content`); one alone is a list of one.
            params: as `generate` takes them.
            template: what the template knows beside the messages.

        Raises:
            InputError: the model has no chat template, or it refuses the messages.
        """
        many = conversations if conversations and not isinstance(conversations[0], Mapping) else [conversations]
        return self.generate([chat_tokens(self.tokenizer, messages, **template) for messages in many], params)

    def _listed(self, prompts: Prompt | Sequence[Prompt]) -> list[tuple[str | None, NDArray[np.int32]]]:
        """Return text, or `None`, and tokens of each prompt.

        Raises:
            InputError: what is neither text nor tokens, or a token that the model does not have.
        """
        if not isinstance(prompts, str | Sequence | np.ndarray):
            raise InputError(f"prompts are a {type(prompts).__name__}: {_PROMPTS}")
        alone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
        many: Sequence[Any] = [prompts] if alone else prompts
        for index, one in enumerate(many):
            if not isinstance(one, str | Sequence | np.ndarray):
                raise InputError(f"prompt {index} is a {type(one).__name__}: {_PROMPTS}")
            for kind in () if isinstance(one, str) else _kinds(one):
                if not issubclass(kind, Integral):
                    wrong = next(token for token in one if isinstance(token, kind))
                    raise InputError(f"prompt {index} holds {wrong!r}, which is no token: {_PROMPTS}")
        texts = [prompt for prompt in many if isinstance(prompt, str)]
        encoded = iter(self.tokenizer(texts)["input_ids"] if texts else ())
        listed = []
        for index, one in enumerate(many):
            text = one if isinstance(one, str) else None
            tokens = next(encoded) if text is not None else list(one)
            for token in (min(tokens, default=0), max(tokens, default=0)):
                if not 0 <= token < self.info.vocabulary:
                    raise InputError(f"prompt {index} holds token {token}, and the model has {self.info.vocabulary}")
            listed.append((text, np.array(tokens, dtype=np.int32)))
        return listed


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Any, **template: Any) -> list[int]:
    """Return the tokens that a conversation begins an answer with.

    Raises:
        InputError: the tokenizer has no chat template, or it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise InputError("the model has no chat template")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)
    except Exception as error:  # whatever a template raises
        raise InputError(f"the chat template refuses the messages: {error}") from None
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def generation_config(directory: Path) -> dict[str, Any]:
    """Return what a model's generation_config.json says; nothing where there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    path = directory / "generation_config.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: no JSON object")
    return found


def _kinds(tokens: Sequence[Any] | np.ndarray) -> set[type]:
    """Return the types of a prompt's tokens, each once."""
    return {tokens.dtype.type} if isinstance(tokens, np.ndarray) else set(map(type, tokens))


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    for one in [params] if isinstance(params, Mapping) or not isinstance(params, Iterable) else params:
        if not isinstance(one, SamplingParams):
            raise InputError(f"params are {one!r}: give tersor.SamplingParams(...), one for all prompts or one each")
    if len(params) != count:
        raise InputError(f"there are {len(params)} params for {count} prompts")
    return list(params)
