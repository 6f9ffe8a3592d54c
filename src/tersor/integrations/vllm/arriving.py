"""How do tensors that come one by one become a rank's weights? Each is cut and goes to the device when it is whole.

vLLM reads a checkpoint file by file and hands every tensor to the layer it belongs to. A layer waits for all tensors of
one stored weight, keeps this rank's part of it in packed form, and puts its weights into the layout of their kernels
when the last has arrived: beyond the model there is never more in memory than one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tersor.checkpoint.names import (
    DENSE,
    LEVEL,
    MASK,
    OUTLIERS,
    PACKED,
    SCALE,
    VALUES,
    ZERO_POINT,
    level_stem,
    stored_tensors,
)
from tersor.checkpoint.pack import pack
from tersor.errors import CheckpointError, FormatError, NonFiniteError, ShapeError
from tersor.formats import Assignment, Mix, Scheme, Sparse
from tersor.integrations.vllm.checks import need_drawable, need_quantum
from tersor.integrations.vllm.plan import Stored
from tersor.integrations.vllm.stacks import WEIGHT
from tersor.layouts import MixedWeight, PackedWeight, SparseWeight
from tersor.layouts.shard import Part
from tersor.models.stored import joined
from tersor.models.weights import Matrix

_DRAWN = 64
"""Rows of a random weight that are drawn; the others repeat them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank's part of a stored weight is.

    Attributes:
        outputs, channels: of the whole weight.
        part: of it; rows are output channels.
        dtype, device: of plain weights, and of everything.
    """

    outputs: int
    channels: int
    part: Part
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        """(OC, IC) of the part."""
        assert self.part.rows is not None
        first, last = self.part.columns or (0, self.channels)
        return sum(end - start for start, end in self.part.rows), last - first


class Piece:
    """A stored weight whose tensors arrive; it is whole when all have."""

    def __init__(self, stored: Stored, place: Place) -> None:
        """Wait for a weight.

        Raises:
            UnsupportedError: this rank's input channels do not start and end at a quantum of the weight.
        """
        self.stored, self.place = stored, place
        self._arrived: dict[str, torch.Tensor] = {}
        self._weight: Matrix | None = None
        if place.part.columns is not None:
            need_quantum(stored, place.part.columns)

    @property
    def weight(self) -> Matrix | None:
        """This rank's part, on the device, packed weights in the stored stream; `None` before all has arrived."""
        return self._weight

    @property
    def missing(self) -> list[str]:
        """Whole names of the tensors that have not arrived."""
        if self._weight is not None:
            return []
        return [f"{self.stored.stem}.{name}" for name in sorted(self.stored.names - self._arrived.keys())]

    @property
    def plain(self) -> torch.Tensor | None:
        """The weight [OC, IC] that has arrived and is to be packed, or `None`."""
        return self._arrived.get(WEIGHT) if isinstance(self.stored.represented, Scheme) else None

    def take(self, name: str, tensor: torch.Tensor) -> bool:
        """Take one of the weight's tensors; tell whether it is whole now.

        Raises:
            CheckpointError: a tensor that the weight has not, or of another shape or dtype than it should have.
            NonFiniteError: a weight to pack that holds a NaN or an infinity.
        """
        whole = self.keep(name, tensor)
        if whole:
            self.make()
        return whole

    def keep(self, name: str, tensor: torch.Tensor) -> bool:
        """Keep one of the weight's tensors as it is; tell whether all are there, so that `make` may be called.

        Raises:
            CheckpointError: a tensor that the weight has not.
        """
        if name not in self.stored.names:
            raise CheckpointError(f"tensor {self.stored.stem}.{name} is not one of {self.stored.stem} in its headers")
        self._arrived[name] = tensor
        return len(self._arrived) == len(self.stored.names)

    def make(self, packed: PackedWeight | None = None) -> None:
        """Make the weight of the tensors that are kept, or of what their weight was packed to, and drop them.

        Raises:
            CheckpointError, NonFiniteError: as of `take`.
        """
        self._weight = self._made(self._whole() if packed is None else packed)
        self._arrived.clear()

    def draw(self) -> None:
        """Make a random weight in place of one that arrives: for times alone."""
        represented, (rows, channels) = self.stored.represented, self.place.shape
        few = torch.randn(min(rows, _DRAWN), channels, generator=torch.Generator().manual_seed(0)) * channels**-0.5
        need_drawable(self.stored)
        drawn: Matrix = few.to(self.place.device, self.place.dtype)
        if isinstance(represented, Scheme):
            drawn = _on(packed_of(represented, channels, pack(few, represented).tensors), self.place.device)
        times, rest = divmod(rows, len(few))
        parts = [drawn] * times
        if rest:
            parts.append(drawn.rows(0, rest) if isinstance(drawn, PackedWeight) else few[:rest].to(drawn))
        self._weight = joined(parts)

    def _made(self, whole: Matrix) -> Matrix:
        rows, columns = self.place.part.rows, self.place.part.columns
        assert rows is not None
        if whole.shape[0] != self.place.outputs:
            raise CheckpointError(
                f"{self.stored.stem} has {whole.shape[0]} rows, and vLLM's layer {self.place.outputs}"
            )
        everything = rows == ((0, whole.shape[0]),) and columns is None
        if isinstance(whole, torch.Tensor):
            kept = torch.cat([whole[first:last] for first, last in rows])
            kept = kept if columns is None else kept[:, slice(*columns)]
            return kept.to(self.place.device, self.place.dtype).contiguous()
        assert isinstance(whole, PackedWeight | MixedWeight | SparseWeight)
        return _on(whole if everything else whole.cut(self.place.part), self.place.device)

    def _whole(self) -> Matrix:
        """Return the whole weight, where its tensors are; what is packed while loading on the device."""
        stored, arrived, channels = self.stored, self._arrived, self.place.channels
        represented = stored.represented
        try:
            if WEIGHT in arrived:
                plain = arrived[WEIGHT]
                if plain.dim() != 2 or plain.shape[1] != channels:
                    raise ShapeError(f"the weight is {list(plain.shape)}, and vLLM's layer has {channels} channels")
                if represented is None:
                    return plain
                assert isinstance(represented, Scheme), "what is packed while loading has one scheme"
                return packed_of(represented, channels, pack(plain.to(self.place.device), represented).tensors)
            if isinstance(represented, Mix):
                return _mixed(represented, channels, arrived)
            if isinstance(represented, Sparse):
                mask, values = arrived[MASK], arrived[VALUES]
                scales = arrived.get(SCALE), arrived.get(ZERO_POINT)
                return SparseWeight.from_stored(represented, (len(mask), channels), mask, values, *scales)
            assert represented is not None
            return packed_of(represented, channels, arrived)
        except NonFiniteError as error:
            raise NonFiniteError(error.index, error.value, f"tensor '{stored.stem}.{WEIGHT}'") from None
        except (FormatError, ShapeError) as error:
            raise CheckpointError(f"{stored.stem}: {error}") from None


