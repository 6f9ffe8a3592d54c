"""Products of the kernel of pruned weights, launched as the operators do, beside the same in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from helpers.allowance import within
from tersor import formats
from tersor.kernels.sparse import launch_decompress, prepare_sparse
from tersor.kernels.tune.sparse import SparseConfig
from tersor.layouts import sparse_tiles
from tersor.layouts.blocks import UNIT_OC
from tersor.layouts.sparse_packing import FP8, SparsePacking

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """A pruned weight with random numbers and scales, in kernel tiles.

    Attributes:
        packing: of its values.
        tiles: what a kernel reads.
        scale: float32 [OC].
        weight: float64 [OC, IC], scaled, with zeros for what is pruned.
    """

    packing: SparsePacking
    tiles: sparse_tiles.SparseTiles
    scale: torch.Tensor
    weight: torch.Tensor

    @staticmethod
    def of(
        kept: torch.Tensor,
        values: str,
        dtype: torch.dtype,
        places: int,
        largest: float | None = None,
        smallest: float | None = None,
        bytewise: bool = False,
    ) -> Case:
        """Make a weight of which weights are left, with codes of a format or plain numbers of `dtype`.

        Args:
            kept: bool [OC, IC], on any device.
            values, dtype, places: of values, of activations, of the layout.
            largest, smallest: magnitudes that no code exceeds or falls short of.
            bytewise: whether activations are multiplied in e4m3.
        """
        target, device = FP8 if bytewise else str(dtype).removeprefix("torch."), kept.device
        generator = torch.Generator().manual_seed(kept.shape[0])
        if values == target:
            packing = SparsePacking.of(values, target)
            numbers = torch.randint(-8, 9, kept.shape, generator=generator).to(dtype) / 4
            weight = numbers.double()
        else:
            scheme = formats.get_scheme(values)
            numbers = torch.randint(0, 1 << scheme.format.bits, kept.shape, generator=generator).to(torch.uint8)
            if largest is not None:
                numbers[scheme.format.decode(numbers).abs() > largest] = 1
            if smallest is not None:
                numbers[scheme.format.decode(numbers).abs() < smallest] = 0x40
            packing = SparsePacking.holding(scheme, target, numbers)
            weight = scheme.format.decode(numbers).double()
        tiles = sparse_tiles.pack(kept, packing.pack(numbers.to(device)), places, 0, bytewise)
        scale = ((torch.rand(kept.shape[0], generator=generator) + 0.5) / 64).to(device)  # no product leaves float16
        weight = torch.where(kept, weight.to(device), 0.0) * scale.double()[:, None]
        return Case(packing, tiles, scale, weight)

    def tensors(self, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return activations [n, IC], a bias [OC] and a residual [n, OC]."""
        (oc, ic), generator = self.tiles.shape, torch.Generator().manual_seed(n)
        x = torch.randint(-4, 5, (n, ic), generator=generator)
        bias, residual = torch.randn(oc, generator=generator), torch.randn(n, oc, generator=generator)
        x, bias, residual = (one.to(self.scale.device, dtype) for one in (x, bias, residual))
        return x, bias, residual

    def launched(
        self, function: Any, config: SparseConfig, x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """Return the product of a loaded kernel on the current stream, [n, OC]."""
        (oc, ic), device = self.tiles.shape, x.device
        dtype, x_scale = x.dtype, None
        if self.packing.bytewise:  # whole numbers that e4m3 has, divided by another power of two for each token
            x_scale = 2.0 ** -(torch.arange(len(x), device=device) % 3).float()
            codes = torch.zeros(len(x), -(-ic // 16) * 16, dtype=torch.uint8, device=device)
            codes[:, :ic] = (x.float() / x_scale[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
            x = codes
        launch = prepare_sparse(
            function, config, bf16=dtype == torch.bfloat16, oc=oc, ic=ic, n=len(x), places=self.tiles.places,
            factor=self.packing.factor,
        )  # fmt: skip
        y = torch.full((len(x), oc), NAN, dtype=dtype, device=device)
        floats, counters = config.floats(oc, len(x))
        partial = torch.full((max(floats, 1),), NAN, device=device)
        arrived = torch.zeros(max(counters, 1), dtype=torch.int32, device=device)
        launch(
            stream=torch.cuda.current_stream().cuda_stream if x.is_cuda else 0,
            mask=self.tiles.mask.data_ptr(),
            layers=self.tiles.layers.data_ptr(),
            starts=self.tiles.starts.data_ptr(),
            marks=self.tiles.marks.data_ptr(),
            scale=self.scale.data_ptr(),
            x=x.data_ptr(),
            x_stride=x.stride(0),
            bias=bias.data_ptr(),
            residual=residual.data_ptr(),
            y=y.data_ptr(),
            partial=partial.data_ptr(),
            arrived=arrived.data_ptr(),
            early=False,
            x_scale=0 if x_scale is None else x_scale.data_ptr(),
        )
        assert not bool(arrived.any())
        return y

    def decompressed(self, function: Any, config: SparseConfig, first: int, rows: int) -> torch.Tensor:
        """Return rows of the weight that a loaded kernel decodes on the current stream, [rows, IC]."""
        ic, device, unit = self.tiles.shape[1], self.scale.device, first // UNIT_OC
        dense = torch.full((rows, ic), NAN, dtype=getattr(torch, self.packing.target), device=device)
        launch_decompress(
            function,
            torch.cuda.current_stream().cuda_stream if dense.is_cuda else 0,
            config,
            mask=self.tiles.mask[unit].data_ptr(),
            layers=self.tiles.layers.data_ptr(),
            starts=self.tiles.starts.data_ptr(),
            marks=self.tiles.marks[unit].data_ptr(),
            scale=self.scale[first:].data_ptr(),
            dense=dense.data_ptr(),
            first_row=first,
            rows=rows,
            ic=ic,
            places=self.tiles.places,
            factor=self.packing.factor,
        )
        return dense

    def check(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor,
        dropped: torch.Tensor | float = 0.0,
    ) -> None:
        """Hold a product against float64, rounded once; sums err by 2^-20 of the sum of magnitudes, and `dropped`."""
        added = bias.double() + residual.double()
        exact = x.double() @ self.weight.T + added
        magnitude = x.double().abs() @ self.weight.abs().T + bias.double().abs() + residual.double().abs()
        sums = magnitude * 2.0**-20 + dropped
        within(y, exact, sums + (exact.abs() + sums) * torch.finfo(y.dtype).eps / 2 * 1.001, f"{len(x)} tokens")


def random_mask(oc: int, ic: int, density: float) -> torch.Tensor:
    """Return which weights are left, bool [oc, ic]."""
    return torch.rand(oc, ic, generator=torch.Generator().manual_seed(ic)) < density


def skewed_mask(oc: int, ic: int) -> torch.Tensor:
    """A tenth of the weights, and all of a row, a column, a unit and a block of channels; a unit without any."""
    kept = random_mask(oc, ic, 0.1)
    kept[3], kept[:, 200], kept[128:192] = True, True, True
    kept[:, 512:640], kept[64:128] = True, False
    kept[200:216, ::4] = True
    return kept
