"""A linear layer whose output features have different schemes: what is on disk is what is in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from tersor import ops
from tersor.checkpoint.names import LEVEL, LEVELS
from tersor.errors import ShapeError
from tersor.formats import Activations, Assignment
from tersor.layouts import MixedWeight
from tersor.nn.levels import OfLevels
from tersor.nn.linear import cast_bias, empty_bias
from tersor.nn.packed import MultipliedModule, refuse_weight

_Self = TypeVar("_Self", bound="MixedLinear")


class RowSet(MultipliedModule):
    """The rows [rows, IC] of one level of a mixed weight; `MixedLinear` multiplies with all of its row sets."""

    @property
    def stored_bits(self) -> float:
        """Bits that a checkpoint has for the rows, scales and the byte that says the level of each counted."""
        return super().stored_bits + 8 * self.shape[0]


class MixedLinear(OfLevels):
    """y[..., OC] = x[..., IC] @ W[OC, IC]^T + bias, with every row of W packed at its level.

    On a GPU each row set is kept in the layout that its kernel reads; the state dict shows the stored stream all the
    same. Casting the module casts the bias only.

    Attributes:
        in_features, out_features: IC and OC.
        mix: the levels.
        levels: the row set of every level that has rows, by its number.
        weight_level: uint8 [OC], the level of every output feature.
        dtype: of the decoded `weight`; follows `.half()`, `.to(dtype)` and the like.
        transposed: whether the module it replaced kept its weight as [IC, OC] (GPT-2's Conv1D).
        bias: [OC] or `None`.
    """

    bias: nn.Parameter | None
    in_state_dict = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: Assignment,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer with uninitialised levels, codes and scales, to be filled from a state dict.

        Args:
            in_features, out_features: IC and OC.
            form: the mix, and how many output features have each level; which ones, the state dict says.
            bias: whether there is one.
            device: of everything.
            dtype: of the bias and the decoded weight; torch's default when `None`.

        Raises:
            FormatError: a group size does not divide IC.
            ShapeError: another number of output features has levels.
        """
        super().__init__()
        form.check(out_features)
        self.in_features, self.out_features = in_features, out_features
        self.mix = form.mix
        self.dtype = dtype or torch.get_default_dtype()
        self.transposed = False
        self.register_buffer(LEVEL, torch.empty(out_features, dtype=torch.uint8, device=device))
        sets = {
            str(level): RowSet((rows, in_features), scheme, device=device, dtype=dtype)
            for level, (scheme, rows) in enumerate(zip(form.mix.levels, form.rows, strict=True))
            if rows
        }
        self.levels = nn.ModuleDict(sets)
        self._held: MixedWeight | None = None
        self._level: torch.Tensor | None = None
        self.register_parameter("bias", empty_bias(out_features, self.dtype, device) if bias else None)

    @classmethod
    def from_packed(
        cls, weight: MixedWeight, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> MixedLinear:
        """Wrap a mixed weight and a bias, without a copy."""
        oc, ic = weight.shape
        form = weight.assignment
        layer = cls(ic, oc, form, device="meta", dtype=dtype)
        layer.weight_level = torch.tensor(list(form.level), dtype=torch.uint8, device=weight.device)
        for own, rows in zip(layer.row_sets, weight.sets, strict=True):
            own._set_weight(rows)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @property
    def row_sets(self) -> list[RowSet]:
        """The row sets, in the order of levels."""
        return [rows for rows in self.levels.values() if isinstance(rows, RowSet)]

    @property
    def shape(self) -> tuple[int, int]:
        """(OC, IC)."""
        return self.out_features, self.in_features

    @property
    def activations(self) -> Activations:
        """What the weight is multiplied with; set by `multiply_with`."""
        return self.row_sets[0].activations

    @property
    def as_stored(self) -> bool:
        """Whether the buffers hold what is on disk."""
        return all(rows.as_stored for rows in self.row_sets)

    def packed_weight(self) -> MixedWeight:
        """Return the weight, sharing memory with the buffers: the same object until one of them changes.

        Raises:
            ShapeError: the levels are not those of the row sets.
        """
        sets = [rows.packed_weight() for rows in self.row_sets]
        held = self._held
        if torch.compiler.is_compiling():
            assert held is not None, "prepare makes it before a graph is traced"
            return MixedWeight(self.mix, held.shape, tuple(sets), held.features, held.places)
        if self.weight_level.device.type == "meta":
            order = torch.empty(self.out_features, dtype=torch.int32, device="meta")
            return MixedWeight(self.mix, self.shape, tuple(sets), order, order)
        if held is None or self._level is not self.weight_level:
            form = Assignment(self.mix, self.weight_level.cpu().numpy().tobytes())
            try:
                held = MixedWeight.of(form, sets)
            except ShapeError as error:
                raise ShapeError(f"{LEVEL} does not fit the weights of {LEVELS}: {error}") from None
        elif any(old is not new for old, new in zip(held.sets, sets, strict=True)):
            held = MixedWeight(self.mix, held.shape, tuple(sets), held.features, held.places)
        self._held, self._level = held, self.weight_level
        return held

    def stored_weight(self) -> MixedWeight:
        """Return the weight as it is on disk, row sets in the stored stream."""
        return self.packed_weight().to_layout(lambda scheme: "stream")

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight [OC, IC] in `dtype`, made anew on every access: for code that looks at weights."""
        return self.packed_weight().dequantize(self.dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as `nn.Module` does.

        Raises:
            UnsupportedError: it is named `weight`, which is decoded from packed codes.
        """
        refuse_weight(self, name)
        super().register_parameter(name, param)

    def multiply_with(self, activations: Activations | str) -> None:
        """Choose what the weight is multiplied with from now on, as `MultipliedModule.multiply_with` does.

        Raises:
            InputError: no such activations.
            UnsupportedError: weights of a level cannot be multiplied with 8-bit activations; nothing has changed.
        """
        device = self.weight_level.device
        schemes = [rows.scheme for rows in self.row_sets]
        chosen = ops.activations_for(activations, schemes, ops.kernel_chip(device))
        for scheme in schemes:
            ops.preferred_layout(scheme, self.dtype, device, chosen)
        for rows in self.row_sets:
            rows.multiply_with(chosen)

    def prepare(self, dtype: torch.dtype) -> None:
        """Put every row set into the layout that serves activations of `dtype`, and work out where its rows belong.

        Does nothing on the meta device, and nothing that is done already.
        """
        if self.weight_level.device.type == "meta":
            return
        for rows in self.row_sets:
            rows.prepare(dtype)
        self.packed_weight()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply.

        Args:
            x: [..., IC].

        Returns:
            [..., OC] in x's dtype, or that of torch.autocast; a bias of another dtype is cast.
        """
        dtype = ops.activation_dtype(x)
        if not torch.compiler.is_compiling():
            self.prepare(dtype)
        return ops.linear(x, self.packed_weight(), cast_bias(self.bias, dtype))

    def _apply(self: _Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)
        self.prepare(self.dtype)
        return self

    def extra_repr(self) -> str:
        """Say shape and levels."""
        rows = ", ".join(f"{own.shape[0]} x {own.scheme.key()}" for own in self.row_sets)
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {rows}"
