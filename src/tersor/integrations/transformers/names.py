"""What does a model call the tensors of a checkpoint? transformers' own renamings and converters, asked.

A checkpoint's names pass through transformers' renamings (`block_sparse_moe` becomes `mlp`), at most one converter
(which merges the experts of a layer, or takes a fused weight apart), and may gain or lose the base model's prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from tersor.checkpoint.modules import Target

_FOR_TRAINING = (r"\bmasked_spec_embed$",)
"""Parameters that only training reads, which released checkpoints lack."""


_END = r"(?![\w.])"
"""What a pattern ends with that finds no longer name."""


class Names:
    """The mapping from a checkpoint's tensor names to those of one model.

    Attributes:
        state: the model's state dict, which decides whether the base model's prefix is added or taken away.
        converters: what changes tensors while they are loaded.
    """

    def __init__(self, model: Any) -> None:
        """Take a model as transformers built it, before any layer is replaced."""
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._model = model
        self.state: dict[str, Any] = {}
        self.refresh()

    def add(self, renaming: WeightRenaming) -> None:
        """Take a renaming that comes after transformers' own."""
        self._renamings.append(renaming)

    def refresh(self) -> None:
        """Look at the model's tensors again after layers were replaced."""
        self.state = self._model.state_dict()

    def rename(self, key: str) -> tuple[str, str | None]:
        """Return the name a checkpoint tensor has in the model, and the pattern of the converter it passes, if any."""
        prefix = self._model.base_model_prefix
        renamed, pattern = rename_source_key(key, self._renamings, self.converters, prefix, self.state)
        if renamed not in self.state and key in self.state:
            renamed, pattern = rename_source_key(key, [], [], prefix, self.state)
        return renamed, pattern

    def find(self, keys: Iterable[str]) -> dict[str, Target]:
        """Return where each tensor of a checkpoint goes."""
        # Some renamings depend on those before: transformers goes through names in this order.
        return {key: self._target(key) for key in sorted(keys, key=dot_natural_key)}

    def _target(self, key: str) -> Target:
        parameter, pattern = self.rename(key)
        if pattern is None:
            return Target(parameter, parameter, known=parameter in self.state)
        converter = self._converter(pattern)
        operations = ", ".join(type(operation).__name__ for operation in converter.operations)
        name = self._unconverted(key, parameter, converter)
        experts = parameter.rpartition(".")[0] if merges_experts(converter) else ""
        parts = tuple(part for part in _row_parts(converter, parameter) if part in self.state)
        return Target(name, parameter, operations, experts, parameter in self.state, parts, turned(converter))

    def _unconverted(self, key: str, parameter: str, converter: WeightConverter) -> str:
        """Return the name of a tensor after the renamings alone, with the prefix of what it is converted to."""
        renamed, _ = rename_source_key(key, self._renamings, [])
        converted, _ = converter.rename_source_key(renamed)
        prefix = f"{self._model.base_model_prefix}."
        if parameter == prefix + converted:
            return prefix + renamed
        return renamed.removeprefix(prefix) if prefix + parameter == converted else renamed

    def _converter(self, pattern: str) -> WeightConverter:
        return next(converter for converter in self.converters if pattern in converter.source_patterns)

    def provided(self, keys: Iterable[str]) -> tuple[set[str], tuple[str, ...]]:
        """Return the model's tensors that a checkpoint's become, and starts of names of which some may be, too."""
        names, starts = set(), set()
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = self.rename(key)
            names.add(name)
            if pattern is None:
                continue
            first, *others = self._converter(pattern).target_patterns
            if first in name:
                names.update(name.replace(first, other) for other in others)
            elif others:
                starts.add(name.rpartition(".")[0].rpartition(".")[0] + ".")
        return names, tuple(starts)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the parameters of the model that no tensor of a checkpoint becomes, and that share no other's."""
        names, starts = self.provided(keys)
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        excused = (*(self._model._keys_to_ignore_on_load_missing or ()), *_FOR_TRAINING)
        found = []
        for name, _ in self._model.named_parameters(remove_duplicate=False):
            there = name in names or name.startswith(starts)
            if there or any(re.search(pattern, name) for pattern in excused):
                continue
            if tied.get(name, "") in names or _shares(tied, name, names):
                continue
            found.append(name)
        return found


def _shares(tied: dict[str, str], name: str, provided: set[str]) -> bool:
    """Whether a parameter without a tensor of its own is the origin of one that has one."""
    origin = tied.get(name, name)
    return any(target in provided for target, other in tied.items() if other == origin)


def _row_parts(converter: WeightConverter, parameter: str) -> list[str]:
    """Return the parameters that rows of a tensor become one after the other, none where it is changed otherwise.

    Args:
        converter: changes the tensor.
        parameter: name of the first of them.
    """
    first, *others = converter.target_patterns
    kinds = [type(operation).__name__ for operation in converter.operations]
    cut = kinds in (["Chunk"], ["Split"]) and getattr(converter.operations[0], "dim", None) == 0
    if not (cut and others and len(converter.source_patterns) == 1 and first in parameter):
        return []
    return [parameter.replace(first, target) for target in converter.target_patterns]


def turned(converter: WeightConverter) -> str:
    """Say whether a converter only turns the last two axes of a tensor with three: `always`, `where needed`, or not."""
    several = len(converter.source_patterns) > 1 or len(converter.target_patterns) > 1
    if several or [type(operation) for operation in converter.operations] != [Transpose]:
        return ""
    operation = converter.operations[0]
    if sorted((operation.dim0, operation.dim1)) != [1, 2]:
        return ""
    return "where needed" if getattr(operation, "check_dims", False) else "always"


def whole_names_only(converter: WeightConverter) -> WeightConverter:
    """Return a converter that changes a weight, and not the tensors that it is compressed to, whose names begin so."""
    patterns = [
        [pattern + _END for pattern in group] for group in (converter.source_patterns, converter.target_patterns)
    ]
    new = WeightConverter(*patterns, operations=converter.operations)
    for name in ("scope_prefix", "base_model_prefix"):
        if hasattr(converter, name):
            setattr(new, name, getattr(converter, name))
    return new


def merges_experts(converter: WeightConverter) -> bool:
    """Whether a converter does nothing but put weights of single experts beside each other."""
    kinds = {type(operation) for operation in converter.operations}
    return MergeModulelist in kinds and kinds <= {MergeModulelist, Concatenate}
