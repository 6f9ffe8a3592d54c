"""compressed-tensors (llm-compressor): packed integers, int8, fp8, and 4- and 6-bit floats, told by their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tersor.checkpoint.released.parts import (
    SCALE_DTYPES,
    Assembly,
    check_rank,
    check_shape,
    codes_of,
    read,
)
from tersor.checkpoint.released.scaled import FLOAT8, NOT_WEIGHTS, check_single, put_scaled, small_floats
from tersor.checkpoint.released.scales import Grid, grid_of, sizes_of
from tersor.checkpoint.source import StoredTensor
from tersor.errors import CheckpointError

READ_FORMATS = (
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
_WORD = 32
_INTEGERS = ("I32", "I64")
_SMALL = {4: "fp4_e2m1", 6: "fp6_e2m3"}


def unreadable(settings: Mapping[str, Any]) -> str:
    """Return what of a compressed-tensors config is not read, in words, or an empty string."""
    formats = [settings.get("format"), *(group.get("format") for group in _groups(settings))]
    for found in formats:
        if found is not None and found not in READ_FORMATS:
            return f"{found}"
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        return str(sparsity["format"])
    transform = settings.get("transform_config")
    if isinstance(transform, dict) and transform.get("config_groups"):
        return "transform_config, weights that are rotated"
    return ""


def compressed_tensors(assembly: Assembly) -> None:
    """Read every weight with a `weight_scale`; which format it has, its dtype and shapes say."""
    blocks = [size for group in _weights(assembly.settings) for size in sizes_of(group.get("block_structure"))]
    sizes = [group.get("group_size") for group in _weights(assembly.settings)]
    blocks += [(1, size) for size in sizes if isinstance(size, int) and size > 0]
    bits = {int(group.get("num_bits") or 0) for group in _weights(assembly.settings)}
    for stem, packed in list(assembly.ending(".weight_packed")):
        assembly.find(f"{stem}.weight_packed", ("I32", "U8"))
        if packed.spec.dtype == "I32":
            _packed_integers(assembly, stem, packed, blocks, bits)
        else:
            _packed_floats(assembly, stem, packed)
    for stem, scales in list(assembly.ending(".weight_scale")):
        if assembly.find(f"{stem}.weight_packed") is None:
            _numbers(assembly, stem, scales, blocks)
    assembly.drop(NOT_WEIGHTS + r"|.*\.(input_zero_point|input_global_scale|output_zero_point|[kvq]_zero_point)")


def _packed_integers(
    assembly: Assembly, stem: str, packed: StoredTensor, blocks: list[tuple[int, int]], bits: set[int]
) -> None:
    scales = assembly.part(f"{stem}.weight_scale", packed, SCALE_DTYPES)
    stated = assembly.part(f"{stem}.weight_shape", packed, _INTEGERS)
    zeros = assembly.find(f"{stem}.weight_zero_point", ("I32", "I8"))
    index = assembly.find(f"{stem}.weight_g_idx", _INTEGERS)
    check_rank(packed, 2)
    check_shape(stated, (2,))
    oc, ic = (int(size) for size in read(stated))
    words = packed.spec.shape[1]
    fitting = [count for count in range(1, 9) if words == -(-ic * count // _WORD)]
    width = next((count for count in fitting if count in bits), fitting[0] if fitting else 0)
    if packed.spec.shape[0] != oc or not width:
        raise CheckpointError(
            f"{packed.file.path}: tensor {packed.spec.name!r} has shape {list(packed.spec.shape)}, which packs no "
            f"weight [{oc}, {ic}], as {stated.spec.name!r} says it is"
        )
    grid = grid_of(scales, (oc, ic), blocks)
    if index is not None:
        check_shape(index, (ic,))
    if zeros is not None and zeros.spec.dtype == "I32":
        check_shape(zeros, (-(-oc * width // _WORD), grid.shape[2]))
    elif zeros is not None:
        check_shape(zeros, scales.spec.shape)
    _put_packed(assembly, stem, width, grid, (packed, scales, zeros, index, stated))


def _put_packed(assembly: Assembly, stem: str, bits: int, grid: Grid, parts: tuple[StoredTensor | None, ...]) -> None:
    packed, scales, zeros, index, _ = parts
    assert packed is not None and scales is not None
    oc, ic = grid.matrix
    middle = 1 << (bits - 1)

    def zero_points(first: int, last: int) -> torch.Tensor | float:
        if zeros is None:
            return 0.0
        if zeros.spec.dtype == "I8":
            return grid.companion(zeros, 0, first, last)
        codes = codes_of(read(zeros).T, bits, oc)[:, first:last].T.float() - middle
        width = grid.block[1] if codes.shape[1] > 1 else 1
        return codes.repeat_interleave(width, 1)[:, :ic]

    def decode(first: int, last: int) -> torch.Tensor:
        codes = codes_of(read(packed, (first, last)), bits, ic).float() - middle
        groups = None if index is None else read(index).long()
        if groups is None or int(groups.min()) < 0:  # -1 stands for channels in their own order
            return (codes - zero_points(first, last)) * grid.rows(0, first, last)
        # Channels are put in the order of their groups, and what is found there goes back to its place.
        order = torch.argsort(groups, stable=True)
        weight = torch.empty_like(codes)
        weight[:, order] = (codes[:, order] - zero_points(first, last)) * grid.rows(0, first, last)
        return weight

    assembly.put(f"{stem}.weight", (oc, ic), parts, decode)


def _packed_floats(assembly: Assembly, stem: str, packed: StoredTensor) -> None:
    second = assembly.find(f"{stem}.weight_global_scale", ("F32", "BF16", "F16"))
    scales = assembly.part(f"{stem}.weight_scale", packed, ("U8", "F8_E8M0") if second is None else ("F8_E4M3",))
    check_rank(packed, 2)
    oc, columns = packed.spec.shape
    check_rank(scales, 2)
    size = _WORD if second is None else 16
    ic = size * scales.spec.shape[1]
    bits = next((bits for bits in _SMALL if ic * bits == 8 * columns), None)
    if bits is None:
        raise CheckpointError(
            f"{packed.file.path}: tensor {packed.spec.name!r} has shape {list(packed.spec.shape)}, and scales "
            f"{list(scales.spec.shape)}: neither 4 nor 6 bits a weight in groups of {size}"
        )
    if second is not None:
        check_single(second)
    grid = grid_of(scales, (oc, ic), [(1, size)])
    put_scaled(assembly, f"{stem}.weight", (oc, ic), packed, small_floats(_SMALL[bits]), grid, second, divide=True)


def _numbers(assembly: Assembly, stem: str, scales: StoredTensor, blocks: list[tuple[int, int]]) -> None:
    name = f"{stem}.weight"
    weight = assembly.part(name, scales, (*FLOAT8, "I8"))
    assembly.find(f"{name}_scale", SCALE_DTYPES)
    zeros = assembly.find(f"{name}_zero_point")
    check_rank(weight, 2, 3)
    grid = grid_of(scales, weight.spec.shape, blocks)
    if zeros is not None:
        check_shape(zeros, scales.spec.shape)
    shape = weight.spec.shape
    put_scaled(assembly, name, shape, weight, torch.Tensor.float, grid, zero_points=zeros)


def _groups(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict):
            yield group


def _weights(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for group in _groups(settings):
        if isinstance(group.get("weights"), dict):
            yield group["weights"]
