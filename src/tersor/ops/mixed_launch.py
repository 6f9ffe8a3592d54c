"""One launch for all row sets of a mixed weight: whether a kernel takes a call, and how it is made.

What stays the same from call to call a weight keeps, as a dense one does (`ops.prepared`).
"""

from __future__ import annotations

import weakref

import torch

from tersor import hardware
from tersor.errors import ShapeError
from tersor.formats import Activations, Mix
from tersor.formats.mix import MOST_LEVELS
from tersor.hardware import Chip
from tersor.kernels.tune import LinearProblem
from tersor.kernels.tune import mixed as tune
from tersor.layouts import STREAM, MixedWeight
from tersor.layouts.packing import LAYOUTS, Packing, activations_of, target_of, unsupported_reason
from tersor.ops import current, dispatch, mode, tensors
from tersor.ops.quantizing import Quantize
from tersor.ops.settled import settled

_MOST_KEPT = 1024
"""Prepared calls that a weight keeps; all go when there are more."""


def multiply(
    x: torch.Tensor,
    weight: MixedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: int,
) -> torch.Tensor | None:
    """Serve a call whose sizes fit; `None` where no kernel takes all row sets at once (`reason` says why).

    Args:
        x: [..., IC], any strides.
        weight: on x's device.
        bias: [OC] in the order of features, or `None`.
        residual: [..., outputs] or `None`.
        gate: EPILOGUE of cuda/common/gate.cuh: how gate and up become one, or 0.

    Returns:
        [..., outputs] in x's dtype, contiguous.

    Raises:
        ShapeError: dtypes or devices that do not fit.
    """
    index = x.get_device()
    of = _serving(x.numel(), weight, x.dtype, x.device, gate)
    if of is None:
        return None
    _check(x.dtype, x.device, weight, bias, residual)
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return multiply(x, weight, bias, residual, gate)
    shape, ic = x.shape, weight.shape[1]
    n, stride = x.numel() // ic, ic
    if not x.is_contiguous():
        x = tensors.rows_of(x, ic)
        stride = x.stride(0)
    address = x.data_ptr()
    if of.native and (address % 16 or stride % 8):
        x = tensors.aligned_rows(x, ic)
        stride, address = x.stride(0), x.data_ptr()
    chosen = of.prepared(weight, n, x.dtype, index, gate)
    y, x_scale = tensors.output(shape, n, of.outputs, x.dtype), 0
    if chosen.quantize is not None:
        codes, x_scale = chosen.quantize(current.stream(index), address, stride)
        address, stride = codes.data_ptr(), chosen.quantize.stride
    return _launched(chosen, of, weight, bias, residual, y, x=address, x_stride=stride, x_scale=x_scale)


def takes(shape: torch.Size, dtype: torch.dtype, device: torch.device, weight: MixedWeight, gate: int) -> bool:
    """Tell whether one launch takes all row sets of a weight with activations of a shape and dtype on a device."""
    return _serving(shape.numel(), weight, dtype, device, gate) is not None


def multiply_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    weight: MixedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: int,
) -> torch.Tensor:
    """Serve a call that one launch `takes`, on the current device, of rows that are quantised already.

    Args:
        codes: [N, IC] as kernels read them: rows start on 16 bytes.
        scales: float32 [N], or [N, groups] with those of a group behind each other.
        dtype: of the rows before, and of the result.
        weight, bias, residual, gate: as for `multiply`.

    Returns:
        [N, outputs] in `dtype`.

    Raises:
        ShapeError: as `multiply`.
    """
    of, n = _served(weight), len(codes)
    _check(dtype, codes.device, weight, bias, residual)
    chosen = of.prepared(weight, n, dtype, codes.get_device(), gate)
    y = current.empty((n, of.outputs), (of.outputs, 1), dtype)
    x = {"x": codes.data_ptr(), "x_stride": codes.stride(0), "x_scale": scales.data_ptr()}
    return _launched(chosen, of, weight, bias, residual, y, **x)


