"""Load what an evaluation or a generation needs, with one line for everything that can be wrong with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tersor.checkpoint.header import WEIGHT_DTYPES
from tersor.checkpoint.source import open_source, read_config
from tersor.errors import CheckpointError, InputError, TersorError, one_line
from tersor.formats import Activations, float_dtype_or_auto
from tersor.hardware import resolve_device
from tersor.integrations.transformers import foreign, replace
from tersor.integrations.transformers import fuse as fusing
from tersor.integrations.transformers.architecture import model_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """Return the dtype of activations that `name` means.

    `auto` is the checkpoint's own dtype on a GPU and float32 on a CPU, where 16-bit products are both slower and less
    exact.

    Raises:
        InputError: not a dtype.
    """
    return float_dtype_or_auto(name) or (torch.float32 if device.type == "cpu" else "auto")


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that is there.

    Attributes:
        directory: where the checkpoint is.
        weight_bytes: bytes of its weight files.
        plain_bits: mean bits of a weight among those stored as floating point, embeddings included.
    """

    directory: Path
    weight_bytes: int
    plain_bits: float


def locate(path: str | Path, revision: str | None = None) -> Found:
    """Check that `path` is a whole checkpoint and say where and how large it is.

    Args:
        path: a checkpoint directory, or a hub id, which is downloaded.
        revision: branch, tag or commit of a hub id.

    Raises:
        InputError: neither, or not a whole checkpoint; the message says which file lacks what.
    """
    with open_source(path, revision) as source:
        specs = [item.spec for item in source.tensors.values()]
        plain = [spec for spec in specs if spec.dtype in WEIGHT_DTYPES and len(spec.shape) > 1]
        count = sum(spec.numel for spec in plain)
        bits = 8.0 * sum(spec.nbytes for spec in plain) / count if count else 0.0
        return Found(source.directory, sum(file.path.stat().st_size for file in source.files), bits)


def load_model(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model for inference.

    Args:
        path: a checkpoint directory or a hub id.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        dtype: `auto`, `float32`, `float16` or `bfloat16`; see `resolve_dtype`.
        trust_remote_code: whether Python code that comes with the model is run.

    Raises:
        InputError: no such directory, not a model, broken files, missing tensors, no such device, or code that is not
            trusted.
        TersorError: the model does not fit in the device's memory.
    """
    torch_device = device if isinstance(device, torch.device) else resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    directory = locate(path).directory
    from transformers import AutoConfig

    try:
        with foreign.unasked():
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
            loaded: Any = _causal_class(path, config, trust_remote_code).from_pretrained(
                directory,
                dtype=torch_dtype,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            )
        model, info = loaded[0].to(torch_device), loaded[1]
    except TersorError:
        raise
    except torch.OutOfMemoryError:
        raise TersorError(f"{path}: the model does not fit in the memory of {torch_device}") from None
    except Exception as error:  # transformers raises a dozen types for a checkpoint it cannot read
        if foreign.is_refusal(error):
            raise CheckpointError(f"{path}: the model {foreign.REFUSAL}") from None
        raise CheckpointError(f"{path}: cannot be loaded as a language model: {one_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: the checkpoint lacks {len(missing)} tensors of the model, such as {missing[0]!r}"
        )
    return model.eval()


def _causal_class(path: str | Path, config: Any, trust_remote_code: bool) -> Any:
    """Return the class that config.json describes, where it is one that continues a text."""
    build = model_class(config, trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder or not build.can_generate():
        raise CheckpointError(
            f"{path}: a {build.__name__} does not continue a text, which evaluating and generating need: use it "
            "through transformers"
        )
    return build


def ready_model(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    *,
    activations: Activations | str = Activations.NATIVE,
    fuse: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model and set how its packed layers run.

    Args:
        path, device, dtype, trust_remote_code: as for `load_model`.
        activations: what its packed linears multiply with; other layers are left as they are.
        fuse: whether packed layers that read the same activations are joined (`fuse.fuse`), which changes rounding.

    Raises:
        InputError: as for `load_model`; no such activations; nothing to join.
        UnsupportedError: a layer whose weight cannot be multiplied with such activations.
        TersorError: the model does not fit in the device's memory.
    """
    Activations.check(activations)
    model = load_model(path, device, dtype, trust_remote_code=trust_remote_code)
    if fuse and not fusing.fuse(model):
        raise InputError(f"{path} has no packed layers that can be joined: load it without fusing")
    replace.multiply_with(model, activations)
    return model


def quiet() -> None:
    """Keep transformers' progress bars and warnings off the terminal, for the rest of the process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Args:
        path: a checkpoint directory or a hub id.
        trust_remote_code: whether Python code that comes with the tokenizer is run.

    Raises:
        InputError: no such directory, no tokenizer in it, or one that needs code that is not trusted.
    """
    directory = locate(path).directory
    from transformers import AutoTokenizer

    if not any(True for part in ("*token*", "*vocab*", "*.tiktoken") for _ in directory.glob(part)):
        raise CheckpointError(f"{path}: has no tokenizer: copy tokenizer.json and tokenizer_config.json there")
    try:
        with foreign.unasked():
            config = _config_for_tokenizer(directory)
            return AutoTokenizer.from_pretrained(directory, config=config, trust_remote_code=trust_remote_code)
    except Exception as error:  # likewise
        if foreign.is_refusal(error):
            raise CheckpointError(f"{path}: the tokenizer {foreign.REFUSAL}") from None
        raise CheckpointError(f"{path}: the tokenizer cannot be loaded: {one_line(error)}") from error


def _config_for_tokenizer(directory: Path) -> PreTrainedConfig | None:
    """Return what `AutoTokenizer` reads of a model's configuration, where the tokenizer names its own class.

    That saves seconds: for the configuration of an architecture transformers imports what trains models over many GPUs,
    and with it half of torch. `None` leaves the configuration to transformers.
    """
    from transformers import PreTrainedConfig

    try:
        model, own = read_config(directory), json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    except (CheckpointError, OSError, ValueError):
        return None
    if not isinstance(own, dict) or not own.get("tokenizer_class") or "auto_map" in own:
        return None
    if not isinstance(model.get("model_type"), str):
        return None
    told = {name: model[name] for name in ("model_name", "tokenizer_class") if name in model}
    config = PreTrainedConfig(**told, name_or_path=str(directory))
    config.model_type = model["model_type"]
    return config
