"""Which layers does the model of a config.json have? Built without memory, on torch's meta device, and asked."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.modules import Architecture, Embedding, Linear
from tersor.errors import CheckpointError, UnsupportedError
from tersor.integrations.transformers import foreign
from tersor.integrations.transformers.experts_form import experts_form, is_experts
from tersor.integrations.transformers.process import Changed

_SAME_AS_LINEAR = ("FalconLinear",)
"""Subclasses of `nn.Linear` in transformers with a forward of their own that computes the same."""
_READ_BY_OTHERS = ("NonDynamicallyQuantizableLinear",)
"""Subclasses of `nn.Linear` whose weight is multiplied by the module that holds them."""


def read_architecture(directory: Path, *, trust_remote_code: bool = False, untied: bool = False) -> Architecture:
    """Build the model of a config.json on the meta device and list its layers.

    Args:
        directory: where config.json is.
        trust_remote_code: whether Python code that comes with the model is run.
        untied: whether the output head has a weight of its own, whatever config.json says.

    Raises:
        CheckpointError: transformers does not know the model type, or cannot build the model, or needs code for it
            that is not trusted.
    """
    return architecture_of(meta_model(directory, trust_remote_code=trust_remote_code, untied=untied)[0])


def meta_model(directory: Path, *, trust_remote_code: bool = False, untied: bool = False) -> tuple[Any, bool]:
    """Build the model of a config.json on the meta device; return it, and whether config.json ties its output head.

    Args, Raises: as of `read_architecture`.
    """
    from transformers import AutoConfig

    with _quiet_transformers(), foreign.unasked():
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
            tied = untie(config) if untied else is_tied(config)
            build = model_class(config, trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                return build._from_config(config, attn_implementation="eager"), tied
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{directory}: {_reason(error)}") from None


def is_tied(config: Any) -> bool:
    """Whether a config lets the output head share the embedding's weight."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def untie(config: Any) -> bool:
    """Give the output head of a config a weight of its own; return whether it shared the embedding's."""
    tied = is_tied(config)
    for own in (config, config.get_text_config()):
        own.tie_word_embeddings = False
    return tied


def model_class(config: Any, *, trust_remote_code: bool = False) -> Any:
    """Return the class that a config describes: the one that it names, else one of transformers for its model type.

    Args:
        config: as transformers read it.
        trust_remote_code: whether the class that `auto_map` names goes before those of transformers.

    Raises:
        CheckpointError: transformers has no model for such a config, or needs code for it that is not trusted.
    """
    import transformers

    own = foreign.classes(config)
    if trust_remote_code and own:
        return foreign.load_class(config, own)
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            wanted = getattr(found, "config_class", None)
            if wanted is None or isinstance(config, wanted):
                return found
    for auto in (getattr(transformers, name) for name in own or foreign.AUTO_CLASSES):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, list | tuple) else found
    if own:
        raise CheckpointError(f"{config.name_or_path}: the model {foreign.REFUSAL}")
    raise CheckpointError(f"transformers has no model for the config of a {config.model_type!r}")


def architecture_of(model: Any) -> Architecture:
    """List the layers of a model of transformers, whatever device it is on."""
    from tersor.integrations.transformers.names import Names

    linears: dict[str, Linear] = {}
    embeddings: dict[str, Embedding] = {}
    experts: dict[str, str] = {}
    stacks: dict[str, Linear] = {}
    towers = _towers(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            shape = linear_shape(module)
            unpackable = type(module).__name__ if shape is None else ""
            plain = shape or (int(module.out_features), int(module.in_features))
            linears[name] = Linear(plain, is_conv1d(module), towers.get(name, ""), unpackable)
        elif isinstance(module, nn.Embedding):
            unpackable = "" if packable_embedding(module) else type(module).__name__
            embeddings[name] = Embedding((module.num_embeddings, module.embedding_dim), unpackable)
        elif is_experts(module):
            experts[name] = _experts_obstacle(module)
            stacks.update(stacks_of(name, module, towers.get(name, "")))
    output = model.get_output_embeddings()
    modules = dict(model.named_modules())
    base = model.base_model_prefix
    names = Names(model)
    return Architecture(
        name=type(model).__name__,
        linears=linears,
        embeddings=embeddings,
        experts=experts,
        stacks=stacks,
        modules=frozenset(modules),
        head=next((name for name, module in modules.items() if output is not None and module is output), ""),
        tied=is_tied(model.config),
        base=base if isinstance(modules.get(base), nn.Module) and base else "",
        find=names.find,
        missing=names.missing,
    )


def _towers(model: Any) -> dict[str, str]:
    """Return for each linear layer outside the language model the part that it is in: a tower, or a projector.

    A model of several modalities holds a model of text, whose config is a part of its own: all that is not in there is
    outside. A model that reads no text has no outside.
    """
    from transformers import PreTrainedModel

    inner = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    if "text" not in _modalities(model) or all(_modalities(module) == {"text"} for module in inner.values()):
        return {}
    whole = model.config
    ours = _text_configs(whole)
    # Without a config of text in its own, a model is one piece (Whisper), but for parts with configs of their own.
    speaks = {
        name: _reads_text(module) and module.config in ours if ours else _reads_text(module) or module.config is whole
        for name, module in inner.items()
    }
    outside: dict[str, str] = {}
    inside = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) and not is_conv1d(module) and not is_experts(module):
            continue
        around = [part for part in inner if not part or name.startswith(part + ".")]
        if speaks[max(around, key=len)]:
            inside += 1
            continue
        # The largest part around the layer that holds no model of text, which may be a layer of a larger one.
        parts = [part for part in around if not any(speaks[other] for other in inner if _within(other, part))]
        frame = max((part for part in around if part not in parts), key=len, default="")
        below = name.removeprefix(f"{frame}." if frame else "").partition(".")[0]
        outside[name] = min(parts, key=len) if parts else f"{frame}.{below}".removeprefix(".")
    return outside if inside else {}