def _serving(size: int, weight: MixedWeight, dtype: torch.dtype, device: torch.device, gate: int) -> _Served | None:
    """Return what calls with a weight have in common where one launch takes all row sets, else `None`."""
    now = mode.current()
    if not size or not weight.sets or now.batch_invariant or now.config is not None:
        return None
    of = _served(weight)
    return None if of.misfit(dtype, device, gate, now.key) else of


def _launched(
    chosen: _Prepared,
    of: _Served,
    weight: MixedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    **x: int,
) -> torch.Tensor:
    """Launch a prepared call on the current device, that of y, which is written and returned.

    Args:
        chosen, of, weight, bias, residual: of the call.
        y: the result.
        x: address, stride and scales of the rows (`kernels.mixed.prepare`).
    """
    index, now = y.get_device(), mode.current()
    stream, partial, arrived = current.stream(index), 0, 0
    if chosen.floats:
        partial, arrived, _parts = now.workspace.split_sums(index, stream, chosen.floats, chosen.counters)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else tensors.contiguous(residual)
    still = [settled(one.data, one.scale) for one in weight.sets]
    chosen.launch(
        stream=stream,
        sets=of.addresses(weight),
        **x,
        features=0 if weight.features is None else weight.features.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        y=y.data_ptr(),
        partial=partial,
        arrived=arrived,
        early=all(still) and now.early,
    )
    return y


def reason(mix: Mix, layout: str, ic: int, dtype: torch.dtype, chip: Chip | None) -> str:
    """Return why no launch takes all row sets of a mix at once, or an empty string where one does.

    Args:
        mix: the levels of the weight.
        layout: of every row set.
        ic: input channels.
        dtype: of the activations, as they come.
        chip: the GPU; `None` where the reference serves all calls.
    """
    activations = activations_of(layout)
    if chip is None or chip.capability != (9, 0):
        where = "none" if chip is None else "{}.{}".format(*chip.capability)
        return f"row sets in one launch need compute capability 9.0, this is {where}"
    if layout == STREAM or LAYOUTS[layout] != target_of(activations, dtype):
        return f"row sets lie in {layout}, which no kernel multiplies with {dtype} activations"
    for level in mix.levels:
        why = unsupported_reason(level, LAYOUTS[layout]) or dispatch.overflow_reason(level, layout, ic)
        if why:
            return why
    return ""


def layout_of(weight: MixedWeight) -> str:
    """Return the layout that all row sets have, and that of the stored stream where they differ."""
    layouts = {one.layout for one in weight.sets}
    return layouts.pop() if len(layouts) == 1 else STREAM


def problem_of(weight: MixedWeight, layout: str, n: int) -> tuple[tuple[Packing, ...], tune.MixedProblem]:
    """Return the packings of all levels in a layout, and the problem that n tokens make with a weight.

    Args:
        weight: no number of it is read.
        layout: of every row set.
        n: tokens.
    """
    rows = {one.scheme: one.shape[0] for one in weight.sets}
    packings = tuple(Packing.of(level, LAYOUTS[layout]) for level in weight.mix.levels)
    activations, ic = activations_of(layout), weight.shape[1]
    levels = [
        LinearProblem.of(packing, (rows.get(packing.scheme, 0), ic), n, activations=activations) for packing in packings
    ]
    return packings, tune.MixedProblem(levels=tuple(levels), apart=weight.features is not None)


class _Prepared:
    """How calls of one weight, dtype, device and number of tokens are launched: as `ops.prepared.Prepared`."""

    __slots__ = ("counters", "floats", "launch", "quantize")

    def __init__(self, of: _Served, n: int, dtype: torch.dtype, index: int, gate: int) -> None:
        from tersor.kernels import jit, mixed

        result = target_of(Activations.NATIVE, dtype)
        assert result is not None
        problem = of.problem.of_tokens(n)
        chip = hardware.of_device(index)
        config = mode.current().mixed or tune.choose(problem, chip)
        self.launch = mixed.prepare(
            jit.get(mixed.source(of.packings, result, config.tile, chip, gate), index),
            config,
            bf16=result == "bfloat16",
            ic=problem.ic,
            n=n,
            outputs=of.outputs,
        )
        self.floats, self.counters = config.floats, config.counters
        self.quantize = Quantize.of(result, problem.activations, n, problem.ic, index)


