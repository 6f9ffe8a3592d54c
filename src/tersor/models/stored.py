"""How does a stored tensor become one in memory? Read as it is asked for, straight to the device; nothing is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch

from tersor import ops
from tersor.checkpoint.names import PACKED, SCALE, ZERO_POINT
from tersor.checkpoint.source import StoredTensor
from tersor.formats import Activations, Scheme
from tersor.layouts import PackedWeight
from tersor.layouts.gated import interleave
from tersor.models.expected import plain_name
from tersor.models.reading import Reading
from tersor.models.weights import Activated, GatedProduct, Matrix, Product, Products
from tersor.ops import Gate

Packed: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Codes, scales and zero points in the stored stream."""
_Kind = TypeVar("_Kind", torch.Tensor, PackedWeight, torch.Tensor | PackedWeight)


class Stored:
    """The weights of a checkpoint that was checked (`expected.check`).

    Attributes:
        dtype, device: of activations and plain weights, and of everything.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        reading: Reading,
        schemes: Mapping[str, Scheme],
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        activations: Activations,
    ) -> None:
        """Take what a checkpoint holds.

        Args:
            tensors: name -> tensor.
            reading: reads them to the device.
            schemes: module -> scheme of its packed weight.
            shapes: module -> shape of its weight.
            dtype: see the attributes.
            activations: what packed weights are multiplied with.
        """
        self._tensors, self._schemes, self._shapes = tensors, schemes, shapes
        self._activations = activations
        self._reading, self.device, self.dtype = reading, reading.device, dtype

    def vector(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a plain tensor, in `self.dtype` where no other is given."""
        return self._read(name).to(dtype or self.dtype)

    def matrix(self, module: str, dtype: torch.dtype | None = None) -> Matrix:
        """Return the weight [OC, IC] of a module: a packed one in the stored stream, a plain one as `vector` does."""
        if module not in self._schemes:
            return self.vector(plain_name(module, self._shapes[module]), dtype)
        oc, ic = self._shapes[module]
        return PackedWeight(self._schemes[module], (oc, ic), *self._packed(module))

    def ready(self, weight: _Kind) -> _Kind:
        """Return a weight in the layout that its products are served from."""
        if isinstance(weight, torch.Tensor):
            return weight
        return weight.to_layout(ops.preferred_layout(weight.scheme, self.dtype, self.device, self._activations))

    def product(self, module: str, biased: bool, dtype: torch.dtype | None = None) -> Product:
        """Return the product with a module's weight and bias, plain tensors in `dtype` or else in that of all."""
        bias = self.vector(f"{module}.bias", dtype) if biased else None
        return Product(self.ready(self.matrix(module, dtype)), bias)

    def products(self, modules: Sequence[str], biased: bool) -> Product | Products:
        """Return the products of modules that read the same activations: stacked into one where schemes agree."""
        if len(modules) == 1:
            return self.product(modules[0], biased)
        if not self.agree(modules):
            return Products(tuple(self.product(module, biased) for module in modules))
        weight = joined([self.matrix(module) for module in modules])
        bias = torch.cat([self.vector(f"{module}.bias") for module in modules]) if biased else None
        return Product(self.ready(weight), bias)

    def gate_up(self, modules: Sequence[str], gate: Gate | None, biased: bool) -> GatedProduct | Activated:
        """Return gate and up, two modules or one that holds both, with what makes one of them.

        A packed weight is interleaved for the kernel that computes silu(gate) * up at once.
        """
        if gate is not Gate.SILU or not self.agree(modules) or not self.is_packed(modules[0]):
            return Activated(self.products(modules, biased), gate)
        weights, biases = [self.matrix(module) for module in modules], []
        if biased:
            biases = [half for module in modules for half in self.vector(f"{module}.bias").chunk(3 - len(modules))]
        packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
        if len(packed) == 1:
            packed = packed[0].split([packed[0].shape[0] // 2] * 2)
        return GatedProduct(self.ready(PackedWeight.gate_up(*packed)), interleave(*biases) if biased else None)

    def is_packed(self, module: str) -> bool:
        """Whether a module's weight is packed."""
        return module in self._schemes

    def agree(self, modules: Sequence[str]) -> bool:
        """Whether the weights of modules are all plain, or all packed in one scheme."""
        return len({self._schemes.get(module) for module in modules}) == 1

    def expert(self, module: str, index: int) -> Matrix:
        """Return the weight [OC, IC] of one expert, of a module that holds those of all."""
        one = (index, index + 1)
        if module not in self._schemes:
            return self._read(plain_name(module, self._shapes[module]), one)[0].t().to(self.dtype).contiguous()
        _, oc, ic = self._shapes[module]
        data, scale, zero_point = self._packed(module, one)
        return PackedWeight(
            self._schemes[module], (oc, ic), data[0], scale[0], None if zero_point is None else zero_point[0]
        )

    def _packed(self, module: str, rows: tuple[int, int] | None = None) -> Packed:
        """Return codes, scales and zero points of a packed weight, or of some of its first axis."""
        zeros = self._read(f"{module}.{ZERO_POINT}", rows) if self._schemes[module].has_zero_point else None
        return self._read(f"{module}.{PACKED}", rows), self._read(f"{module}.{SCALE}", rows), zeros

    def _read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        return self._reading.read(self._tensors[name], rows)


def joined(weights: Sequence[Matrix]) -> Matrix:
    """Return weights of one kind (`Stored.agree`) one after the other in one, a packed one in the stored stream."""
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    return (
        PackedWeight.stack(packed) if packed else torch.cat([one for one in weights if isinstance(one, torch.Tensor)])
    )
