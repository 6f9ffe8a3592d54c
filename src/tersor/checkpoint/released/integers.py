"""GPTQ and AWQ: integers packed into words of 32 bits, with scales and zero points for groups of input channels.

Both store a weight as [IC, OC]: words run down a column in GPTQ and along a row in AWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tersor.checkpoint.released.parts import Assembly, check_rank, check_shape, codes_of, read
from tersor.checkpoint.source import StoredTensor
from tersor.errors import CheckpointError

_WORD = 32
_GPTQ_BITS = (2, 3, 4, 8)
_AWQ_BITS = 4
_FLOATS = ("F16", "BF16", "F32")


def gptq_format(settings: Mapping[str, Any]) -> str:
    """Return what the settings of GPTQ say of how it is stored: `gptq`, `gptq_v2`, or one that is not read."""
    return str(settings.get("checkpoint_format") or settings.get("format") or "gptq")


def gptq(assembly: Assembly) -> None:
    """Read GPTQ: bits of each layer are told by its shapes, zero points are one too low unless it is gptq_v2."""
    lifted = gptq_format(assembly.settings) != "gptq_v2"
    for stem, weight in list(assembly.ending(".qweight")):
        assembly.find(f"{stem}.qweight", ("I32",))
        check_rank(weight, 2)
        zeros = assembly.part(f"{stem}.qzeros", weight, ("I32",))
        scales = assembly.part(f"{stem}.scales", weight, _FLOATS)
        index = assembly.find(f"{stem}.g_idx", ("I32", "I64"))
        words, oc = weight.spec.shape
        check_rank(scales, 2)
        check_rank(zeros, 2)
        groups = scales.spec.shape[0]
        check_shape(scales, (groups, oc))
        likely = sorted(_GPTQ_BITS, key=lambda bits: bits != assembly.settings.get("bits"))
        bits = next((bits for bits in likely if zeros.spec.shape[1] == -(-oc * bits // _WORD)), None)
        if bits is None or words * _WORD % bits:
            raise CheckpointError(
                f"{zeros.file.path}: tensor {zeros.spec.name!r} has shape {list(zeros.spec.shape)}: "
                f"no number of bits ({', '.join(map(str, _GPTQ_BITS))}) fits {oc} output channels"
            )
        ic = words * _WORD // bits
        check_shape(zeros, (groups, zeros.spec.shape[1]))
        if index is not None:
            check_shape(index, (ic,))
        size = _group_size(assembly, weight, ic, groups)
        _put_gptq(assembly, stem, (oc, ic), bits, size, lifted, (weight, zeros, scales, index))


def _put_gptq(
    assembly: Assembly,
    stem: str,
    shape: tuple[int, int],
    bits: int,
    size: int,
    lifted: bool,
    parts: tuple[StoredTensor, StoredTensor, StoredTensor, StoredTensor | None],
) -> None:
    weight, zeros, scales, index = parts
    oc, ic = shape

    def decode(first: int, last: int) -> torch.Tensor:
        columns = weight.file.read_columns(weight.spec.name, first, last)
        codes = codes_of(columns.T, bits, ic)
        zero = codes_of(read(zeros), bits, oc)[:, first:last]
        if lifted:
            zero = (zero + 1) & ((1 << bits) - 1)
        scale = scales.file.read_columns(scales.spec.name, first, last)
        return _weight(codes, zero, scale, size, None if index is None else _groups(index, len(scale)))

    assembly.put(f"{stem}.weight", shape, parts, decode)


def _weight(
    codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, size: int, groups: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the float32 weight [rows, IC].

    Args:
        codes: uint8 [rows, IC].
        zero: uint8 [groups, rows].
        scale: [groups, rows].
        size: input channels that share a scale.
        groups: int64 [IC], the group of each channel; `None` where they follow each other.
    """
    zero, scale = zero.T.float(), scale.T.float()
    in_order = torch.arange(codes.shape[1]) // size
    if codes.shape[1] % size == 0 and (groups is None or torch.equal(groups, in_order)):
        plain = codes.float().view(len(codes), -1, size)
        return plain.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).view(codes.shape)
    groups = in_order if groups is None else groups
    return (codes.float() - zero[:, groups]) * scale[:, groups]


def _groups(index: StoredTensor, count: int) -> torch.Tensor:
    groups = read(index).long()
    low, high = int(groups.min()), int(groups.max())
    if low < 0 or high >= count:
        raise CheckpointError(
            f"{index.file.path}: tensor {index.spec.name!r} names group {low if low < 0 else high} of {count}"
        )
    return groups


def awq(assembly: Assembly) -> None:
    """Read AWQ as `version: gemm` stores it: 4 bits, eight output channels in a word."""
    for stem, weight in list(assembly.ending(".qweight")):
        assembly.find(f"{stem}.qweight", ("I32",))
        check_rank(weight, 2)
        zeros = assembly.part(f"{stem}.qzeros", weight, ("I32",))
        scales = assembly.part(f"{stem}.scales", weight, _FLOATS)
        ic, words = weight.spec.shape
        oc = words * _WORD // _AWQ_BITS
        check_rank(scales, 2)
        groups = scales.spec.shape[0]
        check_shape(scales, (groups, oc))
        check_shape(zeros, (groups, words))
        _put_awq(assembly, stem, (oc, ic), _group_size(assembly, weight, ic, groups), (weight, zeros, scales))


def _put_awq(
    assembly: Assembly,
    stem: str,
    shape: tuple[int, int],
    size: int,
    parts: tuple[StoredTensor, StoredTensor, StoredTensor],
) -> None:
    weight, zeros, scales = parts
    per_word = _WORD // _AWQ_BITS

    def decode(first: int, last: int) -> torch.Tensor:
        start, stop = first // per_word, -(-last // per_word)
        inside = slice(first - start * per_word, last - start * per_word)

        def fields(part: StoredTensor) -> torch.Tensor:
            # A word holds columns 0 2 4 6 in its low half and 1 3 5 7 in its high one.
            packed = part.file.read_columns(part.spec.name, start, stop)
            codes = codes_of(packed, _AWQ_BITS, packed.shape[1] * per_word)
            halves = codes.view(len(packed), -1, 2, per_word // 2)
            return halves.transpose(2, 3).reshape(len(packed), -1)[:, inside]

        scale = scales.file.read_columns(scales.spec.name, first, last)
        return _weight(fields(weight).T.contiguous(), fields(zeros), scale, size)

    assembly.put(f"{stem}.weight", shape, parts, decode)


def _group_size(assembly: Assembly, weight: StoredTensor, ic: int, groups: int) -> int:
    """Return how many input channels share a scale: what config.json says where that fits, else an even share.

    Raises:
        CheckpointError: neither fits.
    """
    stated = assembly.settings.get("group_size", assembly.settings.get("q_group_size"))
    if isinstance(stated, int) and stated > 0 and -(-ic // stated) == groups:
        return stated
    if ic % groups:
        raise CheckpointError(
            f"{weight.file.path}: tensor {weight.spec.name!r} has {ic} input channels, and its scales are of {groups} "
            "groups"
        )
    return ic // groups
