"""Which layers of a decoder find their weights on the device, and which have them brought there, step after step?

Of a layer that streams everything small stays: norms, biases, sinks, and what the layer ahead reads of it. Its weights
(codes, scales, masks, plain numbers, those of all experts) are views of a slot, to which an image of them is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from tersor.models.decoder import DecoderLayer
from tersor.models.mixture import Mixture
from tersor.models.weights import GatedProduct, Product
from tersor.offload.choice import streaming
from tersor.offload.disk import DiskStore
from tersor.offload.host import HostStore
from tersor.offload.image import Image
from tersor.offload.streamer import SLOTS, Streamer

Store: TypeAlias = HostStore | DiskStore
_HOLDERS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (Product, ("weight",)),
    (GatedProduct, ("weight",)),
    (Mixture, ("gate_up", "down")),
)
"""Fields that hold weights."""


@dataclass(frozen=True, slots=True)
class Offload:
    """How weights leave the device.

    Attributes:
        choose: returns how many layers stay, of the bytes of every layer and of the weights that are in none.
        directory: of the file of images; `None` keeps them in memory of the host.
        told: is given what became of it in a line, or `None`.
    """

    choose: Callable[[Sequence[int], int], int]
    directory: Path | None = None
    told: Callable[[str], None] | None = None

    def begin(self, layers: Sequence[int], outside: int, device: torch.device) -> Placing:
        """Choose the layers that stream and make room for their images.

        Args:
            layers: bytes of the weights of each, as near as they are known.
            outside: bytes of the weights that are in none.
            device: that computes.

        Raises:
            InputError: more layers are to stay than there are.
            OutputError: no file can be made in the directory, or its disk has not the room.
            TersorError: memory of the host or the device is short.
        """
        streamed = streaming(len(layers), self.choose(layers, outside))
        nbytes = sum(layers[index] for index in streamed)
        store: Store | None = None
        if streamed and self.directory is None:
            HostStore.check_room(nbytes)
            store = HostStore(device)
        elif streamed and self.directory is not None:
            DiskStore.check_room(self.directory, nbytes)
            store = DiskStore(self.directory, device)
        return Placing(len(layers), streamed, store, device, self.told)


class Streamed:
    """The weights of layers that stream.

    Attributes:
        graphs: whether a step with them can be a CUDA graph.
        nbytes: that a step copies.
        slot_bytes: of all slots.
        where: images are.
    """

    def __init__(
        self, store: Store, images: Sequence[Image], layers: Sequence[int], slots: Sequence[torch.Tensor]
    ) -> None:
        """Fill slots from now on.

        Args:
            store: of the images.
            images: of the layers that stream, in order.
            layers: their numbers.
            slots: uint8 on the device, as large as the largest image each.
        """
        self.graphs, self.where = store.graphs, store.where
        self.slot_bytes = sum(slot.nbytes for slot in slots)
        self.layers, self._store, self._slots = tuple(layers), store, slots
        store.serve(slots)
        self._streamer: Streamer[Any] = Streamer(len(images), len(slots), store)
        self.nbytes = sum(images[image].nbytes for image in self._streamer.copied)
        self._images = {layer: image for image, layer in enumerate(layers)}
        self._alike = all(one.places == images[0].places for one in images)

    def begin(self) -> None:
        """Begin a step."""
        self._streamer.begin()

    @contextlib.contextmanager
    def there(self, layer: int) -> Iterator[None]:
        """Launch in the context what reads the weights of a layer."""
        image = self._images.get(layer)
        if image is not None:
            self._streamer.arrive(image)
        yield
        if image is not None:
            self._streamer.leave(image)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in a slot."""
        return any(0 <= tensor.data_ptr() - slot.data_ptr() < slot.nbytes for slot in self._slots)

    def bandwidth(self) -> float:
        """Return the bytes per second that bytes come at from where images are, with nothing beside: it is timed."""
        return self._store.bandwidth()

    def rehearsed(self) -> contextlib.AbstractContextManager[None]:
        """Launch in the context steps whose results nobody reads.

        Where all images are alike, a layer may as well read another one's weights, and nothing is copied.
        """
        return self._streamer.resting() if self._alike else contextlib.nullcontext()

    def captured(self) -> contextlib.AbstractContextManager[None]:
        """Capture a step in the context."""
        return self._streamer.captured()

    def replayed(self) -> contextlib.AbstractContextManager[None]:
        """Replay a captured step in the context."""
        return self._streamer.replayed()


