"""How does a stored tensor become one in memory? Read as it is asked for, straight to the device; nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch

from tersor import ops
from tersor.checkpoint.names import PACKED, SCALE, ZERO_POINT
from tersor.checkpoint.source import StoredTensor
from tersor.formats import Activations, Scheme
from tersor.layouts import PackedWeight
from tersor.layouts.gated import interleave
from tersor.layouts.shard import Part
from tersor.models.expected import plain_name
from tersor.models.reading import Reading
from tersor.models.share import Share
from tersor.models.weights import Activated, GatedProduct, Matrix, Product, Products
from tersor.ops import Gate
from tersor.ops.collective import ALONE, Ranks

Packed: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Codes, scales and zero points in the stored stream."""
_Kind = TypeVar("_Kind", torch.Tensor, PackedWeight, torch.Tensor | PackedWeight)


class Stored:
    """The weights of a checkpoint that was checked (`expected.check`), or a rank's parts of them.

    Attributes:
        dtype, device: of activations and plain weights, and of everything.
        share: what the rank has.
        ranks: all of them.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        reading: Reading,
        schemes: Mapping[str, Scheme],
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        activations: Activations,
        share: Share,
        ranks: Ranks = ALONE,
    ) -> None:
        """Take what a checkpoint holds.

        Args:
            tensors: name -> tensor.
            reading: reads them to the device.
            schemes: module -> scheme of its packed weight.
            shapes: module -> shape of its whole weight.
            dtype, share, ranks: see the attributes.
            activations: what packed weights are multiplied with.
        """
        self._tensors, self._schemes = tensors, schemes
        self._shapes = {module: share.shape(module, shape) for module, shape in shapes.items()}
        self._activations, self.share, self.ranks = activations, share, ranks
        self._reading, self.device, self.dtype = reading, reading.device, dtype

    def vector(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a plain tensor, in `self.dtype` where no other is given."""
        return self._read(name, self.share.parts.get(name)).to(dtype or self.dtype)

    def matrix(self, module: str, dtype: torch.dtype | None = None) -> Matrix:
        """Return the weight [OC, IC] of a module: a packed one in the stored stream, a plain one as `vector` does."""
        if module not in self._schemes:
            plain = plain_name(module, self._shapes[module])
            return self._read(plain, self.share.parts.get(module)).to(dtype or self.dtype)
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

    def router(self, module: str, biased: bool, wide: bool) -> Product:
        """Return the product of a router; where `wide`, plain tensors are float32 unless they are stored in `dtype`."""
        if not wide or self.is_packed(module):
            return self.product(module, biased, torch.float32 if wide else None)
        names = [plain_name(module, self._shapes[module]), *([f"{module}.bias"] if biased else [])]
        read = [self._read(name) for name in names]
        exact = self.dtype if all(one.dtype == self.dtype for one in read) else torch.float32
        weight, bias = [one.to(exact) for one in read] if biased else (read[0].to(exact), None)
        return Product(weight, bias)

    def partial(self, module: str, biased: bool) -> Product:
        """Return the product of a module whose input channels are cut; the bias is on the first rank alone."""
        return self.product(module, biased and self.ranks.first)

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

        A packed weight is interleaved for the kernel that computes both and what the gate makes of them.
        """
        if gate is None or not self.agree(modules) or not self.is_packed(modules[0]):
            return Activated(self.products(modules, biased), gate)
        weights, biases = [self.matrix(module) for module in modules], []
        if biased:
            biases = [half for module in modules for half in self.vector(f"{module}.bias").chunk(3 - len(modules))]
        packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
        if len(packed) == 1:
            packed = packed[0].split([packed[0].shape[0] // 2] * 2)
        bias = interleave(*biases) if biased else None
        return GatedProduct(self.ready(PackedWeight.gate_up(*packed)), bias, gate)

    def each(self, make: Callable[[int], Matrix], indices: Sequence[int]) -> list[Matrix]:
        """Return what `make` reads for each index; it is called from several threads at once."""
        return self._reading.each(make, indices)

    def is_packed(self, module: str) -> bool:
        """Whether a module's weight is packed."""
        return module in self._schemes

    def agree(self, modules: Sequence[str]) -> bool:
        """Whether the weights of modules are all plain, or all packed in one scheme."""
        return len({self._schemes.get(module) for module in modules}) == 1

    def expert(self, module: str, index: int) -> Matrix:
        """Return the weight [OC, IC] of one expert, of a module that holds those of all."""
        if module not in self._schemes:
            part = self.share.parts.get(module)
            stored = self._read(plain_name(module, self._shapes[module]), part and part.transposed(), index)
            return stored.t().to(self.dtype).contiguous()
        _, oc, ic = self._shapes[module]
        return PackedWeight(self._schemes[module], (oc, ic), *self._packed(module, index))

    def _packed(self, module: str, expert: int | None = None) -> Packed:
        """Return codes, scales and zero points of a packed weight, or of one expert in a module that holds all."""
        part, scheme = self.share.parts.get(module), self._schemes[module]
        words, groups = (None, None) if part is None else part.stored(scheme)
        zeros = self._read(f"{module}.{ZERO_POINT}", groups, expert) if scheme.has_zero_point else None
        return self._read(f"{module}.{PACKED}", words, expert), self._read(f"{module}.{SCALE}", groups, expert), zeros

    def _read(self, name: str, part: Part | None = None, expert: int | None = None) -> torch.Tensor:
        """Return a stored tensor, or the matrix of one expert in it, or a part of either; nothing else is read."""
        tensor = self._tensors[name]
        if part is not None:
            return self._reading.read_part(tensor, part, expert)
        if expert is not None:
            return self._reading.read(tensor, (expert, expert + 1))[0]
        return self._reading.read(tensor)


def joined(weights: Sequence[Matrix]) -> Matrix:
    """Return weights of one kind (`Stored.agree`) one after the other in one, a packed one in the stored stream."""
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    return (
        PackedWeight.stack(packed) if packed else torch.cat([one for one in weights if isinstance(one, torch.Tensor)])
    )
