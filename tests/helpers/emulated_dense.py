"""Products of dense kernels that run on a CPU, launched as the operators do."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.emulated import Emulated
from tersor.kernels import dense
from tersor.kernels.tune import LinearConfig
from tersor.layouts import PackedWeight
from tersor.layouts.packing import Packing


def product(
    weight: PackedWeight,
    config: LinearConfig,
    x: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    folder: Path,
    arch: int,
    rounds: int = 0,
) -> torch.Tensor:
    """Return what a kernel makes of x [n, ic], and hold that the counters of splits are zeros again.

    Args:
        weight: in tiles for activations of x's dtype.
        config: of the launch.
        x: float16 or bfloat16, rows without gaps.
        bias: [oc], residual: [n, oc] or none, both in x's dtype.
        folder: for what is compiled.
        arch: compute capability, times 100.
        rounds: of the outliers that the weight has beside its codes.

    Returns:
        [n, oc], in x's dtype.
    """
    (oc, ic), n, target = weight.shape, len(x), str(x.dtype).removeprefix("torch.")
    packing = Packing.of(weight.scheme.dense, target)
    launch = dense.prepare_fused(
        Emulated(dense.fused_source(packing, target, config, outliers=rounds), folder, arch),  # type: ignore[arg-type]
        config,
        bf16=target == "bfloat16",
        oc=oc,
        ic=ic,
        n=n,
        aligned=ic % 8 == 0,
        factor=packing.factor,
    )
    y = torch.full((n, oc), torch.nan, dtype=x.dtype)
    floats, counters = dense.parts(config, n)
    partial, arrived = torch.full((max(1, floats),), torch.nan), torch.zeros(max(1, counters), dtype=torch.int32)
    places = {"weight": weight.data, "scale": weight.scale, "x": x, "bias": bias, "y": y}
    places |= {"partial": partial, "arrived": arrived}
    if rounds:
        assert weight.arranged is not None
        places["kept"] = weight.arranged
    addresses = {name: tensor.data_ptr() for name, tensor in places.items()}
    added = 0 if residual is None else residual.data_ptr()
    launch(stream=0, x_stride=ic, x_scale=0, residual=added, early=True, **addresses)
    assert not arrived.any()
    return y
