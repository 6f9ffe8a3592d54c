"""The part of vLLM's interfaces that the plug-in touches, as small as it can be, for machines without vLLM.

Layers deal rows, columns and tokens out to ranks as vLLM's do, and hand tensors to parameters as its loaders do. That
vLLM has these names and arguments is held by `test_vllm_interfaces` where vLLM, or a wheel of it, is installed.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

CURRENT = SimpleNamespace(load_config=SimpleNamespace(load_format="auto"), ranks=1, rank=0, capability=None)
"""What vLLM's processes know: how weights are loaded, who this rank is, and the compute capability of the GPU."""
REGISTERED: dict[str, type] = {}
REGISTRY = SimpleNamespace(models={})
"""Name of a class -> an object with `module_name`, where it is."""


class QuantizeMethodBase:
    """Creates, holds and applies the weights of a layer."""


class LinearMethodBase(QuantizeMethodBase):
    """That of linear layers."""


class UnquantizedLinearMethod(LinearMethodBase):
    """That of linear layers which stay plain."""

    def create_weights(self, layer: nn.Module, *sizes: Any, **attributes: Any) -> None:
        """Hold nothing."""


class FusedMoEMethodBase(QuantizeMethodBase):
    """That of experts."""

    def __init__(self, moe: Any) -> None:
        self.moe = moe


