"""gpt-oss: the experts of a layer as one tensor of 4-bit floats in blocks of 32, each with an exponent."""

from __future__ import annotations

import torch

from tersor.checkpoint.released.parts import Assembly, check_rank, check_shape, read, read_float
from tersor.checkpoint.released.scaled import small_floats
from tersor.checkpoint.source import StoredTensor

_BLOCK = 32


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


def _put(assembly: Assembly, name: str, blocks: StoredTensor, scales: StoredTensor) -> None:
    experts, oc, groups, _ = blocks.spec.shape
    values = small_floats("fp4_e2m1")

    def decode(first: int, last: int) -> torch.Tensor:
        rows = []
        for expert in range(first, last):
            codes = values(read(blocks, (expert, expert + 1))[0])
            scale = read_float(scales, (expert, expert + 1))[0]
            rows.append((codes * scale.unsqueeze(-1)).reshape(oc, groups * _BLOCK).T)
        return torch.stack(rows)

    assembly.put(name, (experts, groups * _BLOCK, oc), (blocks, scales), decode)
