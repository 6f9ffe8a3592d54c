"""A linear layer whose weight is pruned: a mask and what it leaves, on a GPU in kernel tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from tersor import ops
from tersor.checkpoint.names import MASK, SCALE, SPARSE, VALUES, ZERO_POINT, TensorForm
from tersor.formats import Activations, Pruned, Sparse
from tersor.layouts import SparseWeight, TiledSparseWeight
from tersor.layouts.sparse_tiles import SparseTiles
from tersor.nn.linear import cast_bias, empty_bias
from tersor.nn.packed import Counted, dtype_after, guard, refuse_weight, uncast

_Self = TypeVar("_Self", bound="SparseLinear")
_BUFFERS = (MASK, VALUES, SCALE, ZERO_POINT)
_STARTS, _MARKS, _ROW_SCALE = "weight_starts", "weight_marks", "weight_row_scale"
_OF_TILES = (_STARTS, _MARKS, _ROW_SCALE)
"""Buffers that kernel tiles have beside those, which no state dict shows."""


class SparseLinear(Counted):
    """y[..., OC] = x[..., IC] @ W[OC, IC]^T + bias, with W as a mask and what is left of it.

    Where a kernel reads it, on a GPU, the weight is kept in kernel tiles (`layouts.TiledSparseWeight`); the state dict
    shows mask and values all the same. Casting the module casts the bias only.

    Attributes:
        in_features, out_features, shape: IC and OC, and (OC, IC).
        sparse: what mask and values mean.
        weight_mask: uint8 [OC, ceil(IC / 8)]; in kernel tiles int32 [units, blocks, 128, 2].
        weight_values: int32 [words]; in kernel tiles [layers, 128].
        weight_scale: [OC, G] in the scheme's scale dtype, or `None` where values are plain numbers.
        weight_zero_point: uint8 [OC, G] for `uint` formats, else `None`.
        dtype: of the decoded `weight`; follows `.half()`, `.to(dtype)` and the like.
        transposed: whether the module it replaced kept its weight as [IC, OC] (GPT-2's Conv1D).
        bias: [OC] or `None`.
    """

    bias: nn.Parameter | None
    weight_mask: torch.Tensor
    weight_values: torch.Tensor
    weight_scale: torch.Tensor | None
    weight_zero_point: torch.Tensor | None
    weight_starts: torch.Tensor | None
    weight_marks: torch.Tensor | None
    weight_row_scale: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: Pruned,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer with uninitialised mask, values and scales, to be filled from a state dict.

        Args:
            in_features, out_features: IC and OC.
            form: the representation, and how many weights are left; which ones, the state dict says.
            bias: whether there is one.
            device: of everything.
            dtype: of the bias and the decoded weight; torch's default when `None`.

        Raises:
            FormatError: a group size does not divide IC.
            ShapeError: the form is of another number of output features.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.shape: tuple[int, int] = (out_features, in_features)
        self.sparse = form.sparse
        self.dtype = dtype or torch.get_default_dtype()
        self.transposed = False
        self._forms = SPARSE.tensors(form, out_features, in_features)
        self.stored_bits = 8.0 * form.nbytes(in_features)
        for name in _BUFFERS:
            tensor = self._forms.get(name)
            held = None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            self.register_buffer(name, held)
        for name in _OF_TILES:
            self.register_buffer(name, None, persistent=False)
        self._held: SparseWeight | TiledSparseWeight | None = None
        self._tiled: TiledSparseWeight | None = None
        self._ready_for: torch.dtype | None = None
        self.activations = Activations.NATIVE
        self.register_parameter("bias", empty_bias(out_features, self.dtype, device) if bias else None)

    @classmethod
    def from_packed(
        cls, weight: SparseWeight, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> SparseLinear:
        """Wrap a pruned weight and a bias, without a copy."""
        oc, ic = weight.shape
        layer = cls(ic, oc, weight.form, device="meta", dtype=dtype)
        layer._set_weight(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @property
    def scheme(self) -> Sparse:
        """The representation, which stands where another layer has a scheme."""
        return self.sparse

    def own_tensors(self) -> dict[str, TensorForm]:
        """Return name -> shape and dtype of the tensors that stand for this layer's weight on disk."""
        return self._forms

    @property
    def as_stored(self) -> bool:
        """Whether the buffers hold what is on disk."""
        return self._tiled is None

    def packed_weight(self) -> SparseWeight | TiledSparseWeight:
        """Return the weight, sharing memory with the buffers: the same object until one of them changes.

        Raises:
            ShapeError: the mask leaves another number of weights than there are values.
        """
        if torch.compiler.is_compiling():
            return self._found()
        with guard:
            return self._found()

    def _found(self) -> SparseWeight | TiledSparseWeight:
        if self._tiled is not None:
            return self._in_tiles(self._tiled)
        held, own = self._held, [self._buffers[name] for name in _BUFFERS]
        mask, values, scale, zero_point = own
        assert mask is not None and values is not None
        if torch.compiler.is_compiling():
            assert isinstance(held, SparseWeight), "prepare makes it before a graph is traced"
            return SparseWeight(held.form, self.shape, mask, values, scale, zero_point, held.starts)
        if not isinstance(held, SparseWeight) or any(
            old is not new for old, new in zip((held.mask, held.values, held.scale, held.zero_point), own, strict=True)
        ):
            held = SparseWeight.from_stored(self.sparse, self.shape, mask, values, scale, zero_point)
            self._held, self._ready_for = held, None
        return held

    def stored_weight(self) -> SparseWeight:
        """Return the weight as it is on disk."""
        held = self.packed_weight()
        return held.stored() if isinstance(held, TiledSparseWeight) else held

    def _in_tiles(self, tiled: TiledSparseWeight) -> TiledSparseWeight:
        """Return the weight whose tiles the buffers hold; `tiled` describes it."""
        buffers, held = self._buffers, self._held
        mask, layers = buffers[MASK], buffers[VALUES]
        starts, marks, scale = buffers[_STARTS], buffers[_MARKS], buffers[_ROW_SCALE]
        assert mask is not None and layers is not None
        assert starts is not None and marks is not None and scale is not None
        if isinstance(held, TiledSparseWeight) and held.tiles.mask is mask and held.tiles.layers is layers:
            return held
        of, packing = tiled.tiles, tiled.packing
        tiles = SparseTiles(self.shape, of.bits, of.four, mask, layers, starts, marks)
        found = TiledSparseWeight(tiled.form, packing, tiled.key, tiles, scale, buffers[SCALE])
        if not torch.compiler.is_compiling():
            self._held = found
        return found

    def _set_weight(self, weight: SparseWeight | TiledSparseWeight) -> None:
        with guard:
            self._held, self._ready_for = None, None
            if isinstance(weight, TiledSparseWeight):
                tiles = weight.tiles
                self.weight_mask, self.weight_values = tiles.mask, tiles.layers
                self.weight_scale, self.weight_zero_point = weight.stored_scale, None
                self.weight_starts, self.weight_marks, self.weight_row_scale = tiles.starts, tiles.marks, weight.scale
                self._tiled = _described(weight)
                return
            self.weight_mask, self.weight_values = weight.mask, weight.values
            self.weight_scale, self.weight_zero_point = weight.scale, weight.zero_point
            self.weight_starts = self.weight_marks = self.weight_row_scale = None
            self._tiled = None

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight [OC, IC] in `dtype`, made anew on every access: for code that looks at weights."""
        return self.packed_weight().dequantize(self.dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as `nn.Module` does.

        Raises:
            UnsupportedError: it is named `weight`, which is decoded from what is left.
        """
        refuse_weight(self, name)
        super().register_parameter(name, param)

    def multiply_with(self, activations: Activations | str) -> None:
        """Choose what the weight is multiplied with: activations as they come, or in e4m3.

        Raises:
            InputError: no such activations.
            UnsupportedError: no kernel multiplies such values with them; nothing has changed.
        """
        chosen = ops.check_sparse_activations(self.sparse, activations)
        if chosen is not self.activations:
            self.activations, self._ready_for = chosen, None

    def prepare(self, dtype: torch.dtype) -> None:
        """Put the weight into the layout that serves activations of a dtype on the module's device, its mask counted.

        Does nothing on the meta device, while a CUDA graph is captured, and where that is done already.

        Args:
            dtype: of the activations to come.
        """
        device = self.weight_mask.device
        if device.type == "meta":
            return
        with guard:
            weight = self.packed_weight()
            if self._ready_for is dtype:
                return
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return
            found = ops.preferred_sparse(weight, dtype, self.activations)
            if found is not weight:
                self._set_weight(found)
                self.packed_weight()
            self._ready_for = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply.

        Args:
            x: [..., IC].

        Returns:
            [..., OC] in x's dtype, or that of torch.autocast; a bias of another dtype is cast.
        """
        dtype = ops.activation_dtype(x)
        weight = self.packed_weight()
        if self._ready_for is not dtype and not torch.compiler.is_compiling():
            self.prepare(dtype)
            weight = self.packed_weight()
        return ops.linear(x, weight, cast_bias(self.bias, dtype))

    def _apply(self: _Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Self:
        before = {name: self._buffers[name] for name in (*_BUFFERS, *_OF_TILES)}
        self._held, self._ready_for = None, None
        super()._apply(fn, recurse)
        uncast(self, before)
        self.dtype = dtype_after(fn, self.dtype)
        self.prepare(self.dtype)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._held, self._ready_for = None, None
        if not self.as_stored:
            device = self.weight_mask.device
            for name in _OF_TILES:
                setattr(self, name, None)
            for name in _BUFFERS:
                form = self._forms.get(name)
                setattr(self, name, None if form is None else torch.empty(form.shape, dtype=form.dtype, device=device))
            self._tiled = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.as_stored:
            stored = self.stored_weight()
            destination[prefix + MASK], destination[prefix + VALUES] = stored.mask, stored.values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None, "_ready_for": None}

    def extra_repr(self) -> str:
        """Say shape, representation and bits."""
        bits = self.stored_bits / max(1, self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.sparse.key()}, bits_per_weight={bits:.3f}"
            + ("" if self._tiled is None else f", layout={self._tiled.packing.target} tiles")
        )


def _described(weight: TiledSparseWeight) -> TiledSparseWeight:
    """Return what describes a weight in tiles, without its memory."""
    tiles, nothing = weight.tiles, torch.empty(0, device="meta")
    empty = SparseTiles(tiles.shape, tiles.bits, tiles.four, nothing, nothing, nothing, nothing)
    return TiledSparseWeight(weight.form, weight.packing, weight.key, empty, nothing, None)