class QuantizationConfig:
    """What a quantisation method is configured by."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @staticmethod
    def get_cache_scale_mapper() -> Mapper:
        """Return what loaders rename weights by."""
        return Mapper()


class VllmConfig:
    """What vLLM's main process is told; it verifies itself."""

    def __init__(self, quant_config: Any, **told: Any) -> None:
        uva, prefetch = SimpleNamespace(cpu_offload_gb=0.0), SimpleNamespace(offload_group_size=0)
        self.quant_config, self.lora_config, self.load_config = quant_config, None, SimpleNamespace(load_format="auto")
        self.offload_config = SimpleNamespace(uva=uva, prefetch=prefetch)
        ranks = dict.fromkeys(("tensor", "data", "prefill_context"), 1)
        sizes = {f"{name}_parallel_size": told.pop(name, size) for name, size in ranks.items()}
        switches = {name: told.pop(name, False) for name in ("enable_expert_parallel", "enable_eplb")}
        self.parallel_config = SimpleNamespace(**sizes, **switches)
        self.__dict__.update(told)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Verify."""


class LinearBase(nn.Module):
    """A linear layer of a rank."""

    def __init__(self, config: Any, prefix: str, input_size: int, sizes: list[int]) -> None:
        super().__init__()
        self.tp_size, self.tp_rank, self.prefix = CURRENT.ranks, CURRENT.rank, prefix
        self.input_size, self.params_dtype = input_size, torch.float32
        self.output_sizes, self.output_size = sizes, sum(sizes)
        self.quant_method = config.get_quant_method(self, prefix)
        own, rows = self.own(input_size, sizes)
        self.quant_method.create_weights(self, own, rows, input_size, self.output_size, self.params_dtype)

    def own(self, input_size: int, sizes: list[int]) -> tuple[int, list[int]]:
        """Return this rank's input channels, and rows of every weight."""
        return input_size, [size // self.tp_size for size in sizes]

    def load(self, name: str, tensor: torch.Tensor, shard: Any = None) -> None:
        """Take a tensor as vLLM's loaders hand it over, with a shard where the layer has several."""
        parameter = dict(self.named_parameters())[name]
        parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply."""
        return self.quant_method.apply(self, x, bias)


class ColumnParallelLinear(LinearBase):
    """Rows are dealt out."""


class MergedColumnParallelLinear(ColumnParallelLinear):
    """So are those of each of its weights."""


class QKVParallelLinear(ColumnParallelLinear):
    """Heads are dealt out; heads of keys and values are on several ranks where there are fewer."""

    def __init__(self, config: Any, prefix: str, input_size: int, head: int, heads: int, kv_heads: int) -> None:
        self.num_kv_head_replicas = max(1, CURRENT.ranks // kv_heads)
        every = max(kv_heads, CURRENT.ranks)
        super().__init__(config, prefix, input_size, [head * heads, head * every, head * every])


class RowParallelLinear(LinearBase):
    """Columns are dealt out."""

    def own(self, input_size: int, sizes: list[int]) -> tuple[int, list[int]]:
        return input_size // self.tp_size, sizes


class ReplicatedLinear(LinearBase):
    """All is on every rank."""

    def own(self, input_size: int, sizes: list[int]) -> tuple[int, list[int]]:
        return input_size, sizes


class VocabParallelEmbedding(nn.Module):
    """Tokens are dealt out, of a vocabulary that is padded to a multiple of 64."""

    def __init__(self, config: Any, prefix: str, tokens: int, hidden: int) -> None:
        super().__init__()
        self.org_vocab_size, padded = tokens, -(-tokens // 64) * 64
        self.num_embeddings_per_partition = own = padded // CURRENT.ranks
        first, last = (min(tokens, own * rank) for rank in (CURRENT.rank, CURRENT.rank + 1))
        self.shard_indices = SimpleNamespace(
            org_vocab_start_index=first, org_vocab_end_index=last, num_added_elements=0
        )
        self.quant_method = config.get_quant_method(self, prefix)
        if self.quant_method is not None:
            self.quant_method.create_weights(self, hidden, [own], hidden, padded, params_dtype=torch.float32)

    load = LinearBase.load


class ParallelLMHead(VocabParallelEmbedding):
    """An output head."""


class Activation(enum.Enum):
    """How gate and up of experts become one."""

    SILU = "silu"
    SWIGLUOAI = "swigluoai"


class RoutedExperts(nn.Module):
    """The experts of a layer; those from `first` on are this rank's."""

    activation, biased = Activation.SILU, False

    def __init__(self, config: Any, prefix: str, experts: int, hidden: int, inner: int, first: int = 0) -> None:
        super().__init__()
        self.layer_name, self.params_dtype = prefix, torch.float32
        self.ckpt_gate_proj_name, self.ckpt_up_proj_name, self.ckpt_down_proj_name = "gate_proj", "up_proj", "down_proj"
        self.apply_router_weight_on_input, self.swiglu_limit, self._first = False, None, first
        self.expert_map = None
        if first:
            self.expert_map = torch.tensor([-1] * first + list(range(experts - first)))
        parallel = SimpleNamespace(tp_size=CURRENT.ranks, tp_rank=CURRENT.rank, use_all2all_kernels=False)
        self.moe_config = SimpleNamespace(
            has_bias=self.biased, experts_per_token=1, moe_parallel_config=parallel, tp_shard_with_padding=False
        )
        self.quant_method = config.get_quant_method(self, prefix)
        if self.quant_method is not None:
            own = inner // CURRENT.ranks
            of = (self, experts - first, hidden, own, self.params_dtype)
            self.quant_method.create_weights(*of, global_num_experts=experts)

    def _map_global_expert_id_to_local_expert_id(self, expert: int) -> int:
        return max(-1, expert - self._first)

    def load(self, expert: int, projection: str, name: str, tensor: torch.Tensor) -> bool:
        """Take a tensor of an expert as vLLM's loader hands it over; tell whether this rank has the expert."""
        shard = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.get(projection, projection)
        parameter = getattr(self, f"{'w2' if shard == 'w2' else 'w13'}_{name}")
        return parameter.weight_loader(
            param=parameter,
            loaded_weight=tensor,
            weight_name=name,
            shard_id=shard,
            expert_id=expert,
            return_success=True,
        )


class ClampedExperts(RoutedExperts):
    """Those of gpt-oss, whose loader hands whole tensors to parameters of their names and passes over others."""

    activation, biased = Activation.SWIGLUOAI, True

    def take(self, name: str, tensor: torch.Tensor) -> bool:
        """Take a tensor of all experts; tell whether there is a parameter for it."""
        parameter = dict(self.named_parameters()).get(name)
        if parameter is not None:
            parameter.weight_loader(parameter, tensor)
        return parameter is not None


@dataclass
class Mapper:
    """Renames weights: a prefix becomes another, and so does what a name ends with."""

    prefixes: Mapping[str, str] = field(default_factory=dict)
    suffixes: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Mapper) -> Mapper:
        return Mapper({**self.prefixes, **other.prefixes}, {**self.suffixes, **other.suffixes})

    def apply(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield weights under new names."""
        for name, tensor in weights:
            yield self.apply_list([name])[0], tensor

    def apply_list(self, names: list[str]) -> list[str]:
        """Return new names."""
        found = []
        for name in names:
            for old, new in self.prefixes.items():
                if name.startswith(old):
                    name = new + name.removeprefix(old)
                    break
            for old, new in self.suffixes.items():
                if name.endswith(old):
                    name = name.removesuffix(old) + new
                    break
            found.append(name)
        return found


class Platform:
    """What a machine has."""

    def get_device_capability(self) -> Any:
        """Return the compute capability of the GPU, `None` where there is none."""
        if CURRENT.capability is None:
            return None
        return SimpleNamespace(**dict(zip(("major", "minor"), CURRENT.capability, strict=True)))


class GraniteMoeModel:
    """A model whose loader calls experts as its checkpoints do; that of 0.29 and newer has a mapper."""


def _register(name: str) -> Any:
    def decorate(config: type) -> type:
        assert issubclass(config, QuantizationConfig)
        REGISTERED[name] = config
        return config

    return decorate


_LAYERS = "vllm.model_executor.layers"
_MODULES: dict[str, dict[str, Any]] = {
    "vllm": {},
    "vllm.config": {"VllmConfig": VllmConfig, "get_current_vllm_config": lambda: CURRENT},
    "vllm.platforms": {"current_platform": Platform()},
    "vllm.model_executor": {},
    "vllm.model_executor.models": {"ModelRegistry": REGISTRY},
    "vllm.model_executor.models.granitemoe": {"GraniteMoeModel": GraniteMoeModel},
    _LAYERS: {},
    f"{_LAYERS}.fused_moe": {"FusedMoEMethodBase": FusedMoEMethodBase, "RoutedExperts": RoutedExperts},
    f"{_LAYERS}.linear": {
        "LinearBase": LinearBase,
        "LinearMethodBase": LinearMethodBase,
        "QKVParallelLinear": QKVParallelLinear,
        "ReplicatedLinear": ReplicatedLinear,
        "UnquantizedLinearMethod": UnquantizedLinearMethod,
    },
    f"{_LAYERS}.quantization": {"register_quantization_config": _register},
    f"{_LAYERS}.quantization.base_config": {
        "QuantizationConfig": QuantizationConfig,
        "QuantizeMethodBase": QuantizeMethodBase,
    },
    f"{_LAYERS}.vocab_parallel_embedding": {
        "ParallelLMHead": ParallelLMHead,
        "VocabParallelEmbedding": VocabParallelEmbedding,
    },
}


def names() -> dict[str, list[str]]:
    """Return module of vLLM -> what of it the stand-in has."""
    return {module: sorted(found) for module, found in _MODULES.items() if found}


@contextmanager
def installed() -> Iterator[SimpleNamespace]:
    """Let `import vllm` find the stand-in, and the plug-in be imported on top of it."""
    saved = {name: module for name, module in sys.modules.items() if _belongs(name)}
    for name in saved:
        del sys.modules[name]
    for name, attributes in _MODULES.items():
        module = ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        module.__dict__.update(attributes)
        sys.modules[name] = module
    REGISTERED.clear()
    verify = VllmConfig.__post_init__
    try:
        yield CURRENT
    finally:
        VllmConfig.__post_init__ = verify  # type: ignore[method-assign]
        for name in [name for name in sys.modules if _belongs(name)]:
            del sys.modules[name]
            owner, _, last = name.rpartition(".")
            sys.modules.get(owner, ModuleType(owner)).__dict__.pop(last, None)
        sys.modules.update(saved)
        CURRENT.ranks, CURRENT.rank, CURRENT.load_config.load_format, CURRENT.capability = 1, 0, "auto", None


def _belongs(name: str) -> bool:
    return name.split(".")[0] == "vllm" or name.startswith("tersor.integrations.vllm.")
