"""Tersor checkpoints in transformers: `from_pretrained`, compression while loading, `save_pretrained`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tersor.checkpoint.config import QUANT_METHOD, VERSION, QuantizationConfig, parse_overrides, scheme_to_dict
from tersor.errors import FormatError, NonFiniteError, TersorError, UnsupportedError
from tersor.formats import TABLE_DTYPES, Scheme, get_scheme
from tersor.integrations import register

NAME = QUANT_METHOD


class TersorConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=...)` takes, and what config.json holds.

    Attributes:
        parsed: the same as a value; patterns are searched for in module names, `ignore` wins, then the first override.
    """

    def __init__(
        self,
        format: str = "fp6",
        group_size: int | None = None,
        scale_dtype: str | None = None,
        ignore: Sequence[str] = (),
        overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
    ) -> None:
        """Choose how to compress a model while it is loaded.

        Args:
            format: such as `fp6` (`fp6_e2m3`), `int4` or `mxfp6_e2m3`.
            group_size: consecutive input channels that share a scale; `None` is one scale a row.
            scale_dtype: `float16` (default), `bfloat16`, `float32` or `e8m0`; tables default to the model's dtype where
                that has 16 bits.
            ignore: patterns of modules left as they are; output heads, embeddings and routers are left anyway, unless
                an override spells their name.
            overrides: pattern -> `"int8"`, `"int8:g64:bfloat16"`, or a mapping with format, group_size, scale_dtype.

        Raises:
            InputError: a pattern, format or option that is not one.
        """
        self.quant_method = NAME  # type: ignore[assignment]  # the base class lists its own methods
        self._asked: tuple[Any, ...] | None = (format, group_size, scale_dtype, overrides or {})
        stated = {
            override.pattern: scheme_to_dict(override.scheme)
            for override in parse_overrides(overrides or {}, group_size, scale_dtype)
        }
        self.parsed = QuantizationConfig.from_dict(
            {
                "quant_method": NAME,
                "version": VERSION,
                "format": format,
                "group_size": group_size,
                "scale_dtype": scale_dtype,
                "overrides": stated,
                "ignore": list(ignore) if not isinstance(ignore, str) else ignore,
            }
        )

    @classmethod
    def from_parsed(cls, parsed: QuantizationConfig) -> TersorConfig:
        """Wrap a parsed configuration."""
        config = cls.__new__(cls)
        config.quant_method = NAME  # type: ignore[assignment]
        config.parsed, config._asked = parsed, None
        return config

    def beside(self, dtype: torch.dtype) -> QuantizationConfig:
        """Return what is asked for of a model in `dtype`, which tables have where no scale dtype is asked for."""
        table_dtype = str(dtype).removeprefix("torch.")
        if self._asked is None or table_dtype not in TABLE_DTYPES:
            return self.parsed
        format, group_size, scale_dtype, overrides = self._asked
        return replace(
            self.parsed,
            scheme=get_scheme(format, group_size, scale_dtype, table_dtype),
            overrides=tuple(parse_overrides(overrides, group_size, scale_dtype, table_dtype)),
        )

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Parse the `quantization_config` of a config.json.

        Raises:
            CheckpointError: unknown keys, a newer version, values that are none.
        """
        config = cls.from_parsed(QuantizationConfig.from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the `quantization_config` of a config.json."""
        return self.parsed.to_dict()

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Take nothing: a checkpoint's configuration does not change when it is read. Returns all of `kwargs`."""
        return kwargs

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TersorConfig) and self.parsed == other.parsed

    __hash__ = None  # type: ignore[assignment]


