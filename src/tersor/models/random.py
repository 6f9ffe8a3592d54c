"""How fast would a model be, of which there are no weights? A decoder of its sizes, random ones made where it runs.

They are made in the format that is asked for, a layer at a time, without a plain copy of the model. Layers of one kind
hold the same numbers, each a copy of its own in memory: the time of a step depends on which bytes are read, and not on
what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from tersor.checkpoint.names import Form
from tersor.compress import quantize_rtn
from tersor.formats import Activations, Plain, Pruned, Scheme, Sparse, dtype_name
from tersor.hardware import resolve_device
from tersor.layouts import PackedWeight, SparseWeight
from tersor.layouts.shard import Part
from tersor.models.assemble import assemble
from tersor.models.config import DecoderConfig
from tersor.models.decoder import Decoder, DecoderLayer
from tersor.models.expected import Expected, in_experts, plain_name
from tersor.models.geometries import geometry
from tersor.models.load import multiplied
from tersor.models.names import NAMES, Names
from tersor.models.reading import Reading
from tersor.models.share import Share
from tersor.models.stored import Packed, Stored
from tersor.models.streamed import Offload
from tersor.models.weights import Matrix
from tersor.ops.collective import ALONE, Ranks
from tersor.ops.dispatch import activations_for, kernel_chip
from tersor.planner.placement import Place, Placement

_STD = 0.02
_EMBEDDING_STD = 8.0
"""Rows differ in their last tokens alone: with small embeddings what all have read drowns them, and a step of many rows
goes to the experts of one."""


class Draws:
    """The numbers of random weights, in float32: whoever makes such a model, here or for another program, has them."""

    def __init__(self, device: torch.device, seed: int, embedding: str) -> None:
        """Begin with a seed.

        Args:
            device: of the numbers.
            seed: the same draws in the same order give the same numbers.
            embedding: module of the embedding of tokens.
        """
        self._generator = torch.Generator(device).manual_seed(seed)
        self._embedding = embedding

    def matrix(self, module: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return normal numbers for the weight of a module, larger ones for an embedding."""
        return self._normal(shape, _EMBEDDING_STD if module == self._embedding else _STD)

    def vector(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return ones for the weight of a norm, and normal numbers for what else `Expected.vectors` names."""
        if len(shape) == 1 and name.endswith(".weight"):
            return torch.ones(shape, device=self._generator.device)
        return self._normal(shape, _STD)

    def chances(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return numbers from 0 to 1, any of which is as probable as another."""
        return torch.rand(shape, generator=self._generator, device=self._generator.device)

    def _normal(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device=self._generator.device).mul_(std)


def random_decoder(
    model: str | DecoderConfig,
    scheme: Scheme | None,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.bfloat16,
    *,
    head: Scheme | None = None,
    sparsity: float | None = None,
    embedding: Scheme | None = None,
    activations: Activations | str = Activations.NATIVE,
    context: int | None = None,
    seed: int = 0,
    ranks: Ranks = ALONE,
    offload: Offload | None = None,
    place: Place | None = None,
) -> Decoder:
    """Make a decoder with random weights.

    Args:
        model: a name of `geometries.GEOMETRIES`, or a config.
        scheme: of all linear layers but routers and the head; `None` is plain. Experts have it without outliers.
        device, activations, context: as for `load`.
        dtype: of activations and plain weights.
        sparsity: part of the weights in `scheme`, but for experts', that is pruned at random; `None` stores them whole.
        head, embedding: schemes of the output head, where it is not the embedding, and of the embedding, likewise; the
            embedding has its own without outliers.
        seed: of the numbers.
        ranks, place: as for `load`; every rank has numbers of its own.
        offload: how layers leave the device that do not fit there; `None` has all stay.

    Raises:
        InputError: no such geometry.
        FormatError: a group size that does not divide input channels.
        ShapeError: it cannot be placed so.
    """
    config = geometry(model) if isinstance(model, str) else model
    names = NAMES[config.architecture]
    where = device if isinstance(device, torch.device) else resolve_device(device)
    own = place or Placement.even(len(config.layers), tensor=ranks.count).place(ranks.rank)
    mine = config.layers[slice(*own.stage.layers)]
    kinds = replace(config, layers=tuple(dict.fromkeys(mine)))
    expected = Expected.of(kinds, names)
    outside = {names.head: head, names.base + names.embedding: embedding}
    chosen: dict[str, Scheme | None] = {}
    for module, shape in expected.matrices.items():
        form = outside.get(module, None if module.endswith(f".{names.router}") else scheme)
        alone = in_experts(module, shape) or module == names.base + names.embedding  # keeps no outliers
        chosen[module] = form.dense if form is not None and alone else form
    schemes: dict[str, Form] = {module: form for module, form in chosen.items() if form is not None}
    if sparsity is not None:
        sparse = Sparse(Plain(dtype_name(dtype)) if scheme is None else scheme)
        kept = [one for one in chosen if one not in outside and not one.endswith(f".{names.router}")]
        for module in kept:
            if not in_experts(module, expected.matrices[module]):
                schemes[module] = Pruned(sparse, bytes(4 * expected.matrices[module][0]))
    stage = replace(own.stage, layers=(0, len(kinds.layers)))
    share = Share.of(kinds, names, schemes, replace(own, stage=stage))
    with Reading(where) as reading:  # reads nothing
        way = activations_for(activations, multiplied(kinds, names, schemes), kernel_chip(where))
        made = _Random(expected, names, schemes, reading, dtype, way, seed, share, ranks)
        made.sparsity = sparsity or 0.0
        few = assemble(made, kinds, names, min(context or config.context, config.context))
    layers, known = [], dict(zip(kinds.layers, few.layers, strict=True))
    placing = streamed = None
    if offload is not None:
        sizes = {kind: sum(one.nbytes for one in layer.tensors()) for kind, layer in known.items()}
        others = [one for part in (few.embedding, few.norm, few.head) if part is not None for one in part.tensors()]
        each = {one.data_ptr(): one.nbytes for one in others}
        placing = offload.begin([sizes[kind] for kind in config.layers], sum(each.values()), where)
    used: set[Any] = set()
    for index, kind in enumerate(mine):
        layer = _copied(known[kind]) if kind in used and placing is None else known[kind]
        if placing is not None:
            placed = placing.place(index, layer)
            layer = _copied(layer) if placed is layer else placed
        layers.append(layer)
        used.add(kind)
    del known, layer
    if placing is not None:
        layers, streamed = placing.finish(layers)
    whole = replace(few.config, layers=config.layers)
    return Decoder(whole, few.embedding, layers, few.norm, few.head, streamed)


class _Random(Stored):
    """Random weights instead of stored ones.

    Attributes:
        sparsity: the part of pruned weights that is not left.
    """

    sparsity = 0.0

    def __init__(
        self,
        expected: Expected,
        names: Names,
        schemes: Mapping[str, Form],
        reading: Reading,
        dtype: torch.dtype,
        activations: Activations,
        seed: int,
        share: Share,
        ranks: Ranks,
    ) -> None:
        super().__init__({}, reading, schemes, expected.matrices, dtype, activations, share, ranks)
        self._draws = Draws(self.device, seed, names.base + names.embedding)
        self._plain = {plain_name(module, shape): (module, shape) for module, shape in self._shapes.items()}
        self._vectors = {name: share.shape(name, shape) for name, shape in expected.vectors.items()}
        self._beside: dict[str, torch.Tensor] = {}

    def each(self, make: Callable[[int], Matrix], indices: Sequence[int]) -> list[Matrix]:
        return [make(index) for index in indices]  # in this order, since it is that of the random numbers

    def _packed(self, module: str, expert: int | None = None) -> Packed:
        drawn = self._draws.matrix(module, self._shapes[module][-2:])
        weight = PackedWeight.from_encoded(quantize_rtn(drawn, self._scheme(module)))
        if weight.outliers is not None:
            self._beside[module] = weight.outliers
        return weight.data, weight.scale, weight.zero_point

    def _outliers(self, module: str, scheme: Scheme) -> torch.Tensor | None:
        return self._beside.pop(module, None)  # of the numbers that `_packed` has just drawn

    def _sparse(self, module: str, form: Pruned) -> SparseWeight:
        drawn = self._draws.matrix(module, self._shapes[module])
        kept, scheme = self._draws.chances(self._shapes[module]) >= self.sparsity, form.sparse.scheme
        if scheme is None:
            return SparseWeight.from_plain(drawn.to(self.dtype), kept)
        return SparseWeight.from_encoded(quantize_rtn(drawn, scheme), kept)

    def _read(self, name: str, part: Part | None = None, expert: int | None = None) -> torch.Tensor:
        if name in self._vectors:
            return self._draws.vector(name, self._vectors[name])
        module, shape = self._plain[name]
        if expert is not None:
            return self._draws.matrix(module, (shape[2], shape[1]))
        return self._draws.matrix(module, shape).to(self.dtype)  # as releases store it, routers too


def _copied(layer: DecoderLayer) -> DecoderLayer:
    """Return a layer with tensors of its own but for the table of rotation."""
    copy: DecoderLayer = _copy(layer)
    return replace(copy, attention=replace(copy.attention, rotary=layer.attention.rotary))


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(_copy(one) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _copy(getattr(value, one.name)) for one in fields(value)})
    return value
