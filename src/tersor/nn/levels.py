"""What modules of mixed weights share: the rows of every level, and which level each output feature has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from tersor.checkpoint.names import LEVEL, TensorForm, level_stem
from tersor.formats import Mix
from tersor.nn.packed import PackedModule, dtype_after

_Self = TypeVar("_Self", bound="OfLevels")


class OfLevels(nn.Module):
    """Holds a mixed weight; a subclass makes the rows of its levels, and one weight of them.

    Attributes:
        mix: the levels.
        levels: the rows of every level that has any, by its number.
        weight_level: uint8 [OC], the level of every output feature.
        dtype: of the decoded `weight`; follows `.half()`, `.to(dtype)` and the like.
    """

    mix: Mix
    levels: nn.ModuleDict
    weight_level: torch.Tensor
    dtype: torch.dtype
    _held: Any
    """The weight that was made last, `None` where buffers may have changed since."""
    _level: torch.Tensor | None
    """The levels it was made of."""

    @property
    def scheme(self) -> Mix:
        """The mix, which stands where another module has a scheme."""
        return self.mix

    def own_tensors(self) -> dict[str, TensorForm]:
        """Return name -> shape and dtype of the tensors that stand for this module's weight on disk."""
        forms = {LEVEL: TensorForm((len(self.weight_level),), torch.uint8)}
        for level, rows in self.levels.items():
            assert isinstance(rows, PackedModule)
            forms |= {f"{level_stem(int(level))}.{name}": form for name, form in rows.own_tensors().items()}
        return forms

    def _apply(self: _Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Self:
        self._held = None
        super()._apply(fn, recurse)
        self.dtype = dtype_after(fn, self.dtype)
        if self.weight_level.dtype != torch.uint8:
            self.weight_level = self.weight_level.to(torch.uint8)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._held = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None, "_level": None}
