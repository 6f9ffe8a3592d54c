"""Which layers does the model of a config.json have? Built without memory, on torch's meta device, and asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tersor.checkpoint.modules import Architecture, Embedding, Linear
from tersor.errors import CheckpointError
from tersor.integrations.transformers import foreign


def read_architecture(directory: Path, *, trust_remote_code: bool = False) -> Architecture:
    """Build the model of a config.json on the meta device and list its layers.

    Args:
        directory: where config.json is.
        trust_remote_code: whether Python code that comes with the model is run.

    Raises:
        CheckpointError: transformers does not know the model type, or it is no causal language model, or it needs code
            that is not trusted.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _quiet_transformers(), foreign.unasked():
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, attn_implementation="eager", trust_remote_code=trust_remote_code
                )
        except Exception as error:
            raise CheckpointError(f"{directory}: {_reason(error)}") from None
    return architecture_of(model)


def architecture_of(model: Any) -> Architecture:
    """List the layers of a model of transformers, whatever device it is on."""
    from transformers.pytorch_utils import Conv1D

    linears: dict[str, Linear] = {}
    embeddings: dict[str, Embedding] = {}
    names = []
    for name, module in model.named_modules():
        names.append(name)
        if isinstance(module, torch.nn.Linear):
            linears[name] = Linear((module.out_features, module.in_features))
        elif isinstance(module, Conv1D):
            linears[name] = Linear((module.nf, module.nx), transposed=True)
        elif isinstance(module, torch.nn.Embedding):
            unpackable = "" if packable_embedding(module) else type(module).__name__
            embeddings[name] = Embedding((module.num_embeddings, module.embedding_dim), unpackable)
    output = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is output), "")
    return Architecture(
        name=type(model).__name__,
        linears=linears,
        embeddings=embeddings,
        modules=frozenset(names),
        base_prefix=model.base_model_prefix,
        head=head,
        tied=bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)),
    )


def packable_embedding(module: Any) -> bool:
    """Whether an embedding only looks rows up, or multiplies them by one number that is known, as Gemma's do."""
    if module.max_norm is not None:
        return False
    scaled = type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "scalar_embed_scale")
    return scaled or type(module).forward is torch.nn.Embedding.forward


def _reason(error: Exception) -> str:
    if foreign.is_refusal(error):
        return f"the model {foreign.REFUSAL}"
    text = next(iter(str(error).strip().splitlines()), "").strip() or type(error).__name__
    return f"transformers cannot build this model: {text}"


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' advice about the config off the terminal while it is only asked for shapes."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
