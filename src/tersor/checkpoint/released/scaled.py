"""Codes that are numbers, times scales: fp8, int8 and microscaled floats, under the names of several engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tersor.checkpoint.released.parts import (
    SCALE_DTYPES,
    Assembly,
    check_rank,
    check_shape,
    codes_of,
    read,
    read_float,
)
from tersor.checkpoint.released.scales import Grid, grid_of, sizes_of
from tersor.checkpoint.source import StoredTensor
from tersor.errors import CheckpointError
from tersor.formats.element import get

FLOAT8 = ("F8_E4M3", "F8_E5M2")
NOT_WEIGHTS = (
    r".*[._](input_scale|input_scale_inv|activation_scale|qscale_act|output_scale|kv_scale|k_scale|v_scale|q_scale)"
)
"""Scales of activations and of a cache, fixed at calibration: compressed weights have no use for them."""
MODELOPT_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4")
"""What ModelOpt calls the formats that are read."""

_FP8_SCALES = ("_scale_inv", "_scale")
_STEM_SCALES = (".scale_inv", ".scale", ".qscale_weight")
_ROW_32 = (1, 32)
_ROW_16 = (1, 16)

Values = Callable[[torch.Tensor], torch.Tensor]
"""Turns stored codes [..., n] into float32 values [..., IC]."""


def fp8(assembly: Assembly) -> None:
    """Read `quant_method: fp8` and its like: float8 weights, scales for all, a row or a block beside them.

    Experts may be 4-bit floats, two in a byte, with a scale for each 32 (DeepSeek).
    """
    stated = sizes_of(assembly.settings.get("weight_block_size"))
    for name, weight in list(assembly.of_dtype((*FLOAT8, "I8"))):
        stem = name.removesuffix(".weight")
        names = [name + suffix for suffix in _FP8_SCALES]
        if stem != name:
            names += [stem + suffix for suffix in _STEM_SCALES]
        elif name.endswith(_FP8_SCALES) or weight.spec.dtype == "I8":
            continue
        check_rank(weight, 2, 3)
        scales = assembly.part(names, weight, SCALE_DTYPES)
        if weight.spec.dtype == "I8":
            shape = (*weight.spec.shape[:-1], 2 * weight.spec.shape[-1])
            put_scaled(assembly, name, shape, weight, small_floats("fp4_e2m1"), grid_of(scales, shape, [_ROW_32]))
        else:
            grid = grid_of(scales, weight.spec.shape, stated)
            put_scaled(assembly, name, weight.spec.shape, weight, torch.Tensor.float, grid)
    assembly.drop(NOT_WEIGHTS)


def modelopt(assembly: Assembly) -> None:
    """Read ModelOpt's FP8 and NVFP4: as fp8, and 4-bit floats whose scales of 16 have a scale of their own."""
    for stem, second in list(assembly.ending(".weight_scale_2")):
        weight = assembly.part(f"{stem}.weight", second, ("U8",))
        check_rank(weight, 2)
        shape = (weight.spec.shape[0], 2 * weight.spec.shape[1])
        scales = assembly.part(f"{stem}.weight_scale", weight, ("F8_E4M3",))
        check_single(second)
        values = small_floats("fp4_e2m1")
        grid = grid_of(scales, shape, [_ROW_16])
        put_scaled(assembly, f"{stem}.weight", shape, weight, values, grid, second)
    fp8(assembly)


def quark(assembly: Assembly) -> None:
    """Read Quark's FP8, and its microscaled floats of 4 and 6 bits in bytes."""
    name = _quark_element(assembly)
    bits = 8 if name is None else get(name).bits
    for stem, scales in list(assembly.ending(".weight_scale")):
        weight = assembly.part(f"{stem}.weight", scales, (*FLOAT8, "U8"))
        if weight.spec.dtype != "U8":
            continue
        if name is None or bits == 8 or scales.spec.dtype not in ("U8", "F8_E8M0"):
            raise CheckpointError(
                f"{weight.file.path}: tensor {weight.spec.name!r} is neither float8 nor a microscaled float, which are "
                "what is read of quark: start from the uncompressed model"
            )
        check_rank(weight, 2)
        shape = (weight.spec.shape[0], 8 * weight.spec.shape[1] // bits)
        grid = grid_of(scales, shape, [_ROW_32])
        put_scaled(assembly, f"{stem}.weight", shape, weight, small_floats(name), grid)
    fp8(assembly)


def _quark_element(assembly: Assembly) -> str | None:
    """Return the one element format of a Quark checkpoint's packed weights, `None` where it has another dtype."""
    settings = assembly.settings
    schemes = [settings.get("global_quant_config"), *(settings.get("layer_quant_config") or {}).values()]
    weights = [scheme.get("weight") for scheme in schemes if isinstance(scheme, dict)]
    names = {"fp4": "fp4_e2m1", "fp6_e2m3": "fp6_e2m3", "fp6_e3m2": "fp6_e3m2"}
    found = {names.get(str(weight.get("dtype"))) for weight in weights if isinstance(weight, dict)}
    return found.pop() if len(found) == 1 else None


def small_floats(name: str) -> Values:
    """Return what turns a bit stream of a float format of 4 or 6 bits into values; the first element is lowest."""
    element = get(name)

    def values(raw: torch.Tensor) -> torch.Tensor:
        count = raw.shape[-1] * raw.element_size() * 8 // element.bits
        return element.decode(codes_of(raw, element.bits, count))

    return values


def check_single(tensor: StoredTensor) -> None:
    """Check that a tensor is one number.

    Raises:
        CheckpointError: it is not.
    """
    check_shape(tensor, (), (1,), (1, 1))


def put_scaled(
    assembly: Assembly,
    name: str,
    shape: tuple[int, ...],
    weight: StoredTensor,
    values: Values,
    grid: Grid,
    second: StoredTensor | None = None,
    *,
    divide: bool = False,
    zero_points: StoredTensor | None = None,
    dropped: Sequence[StoredTensor | None] = (),
) -> None:
    """Put the weight (codes - zero points) x scales.

    Args:
        assembly: where to.
        name, shape: of the weight, [OC, IC] or [E, OC, IC].
        weight: the codes, with the same first axes.
        values: what a code is.
        grid: the scales.
        second: a scale of the scales, which multiplies them, or divides them with `divide`.
        divide: see `second`.
        zero_points: of the shape of the scales.
        dropped: further tensors that the weight is stored with.
    """

    def matrix(codes: torch.Tensor, expert: int, first: int, last: int) -> torch.Tensor:
        scale = grid.rows(expert, first, last)
        if second is not None:
            factor = read_float(second).reshape(())
            scale = scale / factor if divide else scale * factor
        plain = values(codes)
        if zero_points is not None:
            plain = plain - grid.companion(zero_points, expert, first, last)
        return plain * scale

    def decode(first: int, last: int) -> torch.Tensor:
        codes = read(weight, (first, last))
        if len(shape) == 2:
            return matrix(codes, 0, first, last)
        return torch.stack([matrix(codes[index - first], index, 0, shape[1]) for index in range(first, last)])

    assembly.put(name, shape, (weight, grid.tensor, second, zero_points, *dropped), decode)
