"""vLLM's quantisation method `tersor`: what it is configured by, and which layer gets what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tersor import settings
from tersor.checkpoint.config import QUANT_METHOD, QuantizationConfig, parse_ignore, parse_overrides, parse_scheme
from tersor.checkpoint.names import MERGED
from tersor.checkpoint.source import open_source
from tersor.errors import InputError
from tersor.integrations.vllm import checks, compat, plan
from tersor.integrations.vllm.embedding import TersorEmbeddingMethod, TersorTiedHeadMethod
from tersor.integrations.vllm.experts import TersorExpertsMethod
from tersor.integrations.vllm.linear import TersorLinearMethod
from tersor.ops.dispatch import activations_for

NAME = QUANT_METHOD
_OPTIONS = ("format", "ignore", "overrides")
_DECODED = ("mxfp4", "gpt_oss_mxfp4")
"""What vLLM calls the method by which gpt-oss is released, of which weights are decoded and packed while loading."""


class TersorVllmConfig(compat.QuantizationConfig):
    """How the weights of a model are stored, or packed while they are loaded.

    Attributes:
        parsed: quantization_config of config.json, or what is asked for of a plain checkpoint.
        stored: whether the checkpoint is compressed already.
        activations: what packed weights are multiplied with.
        plan: which weight of the checkpoint is which layer's.
    """

    @checks.in_one_line
    def __init__(self, parsed: QuantizationConfig | None = None, stored: bool = False) -> None:
        """Take what is asked for; without a configuration that is `TERSOR_VLLM_FORMAT` of every linear layer."""
        super().__init__()
        if parsed is None:
            text = settings.get("TERSOR_VLLM_FORMAT")
            parsed = QuantizationConfig(parse_scheme(text, None, None, "environment variable TERSOR_VLLM_FORMAT"))
        self.parsed, self.stored = parsed, stored
        self.activations = activations_for(settings.get("TERSOR_VLLM_ACTIVATIONS"), parsed.schemes)
        self.plan: plan.Plan | None = None
        self._tied = self._embeds_packed = False

    def __repr__(self) -> str:
        return f"TersorVllmConfig({self.parsed.scheme.key()}, activations={self.activations})"

    @classmethod
    def get_name(cls) -> str:
        """Return `tersor`."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes of activations that kernels take."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest compute capability that has kernels, times 10."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: config.json says it, and of a plain checkpoint the environment does."""
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Return `tersor` where it is asked for of another method's checkpoint that is packed while it is loaded."""
        return NAME if user_quant == NAME and hf_quant_cfg.get("quant_method") in _DECODED else None

    @classmethod
    @checks.in_one_line
    def from_config(cls, config: dict[str, Any]) -> TersorVllmConfig:
        """Read quantization_config of a compressed checkpoint; one of another method is what is packed while loading.

        Raises:
            TersorError: unknown keys, a newer version, values that are none.
        """
        if config.get("quant_method") in _DECODED:
            return cls()
        return cls(QuantizationConfig.from_dict(config), stored=True)

    @classmethod
    @checks.in_one_line
    def from_config_dict_json(cls, text: str) -> TersorVllmConfig:
        """Read what is asked for of a plain checkpoint: `format`, `ignore` and `overrides`, as a text of JSON.

        Raises:
            TersorError: no such text, an unknown option, a pattern or format that is none.
        """
        try:
            asked = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"quantization_config_dict_json is no JSON: {error}") from None
        if not isinstance(asked, Mapping) or set(asked) - set(_OPTIONS):
            raise InputError(f"quantization_config_dict_json is {text}: an object with {', '.join(_OPTIONS)}")
        scheme = parse_scheme(str(asked.get("format", "fp6")), None, None, "quantization_config_dict_json")
        ignore = tuple(parse_ignore(asked.get("ignore", ())))
        return cls(QuantizationConfig(scheme, tuple(parse_overrides(asked.get("overrides", {}))), ignore))

    @checks.in_one_line
    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the headers of the checkpoint, once, in vLLM's main process.

        What decides the graphs that vLLM compiles and keeps becomes a part of `hf_config`, which names them.

        Raises:
            TersorError: a checkpoint that is not whole, or that vLLM cannot run packed; the line says why.
        """
        directory, foreign = Path(model_name), type(hf_config).__module__.startswith("transformers_modules.")
        if directory.is_dir() and not plan.has_weights(directory):  # vLLM itself refuses where it wants some
            self.plan = plan.without_weights(directory, self.parsed, trust_remote_code=foreign)
        else:
            with open_source(model_name, None if directory.is_dir() else revision) as source:
                make = plan.of_checkpoint if self.stored else plan.while_loading
                self.plan = make(source, self.parsed, trust_remote_code=foreign)
        text = None if hf_config is None else hf_config.get_text_config()
        methodless = compat.methodless(getattr(hf_config, "architectures", None) or [])
        checks.of_checkpoint(self.plan, self.activations, {} if text is None else text.to_dict(), methodless)
        if hf_config is not None and text is not None:
            self._tied = bool(getattr(text, "tie_word_embeddings", False))
            if self._tied and any(stem.rpartition(".")[2] == "lm_head" for stem in self.plan.stored):
                self._tied = text.tie_word_embeddings = hf_config.tie_word_embeddings = False  # a weight of its own
            hf_config.tersor = {"plan": self.plan.digest, "activations": str(self.activations)}

    def verify(self, started: checks.Started) -> None:
        """Hold that weights can be packed as vLLM is started, in its main process, which calls it once it knows that.

        Raises:
            UnsupportedError: they cannot; the line says why.
        """
        checks.of_gpu(self.activations, started.capability)
        if self.plan is not None:
            checks.of_start(self.plan, started)

    def get_cache_scale_mapper(self) -> Any:
        """Return what vLLM's loader renames weights by, which takes stacked experts apart."""
        mapper = super().get_cache_scale_mapper()
        return mapper if self.plan is None else compat.unstacking(mapper, self.plan.stacks, self.plan.architecture)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call stored weights what vLLM's model calls its layers."""
        if self.plan is not None:
            self.plan = self.plan.renamed(lambda name: next(iter(hf_to_vllm_mapper.apply_list([name])), None))

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Return what holds and multiplies the weights of a layer; `None` where vLLM does.

        Raises:
            UnsupportedError: packed weights in a layer that cannot hold them.
        """
        found = self.plan
        if found is None:
            raise InputError("vLLM has not read the checkpoint's headers: this release does not fit Tersor")
        if isinstance(layer, compat.RoutedExperts):
            names = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name]
            if None in names:  # experts without a gate
                return None
            experts = found.of_experts(prefix, names)
            if experts is None:
                return None
            whole = found.handed_whole(prefix)
            return TersorExpertsMethod(layer.moe_config, experts, names, self.activations, whole)
        if isinstance(layer, compat.ParallelLMHead):
            if prefix in found.stored:
                return TersorEmbeddingMethod(found.stored[prefix], self.activations)
            return TersorTiedHeadMethod(self.activations) if self._embeds_packed and self._tied else None
        if isinstance(layer, compat.VocabParallelEmbedding):
            embedding = found.of_embedding(prefix)
            self._embeds_packed = self._embeds_packed or embedding is not None
            return None if embedding is None else TersorEmbeddingMethod(embedding, self.activations)
        if not isinstance(layer, compat.LinearBase):
            return None
        weights = found.of_layer(prefix, {**MERGED, **self.packed_modules_mapping})
        if weights is None:
            return compat.UnquantizedLinearMethod()
        return TersorLinearMethod(weights, self.activations)
