"""Which text follows this one prompt, piece by piece? An engine that is no larger than the prompt needs says it.

What the engine does not have runs through the code of transformers, and `Continuing.why` is the line that says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tersor.checkpoint.source import Source, open_source
from tersor.engine.config import EngineConfig
from tersor.engine.continuation import Statistics, TextStream, full, prompt_tokens, room_for, together
from tersor.engine.outputs import ERROR, STOP, CompletionOutput, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.sampling import Sampling
from tersor.errors import CheckpointError, TersorError, UnsupportedError
from tersor.formats import float_dtype_or_auto
from tersor.integrations.transformers import load
from tersor.llm import LLM, generation_config
from tersor.models import DecoderConfig
from tersor.models.architectures import READERS, TYPES, called
from tersor.models.finite import first_not_finite
from tersor.models.load import check_placed, usual_dtype
from tersor.ops.attention_form import PAGE, PagedCache
from tersor.ops.dispatch import environment_reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER_NAME = "adapter_config.json"
"""What transformers finds an adapter by, in the directory of a model."""

STEP_TOKENS = 4096
"""Of a step at most: a longer prompt is read in several, so that a step needs little memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A prompt, and how it is to be continued.

    Attributes:
        prompt: a text or tokens.
        sampling: how tokens are drawn; the model's generation config fills what it leaves open.
        samples: continuations, at least 1.
        device: where the model runs.
        dtype: of activations: auto, float16, bfloat16 or float32.
        activations: what linears multiply: 16bit, fp8, int8 or int8:g128.
        cuda_graph: True insists on CUDA graphs, False forbids them, None uses them where they work.
        trust_remote_code: whether Python code that comes with the model is run.
        ranks: of its options those count that say how many ranks compute the model, what each has, and which weights
            are offloaded.
    """

    prompt: str | list[int]
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    device: torch.device
    dtype: str = "auto"
    activations: str = "16bit"
    cuda_graph: bool | None = None
    trust_remote_code: bool = False
    ranks: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True, slots=True)
class Continued:
    """One of several continuations.

    Attributes:
        text: without what ended it.
        tokens: ids drawn, that of an end-of-sequence token included.
        finish_reason: one of those of `Statistics`.
    """

    text: str
    tokens: list[int]
    finish_reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self)


class Continuing(Protocol):
    """A model that is ready to continue one prompt, once.

    Attributes:
        why: what the engine does not have of the model, a line; empty where the engine runs it.
    """

    why: str

    def stream(self) -> TextStream:
        """Return the pieces of one continuation, which is computed while they are read.

        Raises:
            TersorError: while streaming, logits that are not finite, or too little GPU memory.
        """
        ...

    def samples(self) -> tuple[list[Continued], Statistics]:
        """Return all continuations, and what they took.

        Raises:
            TersorError: as `stream`.
        """
        ...


def ready(directory: Path, tokenizer: PreTrainedTokenizerBase, asked: Asked) -> Continuing:
    """Load a model to continue one prompt: into the engine or, where that does not have it, through transformers.

    Args:
        directory: of the checkpoint.
        tokenizer: of the model.
        asked: what is to be continued.

    Raises:
        InputError: a prompt without tokens, with tokens that the model does not have, or without room in its context.
        CheckpointError: no whole checkpoint.
        UnsupportedError: weights that cannot be multiplied with such activations, CUDA graphs that were insisted on
            and are not possible, or a model that is to be offloaded and runs through transformers or on no GPU.
        TersorError: the model does not fit in the device's memory.
    """
    with open_source(directory) as source:
        why = obstacle(source, asked)
        if not why:
            config, dtype = DecoderConfig.from_dict(source.config), _dtype(source, asked)
    if why and asked.ranks.ranks > 1:
        raise UnsupportedError(f"{asked.ranks.ranks_said}, which the engine alone has: {why}")
    if why:
        if asked.ranks.offload is not None:
            raise UnsupportedError(f"offload is {asked.ranks.offload}, and {why}: the engine alone offloads")
        return _ByTransformers(directory, tokenizer, asked, why)
    return _ByEngine(directory, tokenizer, asked, config, dtype)


def obstacle(source: Source, asked: Asked) -> str:
    """Return why the engine does not run a checkpoint as it is asked to, in a line; empty if it does."""
    name = called(source.config)
    if name not in READERS:
        return f"{name} runs through transformers: the engine does not have it"
    why = _passed_over(source)
    try:
        check_placed(source)
    except (UnsupportedError, CheckpointError) as error:
        why = why or str(error)
    if not why and asked.device.type == "cuda":
        # Attention without kernels reads its rows on the host, a token at a time, which is slow on a GPU.
        why = environment_reason(_dtype(source, asked), asked.device)
    return why and f"{name} runs through transformers: {why}"


def _passed_over(source: Source) -> str:
    """Return what changes a model beside its fields and weights, which alone the engine reads; empty without such."""
    config = source.config
    kind, weights = config.get("model_type"), config.get("transformers_weights")
    if config.get("auto_map") and kind not in TYPES:
        return f"its type, {kind}, comes with code of its own"
    if weights is not None:
        return f"its config.json says that the weights are in {weights}"
    return "it has an adapter" if (source.directory / ADAPTER_NAME).exists() else ""


def _dtype(source: Source, asked: Asked) -> torch.dtype:
    """Return the dtype of activations."""
    return float_dtype_or_auto(asked.dtype) or usual_dtype(source, asked.device)


class _ByTransformers:
    """A model of transformers' classes."""

    def __init__(self, directory: Path, tokenizer: PreTrainedTokenizerBase, asked: Asked, why: str) -> None:
        from tersor.integrations.transformers.generate import Generator

        self.why, self._asked = why, asked
        model = load.ready_model(
            directory,
            asked.device,
            asked.dtype,
            activations=asked.activations,
            trust_remote_code=asked.trust_remote_code,
        )
        self._generator = Generator(model, tokenizer, cuda_graph=asked.cuda_graph)

    def stream(self) -> TextStream:
        return self._generator.stream(self._asked.prompt, self._asked.sampling)

    def samples(self) -> tuple[list[Continued], Statistics]:
        asked = self._asked
        rows, numbers = self._generator.samples(asked.prompt, asked.samples, asked.sampling)
        return [Continued(row.text, row.tokens, row.finish_reason) for row in rows], numbers


