"""Which engines answer a batch file, and what is it answered with? A model here, in processes beside it, or on Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any

from tersor.checkpoint.source import open_source
from tersor.engine.batch_file import Progress, Report, run_batch
from tersor.engine.batch_items import BatchEngine, Item
from tersor.engine.config import EngineConfig
from tersor.engine.offline import OfflineEngine
from tersor.engine.outputs import Answer
from tersor.engine.processes import Processes
from tersor.engine.workers import by_torchrun, follows
from tersor.errors import InputError, UnsupportedError
from tersor.integrations.transformers.load import load_tokenizer
from tersor.llm import LLM, generation_config
from tersor.models.config import DecoderConfig, supported
from tersor.server.dialect import ModelDialect
from tersor.server.engines import LoadModel, check_count, of_several

_MATTERS = ("dtype", "activations", "kv_dtype", "max_length")
"""Fields of `EngineConfig` that answers depend on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How a batch is answered.

    Attributes:
        name: what requests and answers call the model; `None` is the last part of its path, and then requests may
            call it anything.
        defaults: options of sampling that requests have which do not give them.
        resume: whether a job that was begun is continued.
        retry_failed: whether it runs requests again that failed.
        errors: where failures go; `None` is beside the output.
        data_parallel: engines on this machine, each in a process and on a device of its own, or of several ranks each.
        ray: address of a Ray cluster, or `auto`: engines are its actors, `data_parallel` of them where that is above 1.
        threads: that torch has on a CPU for each of several engines; 0 leaves it to torch.
        tool_parser, reasoning_parser: as `ServerOptions` has them.
    """

    name: str | None = None
    defaults: Mapping[str, Any] | None = None
    resume: bool = False
    retry_failed: bool = False
    errors: str | None = None
    data_parallel: int = 1
    ray: str | None = None
    threads: int = 0
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"


@dataclass(frozen=True, slots=True)
class MakeEngine:
    """Makes the engine of a worker, in whatever process that is, of the model that `load` loads."""

    load: LoadModel

    def __call__(self, worker: int) -> OfflineEngine:
        """Load the model."""
        return OfflineEngine(self.load(worker).core)


class _Later:
    """An engine that is made when there is something to answer, so that a file is checked before a model is loaded."""

    def __init__(self, make: Callable[[], BatchEngine]) -> None:
        self._make, self._made = make, False

    def made(self) -> BatchEngine:
        """Make the engine."""
        self._made = True
        return self._make()

    def ensure(self) -> None:
        """Make the engine if nothing was answered, for ranks that wait to be let go."""
        if not self._made:
            self.made()

    def run(self, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[Answer]:
        yield from self.made().run(items, stopping)


def answer_file(
    model: str,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: EngineConfig,
    options: BatchOptions,
    *,
    revision: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_stop: Callable[[], None] = lambda: None,
) -> Report:
    """Answer the requests of a batch file by a model; see `batch_file.run_batch`.

    Args:
        model: a checkpoint directory or a Hub id.
        source, output: the batch file, and where answers go.
        config: of each engine.
        options: of the job.
        revision: branch, tag or commit of a Hub id.
        on_progress, on_stop: as `run_batch` takes them.

    Raises:
        InputError, UnsupportedError, CheckpointError, OutputError, TersorError: as `run_batch` and `LLM`.
    """
    if config.ranks > 1 and options.ray is not None:
        raise InputError(f"{config.ranks_said}, and engines are actors of Ray: those have a GPU each")
    check_count(options.data_parallel)
    if follows(config):
        LLM(model, revision=revision, **asdict(config))  # ends the process
    with open_source(model, revision=revision) as opened:
        why = supported(opened.config)
        if why:
            raise UnsupportedError(f"{opened.label}: {why}")
        sizes = DecoderConfig.from_dict(opened.config)
        generation = generation_config(opened.directory)
        tokenizer = load_tokenizer(opened.directory, trust_remote_code=config.trust_remote_code)
        weights = [[name, size, digest] for name, size, _, digest in opened.fingerprint()]
        name = options.name or opened.label
    dialect = ModelDialect(
        tokenizer,
        min(config.max_length or sizes.context, sizes.context),
        sizes.vocabulary,
        defaults=generation,
        tool_parser=options.tool_parser,
        reasoning_parser=options.reasoning_parser,
    )
    identity: dict[str, Any] = {
        "weights": weights,
        "generation": generation,
        **{field: getattr(config, field) for field in _MATTERS},
        "tool_parser": options.tool_parser,
        "reasoning_parser": options.reasoning_parser,
    }
    with ExitStack() as stack:
        engine = _Later(lambda: engine_of(model, revision, config, options, stack))
        report = run_batch(
            source,
            output,
            engine,
            dialect,
            model=name,
            identity=identity,
            models=(options.name,) if options.name else (),
            defaults=options.defaults,
            errors=options.errors,
            resume=options.resume,
            retry_failed=options.retry_failed,
            on_progress=on_progress,
            on_stop=on_stop,
        )
        if by_torchrun(config):
            engine.ensure()
        return report


def engine_of(
    model: str, revision: str | None, config: EngineConfig, options: BatchOptions, stack: ExitStack
) -> BatchEngine:
    """Return what answers; what has to be closed is left to `stack`.

    Raises:
        InputError: there is no device for each of several engines, or no such cluster.
    """
    count = options.data_parallel
    if options.ray is not None:
        from tersor.integrations.ray import RayEngines

        gpus = 0.0 if config.device == "cpu" else 1.0
        make = MakeEngine(LoadModel(model, revision, config, threads=options.threads))
        address = None if options.ray == "local" else options.ray
        return stack.enter_context(RayEngines(make, count if count > 1 else None, address=address, gpus=gpus))
    if count == 1:
        return OfflineEngine(stack.enter_context(closing(LoadModel(model, revision, config)(0))).core)
    make = MakeEngine(of_several(model, revision, config, count, options.threads))
    return stack.enter_context(Processes(make, count, parents=config.ranks > 1))
