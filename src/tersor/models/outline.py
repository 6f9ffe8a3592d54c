"""What parts would a checkpoint's decoder have on a GPU? The same parts in the same layouts, without memory.

Shapes and layouts of weights can be asked for, and no number: packed ones have rows of no words, plain ones are on
torch's meta device. Of layers that are equal in all of this the first and the last are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from tersor.checkpoint.names import Form
from tersor.formats import SCALE_DTYPES, Activations, Pruned, Scheme
from tersor.layouts import STREAM, MixedWeight, PackedWeight, SparseWeight, TiledSparseWeight
from tersor.layouts.packing import BYTEWISE
from tersor.layouts.shard import Part
from tersor.models.assemble import assemble
from tersor.models.config import DecoderConfig
from tersor.models.decoder import Decoder
from tersor.models.expected import Expected, plain_name
from tersor.models.names import Names
from tersor.models.reading import Reading
from tersor.models.share import Share
from tersor.models.stored import Packed, Stored
from tersor.models.weights import Matrix
from tersor.ops import check_sparse_activations
from tersor.ops.attention_form import PAGE
from tersor.ops.collective import Ranks
from tersor.ops.dispatch import kernel_layout
from tersor.planner.placement import ALONE, Place


def outline(
    config: DecoderConfig,
    names: Names,
    schemes: Mapping[str, Form],
    dtype: torch.dtype,
    activations: Activations = Activations.NATIVE,
    place: Place | None = None,
) -> Decoder:
    """Return a decoder of every kind of layer that a checkpoint, or a stage of it, has, in their order.

    Args:
        config, names: of the checkpoint.
        schemes: module -> scheme of its packed weight, or the levels of its output features.
        dtype: of activations and plain weights.
        activations: what packed weights are multiplied with.
        place: of the rank that has these parts; `None` is alone.

    Raises:
        ShapeError: it cannot be placed so.
        UnsupportedError: weights that are not multiplied with such activations; experts of a layer in several schemes.
    """
    starts = [names.base + names.layer.format(layer=index) for index in range(len(config.layers))]
    # How much is left of a pruned weight decides no kernel.
    shapes = {
        name: Pruned(form.sparse, bytes(4 * form.rows)) for name, form in schemes.items() if isinstance(form, Pruned)
    }
    inside, few_schemes = _by_layer(starts, {**schemes, **shapes})
    kinds: dict[object, list[int]] = {}
    own = place or ALONE
    for index in range(len(config.layers)) if place is None else range(*place.stage.layers):
        kinds.setdefault((config.layers[index], frozenset(inside[index].items())), []).append(index)
    kept = sorted({index for same in kinds.values() for index in (same[0], same[-1])})
    for start, index in zip(starts, kept, strict=False):  # layers move up to where others are left out
        few_schemes |= {start + name: scheme for name, scheme in inside[index].items()}
    few = replace(config, layers=tuple(config.layers[index] for index in kept))
    stage = replace(own.stage, layers=(0, len(kept)))
    share = Share.of(few, names, few_schemes, replace(own, stage=stage))
    with Reading(torch.device("cpu")) as reading:  # reads nothing
        ranks = Ranks(own.rank, own.stage.ranks)
        parts = _Outlined(Expected.of(few, names), few_schemes, reading, dtype, activations, share, ranks)
        return assemble(parts, few, names, PAGE)


def _by_layer(starts: Sequence[str], schemes: Mapping[str, Form]) -> tuple[list[dict[str, Form]], dict[str, Form]]:
    """Return the schemes of every layer, by names without its start, and those of modules that are in none."""
    places = {start: index for index, start in enumerate(starts)}
    parts = starts[0].count(".")
    inside: list[dict[str, Form]] = [{} for _ in starts]
    outside: dict[str, Form] = {}
    for module, scheme in schemes.items():
        start = "".join(f"{part}." for part in module.split(".")[:parts])
        if start in places:
            inside[places[start]][module.removeprefix(start)] = scheme
        else:
            outside[module] = scheme
    return inside, outside


class _Outlined(Stored):
    """Weights of which there are shapes and layouts alone."""

    def __init__(
        self,
        expected: Expected,
        schemes: Mapping[str, Form],
        reading: Reading,
        dtype: torch.dtype,
        activations: Activations,
        share: Share,
        ranks: Ranks,
    ) -> None:
        super().__init__({}, reading, schemes, expected.matrices, dtype, activations, share, ranks)
        self._plain = {plain_name(module, shape): shape for module, shape in self._shapes.items()}
        self._vectors = {name: share.shape(name, shape) for name, shape in expected.vectors.items()}

    def ready(self, weight: Matrix) -> Matrix:  # type: ignore[override]
        """Return a weight in the layout that it has on a GPU."""
        if isinstance(weight, torch.Tensor | TiledSparseWeight):
            return weight
        if isinstance(weight, SparseWeight):
            return self.pruned_ready(weight)
        if isinstance(weight, MixedWeight):
            sets = tuple(one for one in map(self.ready, weight.sets) if isinstance(one, PackedWeight))
            return replace(weight, sets=sets)
        layout = kernel_layout(weight.scheme, self.dtype, self._activations)
        if layout == STREAM:
            return weight
        words, scale = weight.data.new_empty(0), weight.scale.new_empty(0)
        return PackedWeight(weight.scheme, weight.shape, words, scale, None, layout, weight.outliers)

    def pruned_ready(self, weight: SparseWeight) -> SparseWeight | TiledSparseWeight:
        """Return the weight as it is, for the chip says how it lies, or what says that it meets activations in e4m3."""
        if check_sparse_activations(weight.sparse, self._activations) is Activations.NATIVE:
            return weight
        return TiledSparseWeight.described(weight.form, weight.shape, BYTEWISE[self._activations])

    def each(self, make: Callable[[int], Matrix], indices: Sequence[int]) -> list[Matrix]:
        return [make(index) for index in indices]

    def _packed(self, module: str, expert: int | None = None) -> Packed:
        return self._row_set(module, self._scheme(module), self._shapes[module][-2], Part())

    def _outliers(self, module: str, scheme: Scheme) -> torch.Tensor | None:
        return None if scheme.outliers is None else torch.empty(self._shapes[module][0], 0, dtype=torch.int32)

    def _sparse(self, module: str, form: Pruned) -> SparseWeight:
        oc, ic = self._shapes[module]
        mask, values = torch.empty(oc, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.int32)
        return SparseWeight.of(Pruned(form.sparse, bytes(4 * oc)), (oc, ic), mask, values)

    def _row_set(self, stem: str, scheme: Scheme, rows: int, part: Part, expert: int | None = None) -> Packed:
        scale = torch.empty(rows, 0, dtype=SCALE_DTYPES[scheme.scale_dtype])
        zero_point = torch.empty(rows, 0, dtype=torch.uint8) if scheme.has_zero_point else None
        return torch.empty(rows, 0, dtype=torch.int32), scale, zero_point

    def _read(self, name: str, part: Part | None = None, expert: int | None = None) -> torch.Tensor:
        if name in self._vectors:
            return torch.empty(self._vectors[name], dtype=self.dtype)
        shape = self._plain[name]
        return torch.empty(shape if expert is None else (shape[2], shape[1]), dtype=self.dtype, device="meta")