class Placing:
    """Layers find their place one after the other, as they are made; then all slots are."""

    def __init__(
        self,
        layers: int,
        streamed: Sequence[int],
        store: Store | None,
        device: torch.device,
        told: Callable[[str], None] | None,
    ) -> None:
        self._layers, self._streamed, self._store = layers, streamed, store
        self._device, self._told = device, told
        self._images: dict[int, Image] = {}

    def place(self, index: int, layer: DecoderLayer) -> DecoderLayer:
        """Return a layer as it is, or without its weights: those are copied, and their memory is free when it goes.

        Raises:
            OutputError, TersorError: there is no room for them.
        """
        if index not in self._streamed:
            return layer
        assert self._store is not None
        found: list[torch.Tensor] = []
        empty = with_weights(layer, lambda tensor: _emptied(tensor, found))
        image = self._images[index] = Image.of(found)
        self._store.add(image, found)
        return empty

    def finish(self, layers: Sequence[DecoderLayer]) -> tuple[list[DecoderLayer], Streamed | None]:
        """Return all layers, those that stream with weights in slots, and who fills these; `None` where none streams.

        Raises:
            TersorError: no memory for the slots.
        """
        if self._store is None:
            self._say(f"offload: all {self._layers} layers stay on the device: nothing streams")
            return list(layers), None
        images = [self._images[index] for index in self._streamed]
        count, largest = min(SLOTS, len(images)), max(image.nbytes for image in images)
        slots = [torch.zeros(largest, dtype=torch.uint8, device=self._device) for _ in range(count)]
        placed = list(layers)
        for number, (index, image) in enumerate(zip(self._streamed, images, strict=True)):
            views = iter(image.views(slots[number % count]))
            placed[index] = with_weights(layers[index], lambda _, views=views: next(views))  # type: ignore[misc]
        streamed = Streamed(self._store, images, self._streamed, slots)
        self._say(
            f"offload: {self._layers - len(images)} of {self._layers} layers stay on the device, {len(images)} stream "
            f"from {streamed.where} ({streamed.nbytes / 1e9:.2f} GB a step, {count} buffers of {largest / 1e9:.2f} GB)"
        )
        return placed, streamed

    def _say(self, line: str) -> None:
        if self._told is not None:
            self._told(line)


def weights_of(layer: DecoderLayer) -> list[torch.Tensor]:
    """Return the tensors of a layer that stream, in order."""
    found: list[torch.Tensor] = []
    with_weights(layer, lambda tensor: _emptied(tensor, found))
    return found


def with_weights(layer: DecoderLayer, change: Callable[[torch.Tensor], torch.Tensor]) -> DecoderLayer:
    """Return a layer with every tensor of its weights changed, always in the same order."""
    changed: DecoderLayer = _changed(layer, change, False)
    return changed


def _changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor], inside: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value) if inside else value
    if isinstance(value, tuple):
        made = [_changed(one, change, inside) for one in value]
        return value if all(new is old for new, old in zip(made, value, strict=True)) else tuple(made)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    held = next((names for kind, names in _HOLDERS if isinstance(value, kind)), ())
    new = {one.name: _changed(getattr(value, one.name), change, inside or one.name in held) for one in fields(value)}
    kept: Mapping[str, Any] = {name: one for name, one in new.items() if one is not getattr(value, name)}
    return replace(value, **kept) if kept else value


def _emptied(tensor: torch.Tensor, found: list[torch.Tensor]) -> torch.Tensor:
    """Keep a tensor in a list, and return one of its shape without memory."""
    found.append(tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
