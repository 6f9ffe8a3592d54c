"""Which layer of a transformers model does a stored weight belong to? Names as transformers itself would map them.

A packed weight is placed where the plain one would go (`names`); experts that hold packed weights are split up again
(`PackedExperts`), and their converters are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming

from tersor.errors import CheckpointError, UnsupportedError
from tersor.integrations.transformers.architecture import is_conv1d
from tersor.integrations.transformers.experts import PackedExperts, check_experts
from tersor.integrations.transformers.experts_form import is_experts
from tersor.integrations.transformers.names import Names, merges_experts, turned, whole_names_only

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored weight goes.

    Attributes:
        stem: start of its tensors' names in the checkpoint.
        module: name of the linear layer or embedding in the model, or of the parameter that holds a weight of each of a
            layer's experts.
        weight: the name that the weight had in the checkpoint.
        stacked: whether it is such a parameter.
    """

    stem: str
    module: str
    weight: str
    stacked: bool = False

    @property
    def parameter(self) -> str:
        """Name of the parameter that the weight is, uncompressed."""
        return self.module if self.stacked else self.module + _WEIGHT


class Placement:
    """The mapping from a checkpoint's names to the layers of one model.

    Attributes:
        dropped: identities of the converters that must not act, because the experts they merge are split.
        replaced: identity of a converter -> the one that acts instead, which leaves compressed weights alone.
        renamings: what the tensors of compressed fused experts need beyond transformers' own renamings, which may know
            the whole name of the weight only.
        dtypes: name -> dtype of the model's tensors, experts split, before any layer is replaced.
    """

    def __init__(self, model: Any) -> None:
        """Take the model as transformers built it, on the meta device, before any layer is replaced."""
        self._model = model
        self._names = Names(model)
        self.dropped: set[tuple[str, ...]] = set()
        self.replaced: dict[tuple[str, ...], WeightConverter] = {}
        self.renamings: list[WeightRenaming] = []
        self.dtypes: dict[str, torch.dtype] = {}
        self._stacks: set[str] = set()

    def place(self, stems: Iterable[str]) -> list[Place]:
        """Find the linear layer or embedding of every stored weight, splitting fused experts where they hold one.

        Weights that transformers ignores (`_keys_to_ignore_on_load_unexpected`) are left out, and so are those of
        layers that the model has not (`num_hidden_layers=2`), of which transformers itself tells.

        Raises:
            CheckpointError: the model has not one of the layers.
            UnsupportedError: the layer is there and cannot run packed.
        """
        stems = list(stems)
        self._split_experts(stems)
        self._stacks = {
            f"{name}.{own}"
            for name, module in self._model.named_modules()
            if is_experts(module)
            for own in ("gate_up_proj", "up_proj", "down_proj")
            if own in module._parameters
        }
        self.dtypes = {name: tensor.dtype for name, tensor in self._names.state.items()}
        places: list[Place] = []
        lost: list[str] = []
        for stem in stems:
            key, pattern = self.rename(stem + _WEIGHT)
            module = key.removesuffix(_WEIGHT)
            fused = next((name for name in (stem + _WEIGHT, stem) if self.rename(name)[0] in self._stacks), "")
            if fused:
                places.append(Place(stem, self.rename(fused)[0], fused, stacked=True))
                continue
            if pattern is not None:
                raise UnsupportedError(
                    f"transformers converts {stem}.weight into {key} while loading, which packed weights cannot go "
                    "through: compress the model with that layer ignored"
                )
            if key in self._names.state and key != module:
                places.append(Place(stem, module, stem + _WEIGHT))
            elif not self._ignored(key):
                lost.append(stem)
        if lost and not places:
            raise CheckpointError(
                f"the checkpoint's {lost[0]}.weight belongs to no layer of {type(self._model).__name__}, nor does any "
                "other: config.json does not describe this checkpoint"
            )
        return places

    def rename(self, key: str) -> tuple[str, str | None]:
        """Return the name a checkpoint tensor has in the model, and the pattern of the converter it passes, if any."""
        return self._names.rename(key)

    def rename_stacked(self, place: Place, names: Iterable[str]) -> None:
        """Let the tensors of compressed fused experts go where they belong, where transformers' renamings do not.

        Args:
            place: of the weight.
            names: of its tensors.
        """
        prefix = f"{self._model.base_model_prefix}."
        self._leave_compressed_alone()
        for name in names:
            found = self.rename(f"{place.stem}.{name}")[0].removeprefix(prefix).split(".")
            wanted = f"{place.module}.{name}".removeprefix(prefix).split(".")
            if found != wanted:
                shared = next(index for index, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b)
                # From the layer's number on, so that no layer beside the experts is meant.
                first = max((index + 1 for index, part in enumerate(found[:shared]) if part.isdecimal()), default=0)
                source, target = (".".join(["", *parts[first:]]) for parts in (found, wanted))
                renaming = WeightRenaming(re.escape(source), target)
                self.renamings.append(renaming)
                self._names.add(renaming)

    def _leave_compressed_alone(self) -> None:
        """Keep converters that turn fused experts from the tensors of compressed ones, whose names begin as theirs."""
        for index, converter in enumerate(self._names.converters):
            if turned(converter) and identity(converter) not in self.replaced:
                self._names.converters[index] = new = whole_names_only(converter)
                self.replaced[identity(converter)] = self.replaced[identity(new)] = new

    def refresh(self, expected: Mapping[str, str]) -> None:
        """Look at the model again after layers were replaced, and check that names still lead where they should.

        Args:
            expected: checkpoint tensor name -> name in the model.

        Raises:
            UnsupportedError: transformers would load a tensor elsewhere.
        """
        self._names.refresh()
        for key, wanted in expected.items():
            found, _ = self.rename(key)
            if found != wanted:
                raise UnsupportedError(
                    f"transformers would load {key} as {found}, not as {wanted}: compress the model with that layer "
                    "ignored"
                )

    def missing_linears(self, names: Iterable[str]) -> list[str]:
        """Return the linear layers of the base model whose weight is not among the checkpoint's tensor `names`."""
        provided, starts = self._names.provided(names)
        prefix = self._model.base_model_prefix
        inside = f"{prefix}." if prefix and hasattr(self._model, prefix) else ""
        tied = set(getattr(self._model, "all_tied_weights_keys", {}))
        expected = [
            name + _WEIGHT
            for name, module in self._model.named_modules()
            if (isinstance(module, nn.Linear) or is_conv1d(module)) and name.startswith(inside)
        ]
        excused = self._model._keys_to_ignore_on_load_missing or ()
        return [
            key
            for key in expected
            if key not in provided
            and not key.startswith(starts)
            and key not in tied
            and not any(re.search(pattern, key) for pattern in excused)
        ]

    def _ignored(self, key: str) -> bool:
        return any(re.search(pattern, key) for pattern in self._model._keys_to_ignore_on_load_unexpected or ())

    def _split_experts(self, stems: Iterable[str]) -> None:
        merging = {}
        for converter in self._names.converters:
            if merges_experts(converter):
                merging.update(dict.fromkeys(converter.source_patterns, converter))
        used = []
        for stem in stems:
            pattern = self.rename(stem + _WEIGHT)[1]
            if pattern in merging and merging[pattern] not in used:
                used.append(merging[pattern])
        if not used:
            return
        # A converter acts on every layer, so all experts it may merge are split, also where none is packed.
        for name, module in list(self._model.named_modules()):
            if not is_experts(module):
                continue
            into = _merged_into(list(merging.values()), name)
            if not any(converter in used for converter in into.values()):
                continue
            check_experts(module)
            layers = expert_layers(list(merging.values()), name, module)
            if layers is None:
                raise UnsupportedError(
                    f"transformers merges the experts of {name} in a way not known: ignore its experts"
                )
            split = PackedExperts(module, *layers)
            split.template._is_hf_initialized = True
            self._model.set_submodule(name, split)
            self.dropped.update(identity(converter) for converter in into.values())
        self._names.converters = [
            converter for converter in self._names.converters if identity(converter) not in self.dropped
        ]
        self._names.refresh()


