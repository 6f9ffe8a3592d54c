"""Packed layers as targets of peft's LoRA: trained, saved, loaded, merged by decoding, and unmerged.

peft takes layers of other libraries by `LoraConfig._register_custom_module`, which each configuration has to be told.
`register` lets peft tell every one, at the moment it wraps a packed layer, so that nobody else has to.
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from tersor.errors import UnsupportedError
from tersor.integrations.transformers.expert_parts import ExpertMixed, ExpertPart
from tersor.integrations.transformers.joined import PackedPart
from tersor.integrations.transformers.replace import AnyLinear, AnyPacked, is_conv1d, plain_module, turned
from tersor.nn.embedding import PackedEmbedding, TiedLinear
from tersor.nn.experts import PackedStack
from tersor.nn.linear import PackedLinear
from tersor.nn.mixed import MixedLinear
from tersor.nn.mixed_stack import MixedStack
from tersor.nn.sparse import SparseLinear

_REWRITES = ("pissa", "olora", "corda", "loftq", "orthogonal", "lora_ga", "mica")
"""Ways to initialise an adapter that change the base weight, or take their start from its gradient."""


class _OverPacked:
    """What LoRA layers over packed ones share: a merge puts a plain layer in the packed one's place."""

    base_layer: nn.Module
    merged_adapters: list[str]
    _packed: tuple[AnyPacked, ...] = ()

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return _features(module)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            UnsupportedError: its initialisation needs a base weight that can be written.
        """
        config = kwargs.get("config")
        chosen = kwargs.get("init_lora_weights", getattr(config, "init_lora_weights", True))
        if isinstance(chosen, str) and chosen.lower().startswith(_REWRITES):
            raise UnsupportedError(
                f"init_lora_weights={chosen!r} starts from a base weight that can be written or trained, and this one "
                "is packed: use True or 'gaussian'"
            )
        if getattr(config, "kasa_config", None) is not None:
            raise UnsupportedError("KaSA rewrites the base weight, which is packed: leave kasa_config out")
        self.in_features, self.out_features = _features(self.get_base_layer())  # type: ignore[attr-defined]
        super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Decode the base layer and add adapters to it: afterwards it is a plain layer in the packed one's dtype.

        Args:
            safe_merge: whether sums that are not finite are refused, with the layer left as it was.
            adapter_names: which adapters; the active ones when `None`.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if not adapter_names:
            return
        base = self.base_layer
        if isinstance(base, AnyPacked):
            self._packed, self.base_layer = (base,), plain_module(base, base.dtype)
        # A Conv1D keeps [IC, OC]; deltas are [OC, IC], like the packed weight.
        if is_conv1d(self.base_layer):
            self.base_layer = turned(self.base_layer)
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        finally:
            if not self.merged_adapters:
                self._put_back()
            elif getattr(self._packed[0], "transposed", False):
                self.base_layer = turned(self.base_layer)

    def unmerge(self) -> None:
        """Put the packed layer back, exactly as it was."""
        self.merged_adapters.clear()
        self._put_back()

    def _put_back(self) -> None:
        if self._packed:
            (packed,), self._packed = self._packed, ()
            weight: Any = self.base_layer.weight
            self.base_layer = packed.to(device=weight.device, dtype=weight.dtype)


class PackedLoraLinear(_OverPacked, Linear):
    """LoRA over a `PackedLinear`, `MixedLinear` or `SparseLinear`, whatever kind of layer that stands for."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(base_layer, PackedPart) and base_layer.join.gated:
            base_layer.join.keep_apart()  # gate and up as one product have no place for an adapter
        elif isinstance(base_layer, ExpertPart | ExpertMixed):
            base_layer.experts.keep_apart()  # nor has a layer of experts
        super().__init__(base_layer, adapter_name, *args, **kwargs)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; a packed weight is [OC, IC], so `fan_in_fan_out` of the layer it stands for does not hold."""
        self.fan_in_fan_out = False
        super().update_layer(adapter_name, *args, **kwargs)


class PackedLoraEmbedding(_OverPacked, Embedding):
    """LoRA over a `PackedEmbedding`."""


def _features(module: Any) -> tuple[int, int]:
    if isinstance(module, PackedEmbedding | nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if is_conv1d(module):
        return int(module.nx), int(module.nf)
    return module.in_features, module.out_features


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    PackedLinear: PackedLoraLinear,
    MixedLinear: PackedLoraLinear,
    SparseLinear: PackedLoraLinear,
    PackedEmbedding: PackedLoraEmbedding,
}
"""Packed layer -> the LoRA layer over it."""


_INCLUDES = "_maybe_include_all_linear_layers"
"""What peft calls the function that spells `all-linear` out."""


def register() -> None:
    """Let peft wrap packed layers, count them among `all-linear`, and see packed embeddings tied. Idempotent."""
    if getattr(LoraModel, "_serves_tersor", False):
        return
    LoraModel._serves_tersor = True
    LoraModel._create_new_module = staticmethod(_telling(LoraModel._create_new_module))
    LoraModel._unload_and_optionally_merge = _keeping_tie(LoraModel._unload_and_optionally_merge)
    original: Any = getattr(tuners_utils, _INCLUDES)
    counted = _counting(original)
    for name, module in list(sys.modules.items()):
        if name.startswith("peft.") and getattr(module, _INCLUDES, None) is original:
            setattr(module, _INCLUDES, counted)


def _telling(create: Any) -> Any:
    @functools.wraps(create)
    def wrapped(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, PackedStack | MixedStack):
            raise UnsupportedError(
                "an adapter over the fused experts of a layer is not possible: leave them out of target_modules"
            )
        if isinstance(base, AnyPacked):
            lora_config._register_custom_module({**LAYERS, **(lora_config._custom_modules or {})})
        return create(lora_config, adapter_name, target, **kwargs)

    return wrapped


def _counting(include: Any) -> Any:
    @functools.wraps(include)
    def wrapped(peft_config: Any, model: Any) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        config = include(peft_config, model)
        if not isinstance(asked, str) or config.target_modules is asked or not isinstance(config.target_modules, set):
            return config
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        wrapped_already = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        config.target_modules |= {
            name
            for name, module in model.named_modules()
            if isinstance(module, AnyLinear)
            and module is not head
            and not any(name.startswith(f"{outer}.") for outer in wrapped_already)
        }
        return config

    return wrapped


def _keeping_tie(unload: Any) -> Any:
    """A packed head and its embedding share codes, not a decoded weight, by whose address peft would tell."""

    @functools.wraps(unload)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = getattr(self.model, "config", None)
        tied = getattr(config, "tie_word_embeddings", None)
        with warnings.catch_warnings():
            if _tied(self.model):
                warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            model = unload(self, *args, **kwargs)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if tied and _tied(model):
            config.tie_word_embeddings = tied  # type: ignore[union-attr]
        elif isinstance(head, TiedLinear):
            # The embedding was merged with its adapter and is plain now; the head keeps what both had, decoded, too.
            model.set_output_embeddings(plain_module(head, head.dtype))
        return model

    return wrapped


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return isinstance(head, TiedLinear) and model.get_input_embeddings() is head.source