def _within(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(part + ".")


def _text_configs(config: Any) -> list[Any]:
    """Return the configs of text inside another; none where it is one itself."""
    try:
        main = config.get_text_config()
    except ValueError:  # several of them
        main = None
    if main is config:
        return []
    sides = [getattr(config, name, None) for name in ("encoder", "decoder", "text_encoder")]
    return [part.get_text_config() for part in (main, *sides) if hasattr(part, "get_text_config")]


def _reads_text(module: Any) -> bool:
    """Whether a model is one of text: it reads text, and its config is no frame around that of another."""
    try:
        own = module.config.get_text_config() is module.config
    except ValueError:
        own = False
    return own and "text" in _modalities(module)


def _modalities(module: Any) -> set[str]:
    found = module.input_modalities
    return {found} if isinstance(found, str) else set(found)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's Conv1D: a linear layer that keeps its weight as [IC, OC]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (OC, IC) of a linear layer that a `PackedLinear` can stand for, `None` for any other module."""
    if is_conv1d(module):
        return int(module.nf), int(module.nx)  # type: ignore[arg-type]
    name = type(module).__name__
    plain = type(module).forward is nn.Linear.forward and name not in _READ_BY_OTHERS
    if isinstance(module, nn.Linear) and (plain or name in _SAME_AS_LINEAR):
        return module.out_features, module.in_features
    return None


def packable_embedding(module: Any) -> bool:
    """Whether an embedding only looks rows up, or multiplies them by one number that is known, as Gemma's do."""
    if module.max_norm is not None:
        return False
    scaled = type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "scalar_embed_scale")
    return scaled or type(module).forward is nn.Embedding.forward


def _experts_obstacle(module: nn.Module) -> str:
    from tersor.integrations.transformers.experts import check_experts

    try:
        check_experts(module)
    except UnsupportedError as error:
        return str(error).partition(": ignore")[0]
    return ""


def stacks_of(name: str, module: nn.Module, tower: str = "") -> dict[str, Linear]:
    """Return the parameters that hold the weights of all experts of a layer, where they can run packed."""
    try:
        form = experts_form(module)
    except UnsupportedError:
        return {}
    rows = {form.fused: form.rows.value}
    return {
        f"{name}.{own}": Linear(form.shape(own), form.transposed, tower, rows=rows.get(own, "plain"))
        for own in form.names
    }


def _reason(error: Exception) -> str:
    if foreign.is_refusal(error):
        return f"the model {foreign.REFUSAL}"
    text = next(iter(str(error).strip().splitlines()), "").strip() or type(error).__name__
    return f"transformers cannot build this model: {text}"


def _verbosity() -> int:
    from transformers.utils import logging as said

    return said.get_verbosity()


def _say(level: int) -> None:
    from transformers.utils import logging as said

    said.set_verbosity(level)


_saying = Changed(_verbosity, _say)


def _quiet_transformers() -> contextlib.AbstractContextManager[None]:
    """Keep transformers' advice about the config off the terminal while it is only asked for shapes."""
    return _saying.to(logging.ERROR)
