"""One of several engines of this machine, that answer a batch or a server: which model it loads, on which devices."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from torch import distributed

from tersor.engine.config import EngineConfig
from tersor.errors import InputError
from tersor.hardware import resolve_device
from tersor.llm import LLM


@dataclass(frozen=True, slots=True)
class LoadModel:
    """Loads the model of an engine, in whatever process that is.

    Attributes:
        model, revision: which.
        config: of the engine.
        numbered: whether engine N runs on cuda:N, or of R ranks each on the R GPUs from cuda:(R N) on.
        threads: that torch has on a CPU for each of several engines; 0 leaves it to torch.
    """

    model: str
    revision: str | None
    config: EngineConfig
    numbered: bool = False
    threads: int = 0

    def __call__(self, number: int) -> LLM:
        """Load the model of an engine, of which a program that has it to itself can let go."""
        import torch

        config = self.config
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.numbered:  # in a process of its own, whose current device it may choose: calls need not, each of them
            first = number * config.ranks
            torch.cuda.set_device(first)
            config = replace(config, device=f"cuda:{first}")
        return LLM(self.model, revision=self.revision, **asdict(config))


def check_count(count: int) -> None:
    """Hold that several engines can be started here.

    Raises:
        InputError: torchrun started this process, and others that would do the same.
    """
    if count > 1 and distributed.is_torchelastic_launched():
        raise InputError(f"data_parallel is {count}, and torchrun started this process: several engines go without it")


def of_several(model: str, revision: str | None, config: EngineConfig, count: int, threads: int) -> LoadModel:
    """Return what loads each of several engines on this machine, on devices of its own.

    Raises:
        InputError: there are not so many.
    """
    device = resolve_device(config.device)
    if device.type == "cuda":
        import torch

        if config.device not in ("auto", "cuda"):
            raise InputError(f"device is {config.device}: {count} engines take a device each, say cuda")
        if count * config.ranks > torch.cuda.device_count():
            each = "a GPU" if config.ranks == 1 else f"{config.ranks} GPUs"
            raise InputError(f"{count} engines want {each} each, and this machine has {torch.cuda.device_count()}")
    return LoadModel(model, revision, config, numbered=device.type == "cuda", threads=threads)
