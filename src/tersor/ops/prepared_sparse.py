"""How a call with a pruned weight in kernel tiles is served: decided once, as `prepared` does of a dense one."""

from __future__ import annotations

import torch

from tersor import hardware
from tersor.formats import Activations
from tersor.kernels import jit, quantizing
from tersor.kernels import sparse as kernels
from tersor.layouts.sparse_packing import SparsePacking
from tersor.ops import mode, sparse_layout


class PreparedSparse:
    """How calls of one kind of weight, dtype, device and number of tokens are served.

    Attributes:
        launch: launches the fused kernel; `None` where slices are decoded for cuBLAS.
        quantize: launches the kernel that quantises activations before that; `None` where they stay as they come.
        codes_stride, codes_bytes: bytes from one token's quantised activations to the next, and of all of them.
        floats, counters: sums and counters that its places exchange; zero without any.
    """

    __slots__ = ("codes_bytes", "codes_stride", "counters", "floats", "launch", "quantize")

    def __init__(
        self,
        packing: SparsePacking,
        shape: tuple[int, int],
        n: int,
        dtype: torch.dtype,
        places: int,
        nbytes: int,
        index: int,
        gate: int,
    ) -> None:
        """Decide, compile and load; places and bytes are those of a weight (OC, IC), `gate` is a `Gate` or 0."""
        chip = hardware.of_device(index)
        problem = sparse_layout.problem_of(packing, shape, n, places, nbytes, mode.current().batch_invariant)
        _, config = sparse_layout.decide(problem, chip)
        config = mode.current().sparse or config
        self.launch: kernels.SparseLaunch | None = None
        self.quantize: quantizing.QuantizeLaunch | None = None
        self.floats = self.counters = self.codes_stride = self.codes_bytes = 0
        if config is None:
            return
        result, (oc, ic) = str(dtype).removeprefix("torch."), shape
        source = kernels.sparse_source(packing, config.tile, gate, result if packing.bytewise else "")
        if packing.bytewise:
            way = Activations.E4M3
            self.quantize = quantizing.prepare_quantize(
                jit.get(quantizing.quantize_source(result, way), index), n=n, ic=ic, activations=way
            )
            self.codes_stride = quantizing.codes_stride(ic)
            self.codes_bytes = quantizing.quantized_bytes(n, ic, way)
        self.launch = kernels.prepare_sparse(
            jit.get(source, index),
            config,
            bf16=result == "bfloat16",
            oc=oc,
            ic=ic,
            n=n,
            places=places,
            factor=packing.factor,
        )
        self.floats, self.counters = config.floats(oc, n)