class _Served:
    """What calls with one weight have in common; the weight keeps it."""

    def __init__(self, weight: MixedWeight) -> None:
        self.mix, self.ic, self.gated = weight.mix, weight.shape[1], weight.gated
        self.layout = layout_of(weight)
        self.native = activations_of(self.layout) is Activations.NATIVE
        self.outputs = weight.channels if weight.gated else weight.shape[0]
        self.places = [weight.mix.levels.index(one.scheme) for one in weight.sets]
        self.packings: tuple[Packing, ...] = ()
        self._reasons: dict[tuple[torch.dtype, torch.device, int], str] = {}
        self._prepared: dict[tuple[int, torch.dtype, int, int], _Prepared] = {}
        _all.add(self)

    def misfit(self, dtype: torch.dtype, device: torch.device, gate: int, now: int) -> str:
        """Return why no launch takes all row sets at once, or an empty string."""
        if bool(gate) != self.gated:
            return "rows of gate and up are put in order by pairs"
        key = (dtype, device, now)
        found = self._reasons.get(key)
        if found is None:
            chip = dispatch.kernel_chip(device)
            found = self._reasons[key] = reason(self.mix, self.layout, self.ic, dtype, chip)
        return found

    def prepared(self, weight: MixedWeight, n: int, dtype: torch.dtype, index: int, gate: int) -> _Prepared:
        """Return the prepared call, made at its first use; compiles and loads the kernel it needs."""
        if not self.packings:
            self.packings, self.problem = problem_of(weight, self.layout, 1)
        if mode.current().mixed is not None:
            return _Prepared(self, n, dtype, index, gate)  # a measurement's is not kept
        key = (n, dtype, index, gate)
        found = self._prepared.get(key)
        if found is None:
            if len(self._prepared) >= _MOST_KEPT:
                self._prepared.clear()
            found = self._prepared.setdefault(key, _Prepared(self, n, dtype, index, gate))
        return found

    def addresses(self, weight: MixedWeight) -> list[int]:
        """Return the addresses of codes and scales of every level, 0 where it has no rows."""
        found = [0] * (2 * MOST_LEVELS)
        for place, one in zip(self.places, weight.sets, strict=True):
            found[2 * place], found[2 * place + 1] = one.data.data_ptr(), one.scale.data_ptr()
        return found

    def forget(self) -> None:
        """Drop every prepared call."""
        self._reasons.clear()
        self._prepared.clear()


_all: weakref.WeakSet[_Served] = weakref.WeakSet()
_by_form: dict[str, _Served] = {}
"""Text of a weight (`row_sets`) -> what calls with such weights have in common: none of it is a number of a weight."""


def forget() -> None:
    """Drop every prepared call, as `prepared.forget` does."""
    for one in list(_all):
        one.forget()
    _by_form.clear()


def remember(weight: MixedWeight, form: str) -> None:
    """Let a weight that was made for one call of an operator serve it as the last one of its form was served."""
    found = _by_form.get(form)
    if found is None:
        found = _by_form.setdefault(form, _Served(weight))
    object.__setattr__(weight, "note", found)


def _served(weight: MixedWeight) -> _Served:
    found: _Served | None = getattr(weight, "note", None)
    if found is None:
        found = _Served(weight)
        object.__setattr__(weight, "note", found)  # not part of the frozen value
    return found


def _check(
    dtype: torch.dtype,
    device: torch.device,
    weight: MixedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    """Raise ShapeError where dtypes or devices do not fit those of activations."""
    if weight.device != device:
        raise ShapeError(f"linear: x is on {device}, the weight on {weight.device}")
    for name, one in (("bias", bias), ("residual", residual)):
        if one is not None and (one.dtype != dtype or one.device != device):
            raise ShapeError(f"linear: {name} is {one.dtype} on {one.device}, expected {dtype} on {device}")
