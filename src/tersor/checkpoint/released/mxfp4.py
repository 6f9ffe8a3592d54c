"""gpt-oss: the experts of a layer as one tensor of 4-bit floats in blocks of 32, each with an exponent."""

from __future__ import annotations

import torch

from tersor.checkpoint.released.parts import Assembly, check_rank, check_shape, codes_of, read
from tersor.checkpoint.source import StoredTensor
from tersor.formats import get

_BLOCK = 32
_ELEMENT = get("fp4_e2m1")


def mxfp4(assembly: Assembly) -> None:
    """Read `<name>_blocks` [E, OC, IC/32, 16] and `<name>_scales` [E, OC, IC/32] as `<name>` [E, IC, OC]."""
    for name, blocks in list(assembly.ending("_blocks")):
        scales = assembly.part(f"{name}_scales", blocks, ("U8", "F8_E8M0"))
        assembly.find(f"{name}_blocks", ("U8",))
        check_rank(blocks, 4)
        experts, oc, groups, _ = blocks.spec.shape
        check_shape(blocks, (experts, oc, groups, _BLOCK // 2))
        check_shape(scales, (experts, oc, groups))
        _put(assembly, name, blocks, scales)


def decoded(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return float32 [OC, IC] of codes uint8 [OC, IC/32, 16] and exponents uint8 or float8_e8m0fnu [OC, IC/32]."""
    codes = codes_of(blocks, _ELEMENT.bits, _BLOCK)
    exponents = scales.contiguous().view(torch.uint8).view(torch.float8_e8m0fnu).float()
    return (_ELEMENT.decode(codes) * exponents.unsqueeze(-1)).flatten(-2)


def _put(assembly: Assembly, name: str, blocks: StoredTensor, scales: StoredTensor) -> None:
    experts, oc, groups, _ = blocks.spec.shape

    def decode(first: int, last: int) -> torch.Tensor:
        rows = []
        for expert in range(first, last):
            codes, exponents = (read(tensor, (expert, expert + 1))[0] for tensor in (blocks, scales))
            rows.append(decoded(codes, exponents).T)
        return torch.stack(rows)

    assembly.put(name, (experts, groups * _BLOCK, oc), (blocks, scales), decode)