def identity(converter: WeightConverter) -> tuple[str, ...]:
    """Return what tells a model's converters apart, also in another copy of them."""
    return (converter.scope_prefix or "", *converter.source_patterns, "->", *converter.target_patterns)


def expert_layers(converters: Iterable[WeightConverter], name: str, module: Any) -> tuple[tuple[str, ...], str] | None:
    """Return what a checkpoint calls the layers of an expert: those that read the hidden state, and down.

    Args:
        converters: those that merge experts.
        name: of the module that holds the fused experts.
        module: that module.

    Returns:
        `None` where the converters do not merge both weights of this module.

    Raises:
        UnsupportedError: the module cannot be split (`check_experts`).
    """
    into = _merged_into(converters, name)
    if not into:
        return None
    fused = check_experts(module).fused
    if fused not in into or "down_proj" not in into:
        return None
    inputs = tuple(_child(pattern) for pattern in into[fused].source_patterns)
    return inputs, _child(into["down_proj"].source_patterns[0])


def _merged_into(converters: Iterable[WeightConverter], name: str) -> dict[str, WeightConverter]:
    """Return the weights of the fused experts called so -> what merges them."""
    return {
        attribute: converter
        for converter in converters
        for attribute in ("gate_up_proj", "up_proj", "down_proj")
        if _merges_into(converter, name, attribute)
    }


def _child(pattern: str) -> str:
    """Return the name of an expert's layer in a source pattern such as `mlp.experts.*.gate_proj.weight`."""
    return pattern.rpartition("*.")[2].removesuffix(_WEIGHT)


def _merges_into(converter: WeightConverter, experts: str, attribute: str) -> bool:
    key = f"{experts}.0.{_child(converter.source_patterns[0])}{_WEIGHT}"
    return converter.rename_source_key(key)[0] == f"{experts}.{attribute}"