def make_together(pieces: Sequence[Piece]) -> None:
    """Make weights of which all tensors are kept; plain ones that are packed alike are packed as the rows of one.

    A small matrix is packed in the time that its launches take: the experts of a layer, one by one, in that of hundreds
    of times as many.

    Raises:
        CheckpointError, NonFiniteError: as of `Piece.take`.
    """
    alike: dict[object, list[Piece]] = {}
    for piece in pieces:
        plain = piece.plain
        like = None if plain is None else (piece.stored.represented, piece.place.device, plain.dtype, plain.shape)
        alike.setdefault(like, []).append(piece)
    for piece in alike.pop(None, []):
        piece.make()
    for some in alike.values():
        scheme, height, channels = some[0].stored.represented, some[0].place.outputs, some[0].place.channels
        rows = [piece.plain.to(piece.place.device) for piece in some if piece.plain is not None]
        assert isinstance(scheme, Scheme)
        try:
            if any(one.shape != (height, channels) for one in rows):
                raise ShapeError("not the weights of such a layer")
            packed = packed_of(scheme, channels, pack(torch.cat(rows), scheme).tensors)
        except (FormatError, NonFiniteError, ShapeError):
            for piece in some:  # one by one, for the line that names the one it is
                piece.make()
            continue
        for index, piece in enumerate(some):
            piece.make(packed.rows(index * height, (index + 1) * height))


