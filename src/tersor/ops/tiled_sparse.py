"""The torch operator `tersor::tiled_sparse_linear` of pruned weights in kernel tiles, its meta twin and its gradient.

On compute capability 9.0 the fused kernel multiplies, in tiles of tokens, or slices of the weight are decoded for
cuBLAS, whichever is predicted to take less (`sparse_layout.decide`); everywhere else, and with other dtypes, blocks of
rows are decoded by torch and multiplied in float32. A weight that lies in tiles for e4m3 has activations quantised
to that first, wherever it is multiplied, and a fused product for any number of tokens. A pruned weight multiplies as
the zero that it is, whoever serves the call.
"""

from __future__ import annotations

from typing import Any

import torch

from tersor.errors import ShapeError
from tersor.formats import Activations
from tersor.kernels.tune import sparse as tune
from tersor.layouts import TiledSparseWeight, tiled_sparse
from tersor.layouts.blocks import UNIT_OC
from tersor.layouts.sparse_tiles import SparseTiles, places_of
from tersor.ops import (
    autocast,
    current,
    decompressed,
    dense,
    dequantized,
    gradient,
    mode,
    reference,
    sparse,
    sparse_gradient,
    sparse_layout,
    tensors,
)
from tersor.ops.gates import Gate
from tersor.ops.prepared_sparse import PreparedSparse
from tersor.ops.settled import settled

_library = torch.library.Library("tersor", "FRAGMENT")
_WEIGHT = "Tensor mask, Tensor layers, Tensor scale, Tensor starts, Tensor marks"
_library.define(
    f"tiled_sparse_linear(Tensor x, {_WEIGHT}, Tensor? bias, str packing, int oc, int ic, Tensor? residual=None, "
    "int gate=0) -> Tensor"
)
_library.define(f"tiled_sparse_input_grad(Tensor grad, {_WEIGHT}, str packing, int oc, int ic) -> Tensor")

_MOST_KEPT = 1024
"""Prepared calls that weights of one kind keep; all go when there are more."""


def multiply(
    x: torch.Tensor, weight: TiledSparseWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: int
) -> torch.Tensor:
    """Serve a call of `ops.linear` or `ops.gated_linear`, through torch's dispatcher where anyone looks.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit.
    """
    tiles = weight.tiles
    held = (tiles.mask, tiles.layers, weight.scale, tiles.starts, tiles.marks)
    if not dense.looked_at(x, bias, residual):
        return _served(x, *held, bias, _type_of(weight), residual, gate)
    if gate and gradient.wanted(x, bias, residual):
        y = Gate(gate).of_rows(multiply(x, weight, bias, None, 0))
        return y if residual is None else y + residual
    return _linear()(x, *held, bias, weight.key, *weight.shape, residual, gate)


class _Type:
    """What pruned weights have in common that are multiplied in the same way."""

    def __init__(self, key: str, oc: int, ic: int) -> None:
        self.sparse, self.packing = tiled_sparse.packing_of(key)
        self.shape = (oc, ic)
        self._reasons: dict[tuple[torch.dtype, int, int], str] = {}
        self._prepared: dict[tuple[int, torch.dtype, int, int, int, int, int], PreparedSparse] = {}

    def misfit(self, dtype: torch.dtype, device: torch.device, index: int, now: int) -> str:
        """Return why no kernel serves activations of a dtype, or an empty string."""
        key = (dtype, index, now)
        found = self._reasons.get(key)
        if found is None:
            way = Activations.E4M3 if self.packing.bytewise else Activations.NATIVE
            found = sparse_layout.reason(self.sparse, self.shape, dtype, device, way)
            if not found and not self.packing.bytewise and self.packing.target != str(dtype).removeprefix("torch."):
                found = f"the weight lies in kernel tiles for {self.packing.target}"
            self._reasons[key] = found
        return found

    def prepared(
        self, n: int, dtype: torch.dtype, index: int, gate: int, now: int, places: int, nbytes: int
    ) -> PreparedSparse:
        """Return the prepared call, made at its first use; compiles and loads the kernel it needs."""
        if mode.current().sparse is not None:
            # A measurement's is not kept.
            return PreparedSparse(self.packing, self.shape, n, dtype, places, nbytes, index, gate)
        key = (n, dtype, index, gate, now, places, nbytes)
        found = self._prepared.get(key)
        if found is None:
            if len(self._prepared) >= _MOST_KEPT:
                self._prepared.clear()
            found = self._prepared.setdefault(
                key, PreparedSparse(self.packing, self.shape, n, dtype, places, nbytes, index, gate)
            )
        return found

    def forget(self) -> None:
        """Drop every prepared call."""
        self._reasons.clear()
        self._prepared.clear()


