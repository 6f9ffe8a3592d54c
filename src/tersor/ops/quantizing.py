"""How do activations become bytes that nothing ahead of a product has made bytes? In a launch of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tersor.formats import Activations
from tersor.kernels import jit, quantizing
from tersor.kernels.quantizing import QuantizeLaunch
from tersor.ops import current


@dataclass(frozen=True, slots=True)
class Quantize:
    """Makes bytes of the activations of one prepared product, dense, mixed or of experts.

    Attributes:
        launch: of the kernel.
        stride: bytes from one row's codes to the next.
        size: bytes of codes, their scales, and rows behind those that a tile may read.
    """

    launch: QuantizeLaunch
    stride: int
    size: int

    @staticmethod
    def of(result: str, activations: Activations, n: int, ic: int, index: int, room: int = 0) -> Quantize | None:
        """Return what quantises activations [n, ic]; `None` where they stay as they come.

        Args:
            result: their dtype, `float16` or `bfloat16`.
            activations: what they become.
            n, ic: rows and channels.
            index: the CUDA device.
            room: rows behind those that a tile may read; what is in them is not used.
        """
        if activations is Activations.NATIVE:
            return None
        function = jit.get(quantizing.quantize_source(result, activations), index)
        launch = quantizing.prepare_quantize(function, n=n, ic=ic, activations=activations)
        stride = quantizing.codes_stride(ic)
        return Quantize(launch, stride, quantizing.quantized_bytes(n, ic, activations) + room * stride)

    def __call__(self, stream: int, x: int, x_stride: int, order: int = 0, top_k: int = 1) -> tuple[torch.Tensor, int]:
        """Launch on the current device.

        Args:
            stream: handle of the stream.
            x, x_stride: address of the activations, and elements from one row to the next.
            order, top_k: as in `kernels.quantizing.prepare_quantize`.

        Returns:
            The codes, which are held until the launch that reads them and are then the stream's, and the address of
            the scales.
        """
        codes = current.empty((self.size,), (1,), torch.uint8)
        given = {"x": x, "x_stride": x_stride, "codes": codes.data_ptr()}
        return codes, self.launch(stream=stream, order=order, top_k=top_k, **given)
