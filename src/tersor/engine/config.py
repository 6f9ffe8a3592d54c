"""How does an engine run? One value with every option and its default, which Python and the command line read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from tersor.errors import InputError, did_you_mean
from tersor.planner.placement import Placement

if TYPE_CHECKING:
    import torch

MANY_ROWS = 1024
"""Rows of a step where prompts are many and known at once: the more of them, the less often weights are read."""
SERVED_ROWS = 256
"""Rows of a step of a server, where every row that decodes waits for all others."""
KV_DTYPES = ("auto", "float16", "bfloat16", "float32", "fp8")
"""What keys and values are kept in: that of the activations, another, or e4m3 with a scale a token and head."""
OFFLOADS = ("host", "disk")
"""Where weights of layers may be that stream to the GPU in every step."""


_AXES = ("tensor_parallel", "pipeline_parallel", "expert_parallel")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of an engine.

    Attributes:
        device: auto, cpu, cuda or cuda:N; of several ranks that of the first, and the GPUs behind it are the others'.
        dtype: of activations: auto (that of the checkpoint on a GPU, float32 on a CPU), float16, bfloat16 or float32.
        activations: what linears multiply: 16bit, 8bit (int8 or fp8, as weights are), fp8, int8 or int8:g128.
        kv_dtype: what keys and values are kept in, one of `KV_DTYPES`.
        max_length: tokens of the longest text, prompt and answer; `None` is the model's context.
        max_rows: requests of a step at most; `None` is `MANY_ROWS`, or fewer where what rows take would be much of the
            memory (`memory.rows_of`).
        max_step_tokens: tokens of a step at most; longer prompts are read in several.
        memory: share of the GPU's memory that weights, graphs and pages may take together.
        kv_bytes: bytes of all pages of a rank, instead of what `memory` leaves; on a CPU 1 GiB unless given.
        prefix_caching: whether pages of prompts are kept for requests that begin the same.
        cuda_graph: whether steps of few rows that only decode are CUDA graphs (`runner.GRAPH_ROWS`); `None` is where
            they can be, on a GPU.
        seed: of requests that give none; `None` draws fresh ones.
        trust_remote_code: whether a tokenizer may run Python code that comes with the model.
        tensor_parallel: ranks that compute the model together, each with a part of every layer: a process and a GPU
            each (on a CPU: a process). Those of torchrun are used; without it, all but the first are started.
        offload: where the weights of layers are that do not fit on the GPU, one of `OFFLOADS`; they stream to it in
            every step. `None` has all on the device.
        resident_layers: layers that stay on the GPU with `offload`; `None` is as many as fit beside pages.
        offload_directory: of the file that `disk` makes; `None` is `offload` in Tersor's cache directory.
        pipeline_parallel: stages of as many ranks each, one behind the other, that have some of the layers.
        expert_parallel: groups of ranks in a stage that have whole experts; all else is cut by all ranks of a stage,
            which are `tensor_parallel` times as many.
        placement: instead of the three, who has what in full: a `Placement`, what JSON holds of one, or a file of it.
    """

    device: str = "auto"
    dtype: str = "auto"
    activations: str = "16bit"
    kv_dtype: str = "auto"
    max_length: int | None = None
    max_rows: int | None = None
    max_step_tokens: int = 8192
    memory: float = 0.9
    kv_bytes: int | None = None
    prefix_caching: bool = True
    cuda_graph: bool | None = None
    seed: int | None = None
    trust_remote_code: bool = False
    tensor_parallel: int = 1
    offload: str | None = None
    resident_layers: int | None = None
    offload_directory: str | None = None
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    placement: Placement | Mapping[str, Any] | str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPES:
            near = did_you_mean(self.kv_dtype, KV_DTYPES)
            raise InputError(f"kv_dtype {self.kv_dtype!r}{near}: use {', '.join(KV_DTYPES)}")
        for name in ("max_length", "max_rows", "max_step_tokens", "kv_bytes", *_AXES):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: it must be at least 1")
        if not 0 < self.memory <= 1:
            raise InputError(f"memory is {self.memory}: it must be above 0 and at most 1")
        if self.max_rows is not None and self.max_rows > self.max_step_tokens:
            raise InputError(
                f"max_rows is {self.max_rows}: a row has a token, and max_step_tokens is {self.max_step_tokens}"
            )

        if self.placement is not None:
            self._settle_placement(self.placement)
        self._check_offload()

    def _check_offload(self) -> None:
        offload = self.offload
        if offload is not None and offload not in OFFLOADS:
            raise InputError(f"offload {offload!r}{did_you_mean(offload, OFFLOADS)}: use {' or '.join(OFFLOADS)}")
        if self.resident_layers is not None and (offload is None or self.resident_layers < 0):
            why = "it goes with offload" if offload is None else "it must be at least 0"
            raise InputError(f"resident_layers is {self.resident_layers}: {why}")
        if self.offload_directory is not None and offload != "disk":
            raise InputError(f"offload_directory is {self.offload_directory!r}: it goes with offload disk")
        if offload is not None and self.ranks > 1:
            raise InputError(f"offload is {offload}, and {self.ranks_said}: weights stream to one GPU alone")

    def _settle_placement(self, given: Any) -> None:
        """Keep what was given as a `Placement`.

        Raises:
            InputError: it is none, is of several copies, or the axes say something too.
        """
        found = given
        if isinstance(given, Mapping):
            found = Placement.from_dict(given)
        elif not isinstance(given, Placement):
            found = Placement.read(given)
        for name in _AXES:
            if getattr(self, name) > 1:
                raise InputError(f"{name} is {getattr(self, name)}, and a placement says it all: give one of the two")
        if found.data > 1:
            raise InputError(
                f"the placement is of {found.data} copies of a model: an engine is one, tersor serve and batch run all"
            )
        object.__setattr__(self, "placement", found)

    @property
    def ranks(self) -> int:
        """How many processes compute the model together."""
        if isinstance(self.placement, Placement):
            return self.placement.ranks
        return self.tensor_parallel * self.pipeline_parallel * self.expert_parallel

    @property
    def ranks_said(self) -> str:
        """What says so, for an error."""
        if self.placement is not None:
            return f"the placement is of {self.ranks} ranks"
        said = [f"{name} is {getattr(self, name)}" for name in _AXES if getattr(self, name) > 1]
        return " and ".join(said) + (f", {self.ranks} ranks" if len(said) > 1 else "")

    def settled(self, device: str, placement: Placement) -> EngineConfig:
        """Return the same for a device, with a placement instead of axes."""
        return replace(
            self, device=device, placement=placement, tensor_parallel=1, pipeline_parallel=1, expert_parallel=1
        )

    def placed(self, layers: int) -> Placement:
        """Return who has what of a model of so many layers.

        Raises:
            InputError: it has fewer layers than there are stages.
        """
        if isinstance(self.placement, Placement):
            return self.placement
        return Placement.even(
            layers, pipeline=self.pipeline_parallel, tensor=self.tensor_parallel, expert=self.expert_parallel
        )

    @property
    def pages_dtype(self) -> torch.dtype | None:
        """The dtype of keys and values; `None` is that of the model's activations."""
        import torch

        from tersor.formats import FLOAT_DTYPES

        return {"auto": None, "fp8": torch.float8_e4m3fn, **FLOAT_DTYPES}[self.kv_dtype]

    @classmethod
    def of(cls, **options: Any) -> EngineConfig:
        """Return a config of options by name.

        Raises:
            InputError: an option that there is not, or a value that it cannot have.
        """
        known = [one.name for one in fields(cls)]
        for name in options:
            if name not in known:
                raise InputError(f"option {name!r}{did_you_mean(name, known)}: there are {', '.join(known)}")
        return cls(**options)