_types: dict[tuple[str, int, int], _Type] = {}


def forget() -> None:
    """Drop every prepared call, as `prepared.forget` does."""
    for found in list(_types.values()):
        found.forget()


def _type(key: str, oc: int, ic: int) -> _Type:
    found = _types.get((key, oc, ic))
    return _types.setdefault((key, oc, ic), _Type(key, oc, ic)) if found is None else found


def _type_of(weight: TiledSparseWeight) -> _Type:
    """Return a weight's type, which the weight keeps."""
    found: _Type | None = getattr(weight, "note", None)
    if found is None:
        found = _type(weight.key, *weight.shape)
        object.__setattr__(weight, "note", found)  # not part of the frozen value
    return found


def _served(
    x: torch.Tensor,
    mask: torch.Tensor,
    layers: torch.Tensor,
    scale: torch.Tensor,
    starts: torch.Tensor,
    marks: torch.Tensor,
    bias: torch.Tensor | None,
    of: _Type,
    residual: torch.Tensor | None,
    gate: int,
) -> torch.Tensor:
    """Return the result, summed in float32 (float64 for such x) and rounded once to x's dtype."""
    oc, ic = of.shape
    outputs = sparse.checked(x, mask, of.shape, bias, residual, gate)
    if x.numel() == 0 or oc == 0:
        return tensors.empty_result(x, bias, residual, gate, oc)
    index, now = x.get_device(), mode.current()
    if of.misfit(x.dtype, x.device, index, now.key):
        tiles = SparseTiles(of.shape, of.packing.bits, of.packing.bytewise, mask, layers, starts, marks)
        return _by_blocks(x, tiles, scale, bias, of, residual, gate, outputs)
    if current.device() != index:
        with torch.cuda.device(index):
            return _served(x, mask, layers, scale, starts, marks, bias, of, residual, gate)
    shape, n, stride = x.shape, x.numel() // ic, ic
    if not x.is_contiguous():
        x = tensors.rows_of(x, ic)
        stride = x.stride(0)
    held = (mask, layers, scale, starts, marks)
    if x.data_ptr() % 16 or stride % 8:
        x = tensors.aligned_rows(x, ic)
        stride = x.stride(0)
    if now.batch_invariant and n > tune.FEW:  # sums of all places of all tokens would take gigabytes
        return _in_turns(x.reshape(n, ic), held, bias, of, residual, gate).view(*shape[:-1], outputs)
    places = places_of(starts, marks)
    chosen = of.prepared(n, x.dtype, index, gate, now.key, places, mask.nbytes + layers.nbytes)
    residual = None if residual is None else tensors.contiguous(residual)
    bias = None if bias is None else bias.contiguous()
    if chosen.launch is None:
        slices = decompressed.slices(mask, layers, scale, starts, marks, of.packing, of.shape)
        added = None if residual is None else residual.view(-1, outputs)
        return decompressed.linear(x.reshape(-1, ic), slices, bias, oc, added, gate).view(*shape[:-1], outputs)
    y = tensors.output(shape, n, outputs, x.dtype)
    stream, partial, arrived = current.stream(index), 0, 0
    address, x_scale = x.data_ptr(), 0
    if chosen.quantize is not None:
        codes = current.empty(
            (chosen.codes_bytes,), (1,), torch.uint8
        )  # held until the launch; then the stream's order
        x_scale = chosen.quantize(stream=stream, x=address, x_stride=stride, codes=codes.data_ptr())
        address, stride = codes.data_ptr(), chosen.codes_stride
    if chosen.floats:
        partial, arrived, _parts = now.workspace.split_sums(index, stream, chosen.floats, chosen.counters)
    chosen.launch(
        stream=stream,
        mask=mask.data_ptr(),
        layers=layers.data_ptr(),
        starts=starts.data_ptr(),
        marks=marks.data_ptr(),
        scale=scale.data_ptr(),
        x=address,
        x_stride=stride,
        x_scale=x_scale,
        bias=0 if bias is None else bias.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        y=y.data_ptr(),
        partial=partial,
        arrived=arrived,
        early=settled(mask, layers) and now.early,
    )
    return y