class _ByEngine:
    """An engine with rows for the continuations, and pages for their longest texts."""

    why = ""

    def __init__(
        self,
        directory: Path,
        tokenizer: PreTrainedTokenizerBase,
        asked: Asked,
        config: DecoderConfig,
        dtype: torch.dtype,
    ) -> None:
        self._asked = asked
        sampling, samples = asked.sampling.resolved(generation_config(directory)), asked.samples
        self._prompt = prompt_tokens(tokenizer, asked.prompt, config.vocabulary)
        prompt, most = len(self._prompt), sampling.max_new_tokens
        assert most is not None
        room = room_for(prompt, most, config.context)
        self._full = full(most, room)
        self._params = SamplingParams(
            n=samples,
            max_tokens=room,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            stop=sampling.stop,
            ignore_eos=sampling.ignore_eos,
        )
        self._llm = LLM(
            directory,
            tokenizer=tokenizer,
            device=str(asked.device),
            dtype=asked.dtype,
            activations=asked.activations,
            cuda_graph=asked.cuda_graph,
            max_length=prompt + room,
            max_rows=samples,
            max_step_tokens=max(samples, min(samples * prompt, STEP_TOKENS)),
            memory=1.0,
            kv_bytes=pages_for(prompt, room, samples) * page_bytes(config, dtype),
            trust_remote_code=asked.trust_remote_code,
            offload=asked.ranks.offload,
            resident_layers=asked.ranks.resident_layers,
            offload_directory=asked.ranks.offload_directory,
            tensor_parallel=asked.ranks.tensor_parallel,
            pipeline_parallel=asked.ranks.pipeline_parallel,
            expert_parallel=asked.ranks.expert_parallel,
            placement=asked.ranks.placement,
        )

    def stream(self) -> TextStream:
        stream = TextStream(len(self._prompt))
        stream.pieces = self._pieces(stream)
        return stream

    def samples(self) -> tuple[list[Continued], Statistics]:
        numbers = Statistics(prompt_tokens=len(self._prompt), samples=self._params.n)
        for output in self._outputs(numbers):
            last = output
        return [Continued(one.text, one.token_ids, self._reason(one)) for one in last.outputs], numbers

    def _pieces(self, stream: TextStream) -> Iterator[str]:
        """Yield what becomes complete of the text of one continuation."""
        shown = 0
        for output in self._outputs(stream.statistics):
            (one,) = output.outputs
            stream.tokens = one.token_ids
            piece, shown = one.text[shown:], len(one.text)
            if piece:
                yield piece

    def _outputs(self, numbers: Statistics) -> Iterator[RequestOutput]:
        """Yield the output as it grows, its statistics kept up."""
        runner = self._llm.runner
        numbers.capture_seconds = runner.capture_seconds
        numbers.cuda_graph = bool(runner.graphs) and not runner.repeats
        numbers.eager_reason = runner.eager_reason or None
        started = time.perf_counter()
        first, before = 0.0, 0  # when every continuation had a token, and how many all had then
        with closing(self._llm.stream(self._prompt, self._params)) as outputs:
            for output in outputs:
                self._check(output)
                now, numbers.new_tokens = time.perf_counter(), sum(len(one.token_ids) for one in output.outputs)
                if before:
                    numbers.decode_seconds = now - first
                    numbers.tokens_per_second = (numbers.new_tokens - before) / numbers.decode_seconds
                elif all(one.token_ids for one in output.outputs):
                    first, before = now, numbers.new_tokens
                    numbers.prefill_seconds = first - started
                if output.finished:
                    numbers.finish_reason = together(self._reason(one) for one in output.outputs)
                yield output

    def _check(self, output: RequestOutput) -> None:
        """Raise where a token could not be drawn: which, and the first part of the model that is wrong."""
        for one in output.outputs:
            if one.finish_reason == ERROR:
                seen = ""
                if self._asked.ranks.ranks == 1:  # else no rank has the whole model
                    seen = first_not_finite(self._llm.runner.decoder, [*self._prompt, *one.token_ids])
                raise TersorError(
                    f"new token {len(one.token_ids) + 1} cannot be drawn: its logits are not finite{seen}: "
                    "try bfloat16 or float32"
                )

    def _reason(self, one: CompletionOutput) -> str | None:
        """Return why a continuation ended, in the words of `Statistics`."""
        if one.finish_reason != STOP:
            return one.finish_reason and self._full
        return "eos" if one.stop_reason is None else "stop"


def pages_for(prompt: int, room: int, samples: int) -> int:
    """Return how many pages an engine needs for one prompt: that of padding, those that all share, and their own.

    Args:
        prompt: tokens of the prompt.
        room: tokens that each continuation may draw; the last one is never stored.
        samples: continuations.
    """
    shared = (prompt - 1) // PAGE
    return 1 + shared + samples * (-(-(prompt + room - 1) // PAGE) - shared)


def page_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Return bytes of a page, of all layers of a model together, with keys and values in `dtype`."""
    return sum(PagedCache.empty(1, layer.attention, dtype, "meta").pages.nbytes for layer in config.layers)