class Gathering:
    """The weights of one layer on their way, in order; whoever waits gets them when the last is whole."""

    def __init__(self, pieces: Sequence[Piece], finish: Callable[[list[Matrix]], None], random: bool = False) -> None:
        """Wait for weights.

        Args:
            pieces: one a stored weight.
            finish: gets the weights of neighbours that are alike as one, once.
            random: whether weights are made up when none has arrived.
        """
        self._pieces, self._finish, self._random = pieces, finish, random
        self._done = False

    def take(self, index: int, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor of the weight at `index`."""
        if self._pieces[index].take(name, tensor) and all(piece.weight is not None for piece in self._pieces):
            self._hand_over()

    def close(self) -> None:
        """Say that nothing more arrives.

        Raises:
            CheckpointError: some has not arrived; the line names a tensor.
        """
        if self._done:
            return
        if self._random:
            for piece in self._pieces:
                piece.draw()
        raise_missing([name for piece in self._pieces for name in piece.missing])
        self._hand_over()

    def _hand_over(self) -> None:
        weights = [piece.weight for piece in self._pieces if piece.weight is not None]
        self._pieces, self._done = [], True
        self._finish(together(weights))


def raise_missing(names: Sequence[str]) -> None:
    """Refuse a checkpoint of which tensors of these names did not arrive.

    Raises:
        CheckpointError: there are any.
    """
    if names:
        more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        raise CheckpointError(f"vLLM read no tensor {names[0]!r}{more}: the checkpoint lacks it, or vLLM skips it")


def together(weights: Sequence[Matrix]) -> list[Matrix]:
    """Return weights with neighbours of one kind stacked into one."""
    runs: list[list[Matrix]] = []
    for weight in weights:
        if runs and _kind(runs[-1][0]) == _kind(weight):
            runs[-1].append(weight)
        else:
            runs.append([weight])
    return [run[0] if len(run) == 1 else joined(run) for run in runs]


def _kind(weight: Matrix) -> object:
    if isinstance(weight, PackedWeight):
        return weight.scheme
    if isinstance(weight, MixedWeight):
        return weight.mix
    return weight.sparse if isinstance(weight, SparseWeight) else type(weight)


def packed_of(scheme: Scheme, channels: int, tensors: Mapping[str, torch.Tensor], stem: str = "") -> PackedWeight:
    """Return a dense weight of its tensors, without a copy.

    Args:
        scheme: what they mean.
        channels: input channels.
        tensors: by the names of `checkpoint.names`, or those below `stem`.
        stem: of a level.

    Raises:
        ShapeError: a tensor of another shape or dtype.
    """
    names = {name: f"{stem}.{name}" if stem else name for name in DENSE.names_of(scheme)}
    rows = len(tensors[names[PACKED]])
    for name, form in stored_tensors(scheme, rows, channels).items():
        found = tensors[names[name]]
        if tuple(found.shape) != form.shape or found.dtype != form.dtype:
            raise ShapeError(
                f"{names[name]} is {found.dtype} {list(found.shape)}; {scheme.key()} of a weight {[rows, channels]} "
                f"stores {form.dtype} {list(form.shape)}"
            )
    zero_point = tensors[names[ZERO_POINT]] if scheme.has_zero_point else None
    of = (scheme, (rows, channels), tensors[names[PACKED]], tensors[names[SCALE]], zero_point)
    return PackedWeight(*of, outliers=None if scheme.outliers is None else tensors[names[OUTLIERS]])


def _mixed(mix: Mix, channels: int, tensors: Mapping[str, torch.Tensor]) -> MixedWeight:
    form = Assignment(mix, tensors[LEVEL].cpu().numpy().tobytes())
    sets = [
        packed_of(scheme, channels, tensors, level_stem(level))
        for level, scheme in enumerate(mix.levels)
        if f"{level_stem(level)}.{PACKED}" in tensors
    ]
    return MixedWeight.of(form, sets)


def _on(weight: PackedWeight | MixedWeight | SparseWeight, device: torch.device) -> Matrix:
    if isinstance(weight, MixedWeight | SparseWeight):
        return weight.to(device)
    zero_point, outliers = (None if one is None else one.to(device) for one in (weight.zero_point, weight.outliers))
    of = (weight.scheme, weight.shape, weight.data.to(device), weight.scale.to(device), zero_point)
    return PackedWeight(*of, outliers=outliers)