def _in_turns(
    x: torch.Tensor,
    held: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None,
    of: _Type,
    residual: torch.Tensor | None,
    gate: int,
) -> torch.Tensor:
    """Return the result [N, outputs] of several calls, each of so many tokens as one tile has."""
    mask, layers, scale, starts, marks = held
    added = None if residual is None else residual.reshape(x.shape[0], -1)
    parts = []
    for first in range(0, x.shape[0], tune.FEW):
        own = slice(first, first + tune.FEW)
        some = None if added is None else added[own]
        parts.append(_served(x[own], mask, layers, scale, starts, marks, bias, of, some, gate))
    return torch.cat(parts)


def _by_blocks(
    x: torch.Tensor,
    tiles: SparseTiles,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    of: _Type,
    residual: torch.Tensor | None,
    gate: int,
    outputs: int,
) -> torch.Tensor:
    """Return the result of blocks of rows that torch decodes."""
    rows, one_by_one = tensors.rows_of(x, of.shape[1]), mode.current().batch_invariant
    wide = rows.to(torch.promote_types(x.dtype, torch.float32))
    if of.packing.bytewise:
        codes, token_scale = Activations.E4M3.quantize(wide.float())
        wide = (codes.float() * token_scale.view(-1, 1)).to(wide.dtype)

    def product(first: int, last: int) -> torch.Tensor:
        block = tiled_sparse.decode(of.sparse, of.packing, tiles, scale, wide.dtype, (first, last))
        part = torch.stack([block @ token.clone() for token in wide]) if one_by_one else wide @ block.T
        return part if bias is None else part.add_(bias[first:last])

    added = None if residual is None else residual.reshape(-1, outputs)
    return reference.in_blocks(rows, x.dtype, of.shape, product, added, gate).view(*x.shape[:-1], outputs)


