"""How does a stored tensor become one in memory? Read as it is asked for, straight to the device; nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch

from tersor import ops
from tersor.checkpoint.names import MASK, OUTLIERS, PACKED, SCALE, VALUES, ZERO_POINT, Form, level_stem
from tersor.checkpoint.source import StoredTensor
from tersor.errors import CheckpointError, ShapeError
from tersor.formats import Activations, Assignment, Mix, Pruned, Scheme, Sparse, cut_outliers
from tersor.layouts import MixedWeight, PackedWeight, SparseWeight, TiledSparseWeight
from tersor.layouts.gated import interleave
from tersor.layouts.shard import Part, Span
from tersor.models.expected import plain_name
from tersor.models.reading import Reading
from tersor.models.share import Share
from tersor.models.weights import Activated, GatedProduct, Matrix, Product, Products
from tersor.ops import Gate
from tersor.ops.collective import ALONE, Ranks

Packed: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Codes, scales and zero points in the stored stream."""
_Kind = TypeVar("_Kind", torch.Tensor, PackedWeight, MixedWeight, Matrix)


class Stored:
    """The weights of a checkpoint that was checked (`expected.check`), or a rank's parts of them.

    Attributes:
        dtype, device: of activations and plain weights, and of everything.
        share: what the rank has.
        ranks: all of its stage.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        reading: Reading,
        forms: Mapping[str, Form],
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
            forms: module -> scheme of its packed weight, the levels of its output features, or what is left of rows.
            shapes: module -> shape of its whole weight.
            dtype, share, ranks: see the attributes.
            activations: what packed weights are multiplied with.
        """
        self._tensors, self._forms = tensors, forms
        self._whole = shapes
        self._shapes = {module: share.shape(module, shape) for module, shape in shapes.items()}
        self._activations, self.share, self.ranks = activations, share, ranks
        self._reading, self.device, self.dtype = reading, reading.device, dtype

    def vector(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a plain tensor, in `self.dtype` where no other is given."""
        return self._read(name, self.share.parts.get(name)).to(dtype or self.dtype)

    def matrix(self, module: str, dtype: torch.dtype | None = None) -> Matrix:
        """Return the weight [OC, IC] of a module: a packed one in the stored stream, a plain one as `vector` does."""
        form = self._forms.get(module)
        if form is None:
            plain = plain_name(module, self._shapes[module])
            return self._read(plain, self.share.parts.get(module)).to(dtype or self.dtype)
        if isinstance(form, Assignment):
            return self._mixed(module, form)
        if isinstance(form, Pruned):
            return self._sparse(module, form)
        oc, ic = self._shapes[module]
        dense = PackedWeight(form.dense, (oc, ic), *self._packed(module))
        return dense.beside(self._outliers(module, form), form)

    def ready(self, weight: _Kind) -> _Kind:
        """Return a weight in the layout that its products are served from.

        Raises:
            UnsupportedError: 8-bit activations for a pruned weight whose values no kernel multiplies with them.
        """
        if isinstance(weight, torch.Tensor):
            return weight
        if isinstance(weight, SparseWeight):
            return self.pruned_ready(weight)
        if isinstance(weight, TiledSparseWeight):
            return weight
        if isinstance(weight, MixedWeight):
            return weight.to_layout(self._layout)
        return weight.to_layout(self._layout(weight.scheme))

    def pruned_ready(self, weight: SparseWeight) -> SparseWeight | TiledSparseWeight:
        """Return a pruned weight in kernel tiles, where a kernel reads them.

        Raises:
            UnsupportedError: 8-bit activations that no kernel multiplies such values with.
        """
        return ops.preferred_sparse(weight, self.dtype, self._activations)

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
        """Return the product of a module whose input channels may be cut; the bias is then on the first rank alone."""
        cut = self.share.parts.get(module, Part()).columns is not None
        return self.product(module, biased and (self.ranks.first or not cut))

    def summing(self, kind: str) -> Ranks:
        """Return the ranks that add up what they make of one of `placement.WHOLE`: this one alone where it has all."""
        return ALONE if self.share.whole(kind) else self.ranks

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

        A packed weight is interleaved for the kernel that computes both and what the gate makes of them, where it keeps
        no outliers; a mixed one where both rows of every channel have one level.
        """
        form = self._forms.get(modules[0])
        beside = isinstance(form, Scheme) and form.outliers is not None  # what they add comes ahead of the gate
        if gate is None or not self.agree(modules) or not self.is_packed(modules[0]) or beside:
            return Activated(self.products(modules, biased), gate)
        halves, biases = _halves([self.matrix(module) for module in modules]), []
        mixed = [half for half in halves if isinstance(half, MixedWeight)]
        if mixed and mixed[0].assignment != mixed[1].assignment:
            return Activated(self.products(modules, biased), gate)
        if biased:
            biases = [half for module in modules for half in self.vector(f"{module}.bias").chunk(3 - len(modules))]
        bias = interleave(*biases) if biased else None
        if mixed:
            return GatedProduct(self.ready(MixedWeight.gate_up(*mixed)), bias, gate)
        pruned = [half for half in halves if isinstance(half, SparseWeight)]
        if pruned:
            return GatedProduct(self.pruned_ready(SparseWeight.gate_up(*pruned)), bias, gate)
        packed = [half for half in halves if isinstance(half, PackedWeight)]
        return GatedProduct(self.ready(PackedWeight.gate_up(*packed)), bias, gate)

    def each(self, make: Callable[[int], Matrix], indices: Sequence[int]) -> list[Matrix]:
        """Return what `make` reads for each index; it is called from several threads at once."""
        return self._reading.each(make, indices)

    def is_packed(self, module: str) -> bool:
        """Whether a module's weight is packed."""
        return module in self._forms

    def agree(self, modules: Sequence[str], levels: bool = False) -> bool:
        """Whether weights of modules are all plain, all packed or pruned in one scheme, or mixes of the same levels.

        With `levels`, output features of mixes have to be at the same levels, too.
        """
        kinds: set[Scheme | Mix | Assignment | Sparse | None] = set()
        for form in map(self._forms.get, modules):
            own = form.mix if isinstance(form, Assignment) and not levels else form
            kinds.add(own.sparse if isinstance(own, Pruned) else own)
        return len(kinds) == 1

    def expert(self, module: str, index: int) -> Matrix:
        """Return the weight [OC, IC] of one expert, of a module that holds those of all."""
        form = self._forms.get(module)
        if form is None:
            part = self.share.parts.get(module)
            stored = self._read(plain_name(module, self._shapes[module]), part and part.transposed(), index)
            return stored.t().to(self.dtype).contiguous()
        if isinstance(form, Assignment):
            return self._mixed(module, form, index)
        assert isinstance(form, Scheme), "held by `expected.check`"
        _, oc, ic = self._shapes[module]
        return PackedWeight(form, (oc, ic), *self._packed(module, index))

    def _layout(self, scheme: Scheme) -> str:
        """Return the layout that products with weights of a scheme are served from."""
        return ops.preferred_layout(scheme, self.dtype, self.device, self._activations)

    def _mixed(self, module: str, form: Assignment, expert: int | None = None) -> MixedWeight:
        """Return a mixed weight, or the rank's part of one, of whose row sets no other rows are read.

        Of a module that holds those of all experts it is the weight of one.
        """
        part, ic = self.share.parts.get(module, Part()), self._shapes[module][-1]
        spans: tuple[Span, ...] = part.rows or ((0, len(form.level)),)
        sets = []
        for level, scheme in enumerate(form.mix.levels):
            rows = form.spans(level, spans)
            count = sum(last - first for first, last in rows)
            if count:
                own = Part(rows if part.rows else None, part.columns)
                packed = self._row_set(f"{module}.{level_stem(level)}", scheme, count, own, expert)
                sets.append(PackedWeight(scheme, (count, ic), *packed))
        return MixedWeight.of(form.of(spans), sets)

    def _sparse(self, module: str, form: Pruned) -> SparseWeight:
        """Return a pruned weight, or the rank's part of one, of which no other rows are read.

        Raises:
            CheckpointError: the mask does not fit the values.
        """
        part, starts = self.share.parts.get(module, Part()), form.starts().tolist()
        spans: tuple[Span, ...] = part.rows or ((0, form.rows),)
        rows, words = Part(spans), Part(tuple((starts[first], starts[last]) for first, last in spans))
        mask, values = self._read(f"{module}.{MASK}", rows), self._read(f"{module}.{VALUES}", words)
        scheme, ic = form.sparse.scheme, self._whole[module][1]
        scale = zeros = None
        if scheme is not None:
            scale = self._read(f"{module}.{SCALE}", rows)
            zeros = self._read(f"{module}.{ZERO_POINT}", rows) if scheme.has_zero_point else None
        try:
            found = SparseWeight.from_stored(form.sparse, (len(mask), ic), mask, values, scale, zeros)
        except ShapeError as error:
            raise CheckpointError(f"{module}: {error}") from None
        return found if part.columns is None else found.cut(Part(columns=part.columns))

    def _packed(self, module: str, expert: int | None = None) -> Packed:
        """Return codes, scales and zero points of a packed weight, or of one expert in a module that holds all."""
        part, scheme = self.share.parts.get(module), self._scheme(module)
        return self._words(module, scheme, part, expert)

    def _outliers(self, module: str, scheme: Scheme) -> torch.Tensor | None:
        """Return the outliers of a packed weight, or those of the rank's part of one; `None` where it keeps none."""
        if scheme.outliers is None:
            return None
        part = self.share.parts.get(module, Part())
        words = self._read(f"{module}.{OUTLIERS}", Part(part.rows) if part.rows else None)
        return words if part.columns is None else cut_outliers(words, part.columns)

    def _row_set(self, stem: str, scheme: Scheme, rows: int, part: Part, expert: int | None = None) -> Packed:
        """Return codes, scales and zero points of so many rows of a level, which are that part of what is stored."""
        return self._words(stem, scheme, None if part == Part() else part, expert)

    def _words(self, stem: str, scheme: Scheme, part: Part | None, expert: int | None = None) -> Packed:
        words, groups = (None, None) if part is None else part.stored(scheme)
        zeros = self._read(f"{stem}.{ZERO_POINT}", groups, expert) if scheme.has_zero_point else None
        return self._read(f"{stem}.{PACKED}", words, expert), self._read(f"{stem}.{SCALE}", groups, expert), zeros

    def _scheme(self, module: str) -> Scheme:
        """Return the scheme of a dense packed weight."""
        form = self._forms[module]
        assert isinstance(form, Scheme)
        return form

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
    mixed = [weight for weight in weights if isinstance(weight, MixedWeight)]
    if mixed:
        return MixedWeight.stack(mixed)
    pruned = [weight for weight in weights if isinstance(weight, SparseWeight)]
    if pruned:
        return SparseWeight.stack(pruned)
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    return (
        PackedWeight.stack(packed) if packed else torch.cat([one for one in weights if isinstance(one, torch.Tensor)])
    )


def _halves(weights: Sequence[Matrix]) -> Sequence[Matrix]:
    """Return gate and up, packed, mixed or pruned, of two weights or of one that holds both, the gate first."""
    if len(weights) == 2:
        return weights
    (both,) = weights
    half = both.shape[0] // 2
    if isinstance(both, MixedWeight):
        return [both.cut(Part(rows=(span,))) for span in ((0, half), (half, 2 * half))]
    assert isinstance(both, PackedWeight | SparseWeight)
    return both.split([half] * 2)
