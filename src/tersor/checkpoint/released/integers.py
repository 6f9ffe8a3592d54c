"""GPTQ and AWQ: integers packed into words of 32 bits, with scales and zero points for groups of input channels.

Both store a weight as [IC, OC]: words run down a column in GPTQ and along a row in AWQ.
"""

from __future__ import annotations

import torch

from tersor.checkpoint.released.parts import Assembly, check_rank, check_shape, codes_of, read
from tersor.checkpoint.source import StoredTensor
from tersor.errors import CheckpointError

_WORD = 32
_GPTQ_BITS = (2, 3, 4, 8)
_AWQ_BITS = 4
_AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of the eight fields of a word holds column 0, 1, ... of the eight that it stands for."""
_FLOATS = ("F16", "BF16", "F32")


def gptq(assembly: Assembly) -> None:
    """Read GPTQ: bits of each layer are told by its shapes, zero points are one too low unless it is gptq_v2."""
    lifted = assembly.settings.get("checkpoint_format") != "gptq_v2"
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
        zero = codes_of(read(zeros), bits, oc)[:, first:last].T
        if lifted:
            zero = (zero + 1) & ((1 << bits) - 1)
        groups = torch.arange(ic) // size if index is None else _groups(index, scales.spec.shape[0])
        scale = scales.file.read_columns(scales.spec.name, first, last).float().T
        return (codes.float() - zero.float()[:, groups]) * scale[:, groups]

    assembly.put(f"{stem}.weight", shape, parts, decode)


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
            packed = part.file.read_columns(part.spec.name, start, stop)
            codes = codes_of(packed, _AWQ_BITS, packed.shape[1] * per_word)
            ordered = codes.view(len(packed), -1, per_word)[..., list(_AWQ_COLUMNS)]
            return ordered.reshape(len(packed), -1)[:, inside].T.float()

        scale = scales.file.read_columns(scales.spec.name, first, last).float().T
        zero = fields(zeros)
        groups = torch.arange(shape[1]) // size
        return (fields(weight) - zero[:, groups]) * scale[:, groups]

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