def _serve_grad(
    grad: torch.Tensor,
    mask: torch.Tensor,
    layers: torch.Tensor,
    scale: torch.Tensor,
    starts: torch.Tensor,
    marks: torch.Tensor,
    packing: str,
    oc: int,
    ic: int,
) -> torch.Tensor:
    """Return grad [..., OC] @ W [OC, IC], summed in float32 and rounded once to grad's dtype."""
    of = _checked(packing, oc, ic, mask, layers, starts, marks)
    if not oc or not grad.numel():
        return grad.new_zeros(*grad.shape[:-1], ic)
    rows, index = grad.reshape(-1, oc), grad.get_device()
    if not of.packing.bytewise and not of.misfit(grad.dtype, grad.device, index, mode.current().key):
        with torch.cuda.device(index):
            found = dequantized.added_up(
                rows, decompressed.slices(mask, layers, scale, starts, marks, of.packing, of.shape)
            )
        return found.view(*grad.shape[:-1], ic)
    wide = rows.to(torch.promote_types(grad.dtype, torch.float32))
    total = wide.new_zeros(len(rows), ic)
    tiles = SparseTiles(of.shape, of.packing.bits, of.packing.bytewise, mask, layers, starts, marks)
    step = max(1, reference.BLOCK_ELEMENTS.get(grad.device.type, 1 << 18) // max(ic, 1) // UNIT_OC) * UNIT_OC
    for first in range(0, oc, step):
        last = min(first + step, oc)
        block = tiled_sparse.decode(of.sparse, of.packing, tiles, scale, wide.dtype, (first, last))
        total.addmm_(wide[:, first:last], block)
    return total.to(grad.dtype).view(*grad.shape[:-1], ic)


def _checked(
    packing: str,
    oc: int,
    ic: int,
    mask: torch.Tensor,
    layers: torch.Tensor,
    starts: torch.Tensor,
    marks: torch.Tensor,
) -> _Type:
    """Return the type of a weight; raise ShapeError where its tensors are not those of one."""
    units, blocks = -(-oc // UNIT_OC), -(-ic // 128)
    fits = mask.shape == (units, blocks, 128, 2) and marks.shape == (units, blocks)
    fits = fits and starts.dim() == 1 and len(starts) >= units and (len(starts) - units) % 4 == 0
    if not fits or any(one.dtype != torch.int32 for one in (mask, layers, starts, marks)):
        raise ShapeError(f"linear: masks {list(mask.shape)} are not those of a pruned weight [{oc}, {ic}] in tiles")
    return _type(packing, oc, ic)


def _serve(
    x: torch.Tensor,
    mask: torch.Tensor,
    layers: torch.Tensor,
    scale: torch.Tensor,
    starts: torch.Tensor,
    marks: torch.Tensor,
    bias: torch.Tensor | None,
    packing: str,
    oc: int,
    ic: int,
    residual: torch.Tensor | None = None,
    gate: int = 0,
) -> torch.Tensor:
    """Serve a call of the operator."""
    of = _checked(packing, oc, ic, mask, layers, starts, marks)
    return _served(x, mask, layers, scale, starts, marks, bias, of, residual, gate)


def _shape_only(
    x: torch.Tensor,
    mask: torch.Tensor,
    layers: torch.Tensor,
    scale: torch.Tensor,
    starts: torch.Tensor,
    marks: torch.Tensor,
    bias: torch.Tensor | None,
    packing: str,
    oc: int,
    ic: int,
    residual: torch.Tensor | None = None,
    gate: int = 0,
) -> torch.Tensor:
    """Check a call and return an uninitialised result: for tensors without memory."""
    return x.new_empty(*x.shape[:-1], sparse.checked(x, mask, (oc, ic), bias, residual, gate))


def _grad_shape(grad: torch.Tensor, *rest: Any) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], rest[-1])


def _linear() -> Any:
    return torch.ops.tersor.tiled_sparse_linear.default


def _input_grad() -> Any:
    return torch.ops.tersor.tiled_sparse_input_grad.default


_FUNCTION, _GRAD_FUNCTION = sparse_gradient.functions(_linear, _input_grad, held=5, described=3)
for _device in autocast.DEVICES:
    _library.impl("tiled_sparse_linear", _serve, _device)
    _library.impl("tiled_sparse_linear", autocast.casting(_linear()), f"Autocast{_device}")
    _library.impl("tiled_sparse_input_grad", _serve_grad, _device)
    _library.impl("tiled_sparse_input_grad", autocast.ignoring(_input_grad()), f"Autocast{_device}")
_library.impl("tiled_sparse_linear", gradient.differentiable(_FUNCTION, _linear, (None, 0)), "Autograd")
_library.impl("tiled_sparse_input_grad", gradient.differentiable(_GRAD_FUNCTION, _input_grad), "Autograd")
torch.library.register_fake("tersor::tiled_sparse_linear", _shape_only, lib=_library)
torch.library.register_fake("tersor::tiled_sparse_input_grad", _grad_shape, lib=_library)
