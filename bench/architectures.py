"""Which linear weights of every architecture that transformers knows would be compressed? Nothing is downloaded.

    python bench/architectures.py                    every model type, in each of its usual classes
    python bench/architectures.py gemma3 mixtral     some of them
    python bench/architectures.py --output bench/results/architectures.txt

Each model is built from its default config, with fewer layers, on torch's meta device; its tensors get the names that
a released checkpoint gives them, by transformers' own conversion mapping backwards; and what `tersor quantize` would do
with such a checkpoint is decided as for any other. The exit status is 1 where a linear layer is neither compressed nor
left alone for a reason, or where a whole checkpoint is taken for one that lacks tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tersor.checkpoint.conversion import make_conversion
from tersor.checkpoint.exports import get_export
from tersor.checkpoint.header import TensorSpec
from tersor.checkpoint.source import StoredTensor
from tersor.errors import InputError
from tersor.formats import get_scheme
from tersor.integrations.transformers.architecture import architecture_of, model_class

AUTOS = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageClassification",
    "AutoModel",
)
LAYERS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "depth",
)
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")
MOST_LAYERS = 4
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
MOST_EXPERTS = 8


@dataclass
class Survey:
    """What would become of one class of models.

    Attributes:
        model_type, name: of the config, and of the class.
        linears: stored weights of linear layers, and of experts.
        compressed: how many of them would be compressed.
        left: reason -> how many were left alone for it.
        lost: linear layers of the model that no stored weight was found for.
        problem: why nothing can be said, or what is wrong.
    """

    model_type: str
    name: str
    linears: int = 0
    compressed: int = 0
    left: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def silent(self) -> bool:
        """Whether a linear layer is neither compressed nor left alone for a reason."""
        return bool(self.lost) or "" in self.left or "lacks" in self.problem

    def row(self) -> str:
        """Return a line of the table."""
        left = "; ".join(f"{count} {reason}" for reason, count in self.left.items())
        more = self.problem or left or "-"
        return f"{self.model_type:32} {self.name:48} {self.linears:6} {self.compressed:6} {more}"


def classes(model_type: str) -> list[str]:
    """Return the classes that the usual auto classes of transformers have for a model type."""
    names: list[str] = []
    for auto in AUTOS:
        with contextlib.suppress(ValueError, KeyError, AttributeError, ImportError):
            found = getattr(transformers, auto)._model_mapping[CONFIG_MAPPING[model_type]]
            several = found if isinstance(found, list | tuple) else [found]
            names += [item.__name__ for item in several if item.config_class is CONFIG_MAPPING[model_type]]
    return list(dict.fromkeys(names))


def small(config: Any) -> Any:
    """Return a config with at most `MOST_LAYERS` layers of `MOST_EXPERTS` experts, in its parts as well."""
    for name in getattr(config, "sub_configs", {}):
        if isinstance(part := getattr(config, name, None), transformers.PreTrainedConfig):
            small(part)
    for name, most in (*((name, MOST_LAYERS) for name in LAYERS), *((name, MOST_EXPERTS) for name in EXPERTS)):
        if isinstance(count := getattr(config, name, None), int) and count > most:
            with contextlib.suppress(Exception):  # some configs compute it
                setattr(config, name, most)
    for name in LAYER_LISTS:
        if isinstance(listed := getattr(config, name, None), list) and len(listed) > MOST_LAYERS:
            setattr(config, name, listed[:MOST_LAYERS])
    return config


def build(model_type: str, name: str) -> Any:
    """Build a model on the meta device, with few layers where its config allows it."""
    for shrink in (small, lambda config: config):
        config = shrink(CONFIG_MAPPING[model_type]())
        config.architectures = [name]
        with contextlib.suppress(Exception), torch.device("meta"):
            return model_class(config)._from_config(config, attn_implementation="eager")
    with torch.device("meta"):  # once more for the reason
        return model_class(config)._from_config(config, attn_implementation="eager")


def released(model: Any) -> dict[str, torch.Tensor]:
    """Return a model's tensors under the names that a released checkpoint has for them, ties left out."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    found: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    return found


def source_of(tensors: dict[str, torch.Tensor]) -> Any:
    """Return what a checkpoint with such tensors is to `make_conversion`."""
    file: Any = types.SimpleNamespace(path=Path("model.safetensors"))
    specs = [TensorSpec(name, "BF16", tuple(tensor.shape)) for name, tensor in tensors.items()]
    return types.SimpleNamespace(
        directory=Path("model"), tensors={spec.name: StoredTensor(file, spec) for spec in specs}
    )


def survey(model_type: str, name: str) -> Survey:
    """Say what would become of the linear layers of a class of models."""
    result = Survey(model_type, name)
    try:
        model = build(model_type, name)
    except Exception as error:  # its defaults do not make a model, or it needs another package
        result.problem = f"not built: {next(iter(str(error).strip().splitlines()), type(error).__name__)[:100]}"
        return result
    architecture = architecture_of(model)
    tensors = released(model)
    try:
        conversion = make_conversion(
            source_of(tensors),
            architecture,
            scheme=get_scheme("fp6_e3m2"),
            ignore=(),
            overrides=(),
            export=get_export("tersor"),
            shard_bytes=1 << 60,
            provenance={},
        )
    except InputError as error:
        result.problem = str(error)
        return result
    steps = [step for step in conversion.steps if step.linear]
    result.linears = len(steps)
    result.compressed = sum(step.scheme is not None for step in steps)
    result.left = dict(Counter(step.note for step in steps if step.scheme is None).most_common())
    found = {step.layer.module for step in steps if step.layer is not None}
    tied = {name.removesuffix(".weight") for name in model.all_tied_weights_keys}
    if not any(step.layer is not None and "transformers changes it" in step.layer.obstacle for step in steps):
        result.lost = [name for name in architecture.linears if name not in found | tied]
    if result.lost:
        result.problem = f"{len(result.lost)} linear layers have no stored weight, such as {result.lost[0]}"
    return result


def surveys(model_types: list[str]) -> Iterator[Survey]:
    """Yield a survey for every class of every model type."""
    for model_type in model_types or list(CONFIG_MAPPING):
        for name in classes(model_type) or ["-"]:
            yield survey(model_type, name)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model_type", nargs="*", help="all of transformers' where none is named")
    parser.add_argument("--output", type=Path, help="a file for the table, too")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    lines = [
        f"transformers {transformers.__version__}",
        f"{'model type':32} {'class':48} {'linear':>6} {'packed':>6} left",
    ]
    silent = 0
    for found in surveys(options.model_type):
        lines.append(found.row())
        silent += found.silent
        print(lines[-1], flush=True)
    lines.append(f"{len(lines) - 2} classes, {silent} with linear layers of which nothing is said")
    print(lines[-1])
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    return int(silent > 0)


if __name__ == "__main__":
    sys.exit(main())