class TersorHfQuantizer(HfQuantizer):
    """Replaces linear layers and embeddings by packed ones before transformers loads, and checks that all arrived."""

    requires_calibration = False
    quantization_config: TersorConfig

    def __init__(self, quantization_config: TersorConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._schemes: dict[str, Scheme] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._heads: dict[str, str] = {}
        self._dropped: set[tuple[str, ...]] = set()
        self._dropped_converters: list[Any] = []
        self._replaced: dict[tuple[str, ...], Any] = {}
        self._renamings: list[Any] = []
        self._one_by_one = False
        self._failure: TersorError | None = None

    def restored(self, heads: Mapping[str, str], one_by_one: bool) -> None:
        """Take note of a model that was packed in memory.

        Args:
            heads: output heads that share a packed embedding, which decoding the model ties again.
            one_by_one: whether there are experts that run one after the other.
        """
        self._heads, self._one_by_one = dict(heads), one_by_one

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work: parts of the model on disk."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise UnsupportedError("packed layers cannot be offloaded to disk: leave 'disk' out of device_map")

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        from tersor.integrations.transformers import whole_model
        from tersor.integrations.transformers.packing import decide_compression, open_checkpoint, pack_checkpoint

        whole_model.register()
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedError("packed layers cannot be sharded by transformers yet: use device_map")
        if not checkpoint_files:
            raise UnsupportedError(
                "tersor reads names and dtypes from the checkpoint's files: state_dict alone is not enough"
            )
        with open_checkpoint(checkpoint_files, model.config.name_or_path) as source:
            if self.pre_quantized:
                placement, self._heads = pack_checkpoint(model, source, self.quantization_config.parsed)
            else:
                asked = self.quantization_config.beside(dtype or model.dtype)
                parsed, placement, self._schemes, self._heads = decide_compression(model, source, asked)
                self.quantization_config = TersorConfig.from_parsed(parsed)
                model.config.quantization_config = self.quantization_config
        self._dropped, self._dtypes = placement.dropped, placement.dtypes
        self._replaced, self._renamings = placement.replaced, placement.renamings

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Take out the converters that merge experts which were split; add what compressed fused ones need."""
        from transformers.core_model_loading import WeightConverter

        from tersor.integrations.transformers.placement import identity

        def dropped(entry: Any) -> bool:
            return isinstance(entry, WeightConverter) and identity(entry) in self._dropped

        self._dropped_converters = [entry for entry in weight_conversions if dropped(entry)]
        kept = [entry for entry in weight_conversions if not dropped(entry)]
        return [
            *(
                self._replaced.get(identity(entry), entry) if isinstance(entry, WeightConverter) else entry
                for entry in kept
            ),
            *self._renamings,
        ]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is a weight to compress while loading."""
        return param_name.removesuffix(".weight") in self._schemes

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Return bytes per element once loaded, for the placement of layers on devices."""
        scheme = self._schemes.get(param_name.removesuffix(".weight"))
        return param.element_size() if scheme is None else scheme.bits_per_weight(param.shape[-1]) / 8

    def get_quantize_ops(self) -> ConversionOps:
        """Return what compresses a weight as it arrives."""
        return _Compress(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from tersor.integrations.transformers.packing import check_loaded, join_experts, restore_dtypes, tie_heads

        if self._failure is not None:
            raise self._failure
        check_loaded(model)
        tie_heads(model, self._heads)
        restore_dtypes(model, self._dtypes)
        self._one_by_one = not join_experts(model)
        used = getattr(model, "_weight_conversions", None)
        if used is not None:  # what was loaded uncompressed is saved by them
            used += [entry for entry in self._renamings if entry not in used]
        for module in _packed_layers(model).values():
            module.prepare(module.dtype)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return the state dict with what GPU layers store moved to the CPU, so that the GPU holds no second copy."""
        handles = [
            module.register_state_dict_post_hook(_to_cpu)
            for module in _packed_layers(model).values()
            if module.in_state_dict and not module.as_stored
        ]
        if not handles:
            return None, {}
        try:
            return model.state_dict(), {}
        finally:
            for handle in handles:
                handle.remove()

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        from tersor.integrations.transformers.replace import unpack_model

        # save_pretrained leaves a name in config.dtype, which is what comes here.
        unpack_model(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype)
        if self._heads:
            del model._tied_weights_keys  # the class's own again
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        kept = getattr(model, "_weight_conversions", None)
        if kept is not None:  # else those of its class
            model._weight_conversions = [*self._dropped_converters, *kept]
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: it does."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on top: packed layers pass gradients on, and keep their own weight."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model: unless experts run one after the other, which depends on data."""
        return not self._one_by_one


class _Compress(ConversionOps):
    """Turns a plain weight into packed tensors and its layer into a packed layer, when the weight has been read."""

    def __init__(self, quantizer: TersorHfQuantizer) -> None:
        self._quantizer = quantizer

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        *,
        full_layer_name: str,
        model: Any,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if len(input_dict) == 1:
            (value,) = input_dict.values()
            return self._convert(full_layer_name, value, model, missing_keys)
        found: dict[str, Any] = {}
        for parameter, value in input_dict.items():  # a fused weight that a converter has taken apart
            if parameter.removesuffix(".weight") in self._quantizer._schemes:
                found |= self._convert(parameter, value, model, missing_keys)
            else:
                found[parameter] = value
        return found

    def _convert(self, full_layer_name: str, value: Any, model: Any, missing_keys: set[str] | None) -> dict[str, Any]:
        """Pack one layer; return the tensors that it stores, by name."""
        from tersor.checkpoint.pack import pack, pack_stack, underflow_words
        from tersor.integrations.transformers.packing import mark_initialized
        from tersor.integrations.transformers.replace import swap_packed, swap_stack
        from tersor.nn import PackedLinear, PackedStack

        weight: torch.Tensor = value[0] if isinstance(value, list) else value
        name = full_layer_name.removesuffix(".weight")
        scheme, dtype = self._quantizer._schemes[name], self._quantizer._dtypes[full_layer_name]
        stacked = weight.dim() == 3
        layer = (swap_stack if stacked else swap_packed)(model, name, scheme, dtype=dtype)
        transposed = isinstance(layer, PackedLinear | PackedStack) and layer.transposed
        mark_initialized(layer)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        # transformers would bury an exception from here in a report of several pages, so failures wait.
        failure: TersorError
        try:
            if stacked:
                packed = pack_stack(weight, scheme, transposed=transposed)
            else:
                packed = pack(weight.T if transposed else weight, scheme)
            if packed.underflowed:
                warnings.warn(
                    f"tensor {full_layer_name!r}: {underflow_words(packed.underflowed, scheme)}", stacklevel=2
                )
            return {f"{name}.{key}": tensor for key, tensor in packed.tensors.items()}
        except NonFiniteError as error:
            index = error.index[::-1] if transposed and not stacked else error.index
            failure = NonFiniteError(index, error.value, f"tensor {full_layer_name!r}")
        except FormatError as error:
            failure = FormatError(f"tensor {full_layer_name!r}: {error}")
        self._quantizer._failure = self._quantizer._failure or failure
        return {}


def _packed_layers(model: nn.Module) -> dict[str, Any]:
    from tersor.nn import MixedLinear, PackedLinear, PackedStack, SparseLinear

    kinds = PackedLinear | MixedLinear | SparseLinear | PackedStack
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _to_cpu(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in (prefix + own for own in module.own_tensors()):
        state_dict[name] = state_dict[name].cpu()


register()
