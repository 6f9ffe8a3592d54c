"""How do weights flow from the input shards to the output? Read, encoded and written in blocks of rows.

Every worker thread reads a block, encodes it and writes the result to its place. There are more threads than may encode
at the same time, so the disk is busy while the processors are. Bytes do not depend on timing: every block has its place
in the file from the start.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tersor.checkpoint.conversion import Conversion, Step
from tersor.checkpoint.modules import LinearLayer
from tersor.checkpoint.names import TORCH_DTYPES
from tersor.checkpoint.pack import Packed, pack, pack_mixed, pack_sparse, underflow_words
from tersor.checkpoint.reader import element_bytes
from tersor.checkpoint.released import DecodedTensor
from tersor.checkpoint.writer import ShardWriter
from tersor.compress import get_recipe
from tersor.compress.workers import worker_pool
from tersor.convert.report import Row
from tersor.errors import CheckpointError, FormatError, NonFiniteError
from tersor.formats import Assignment, Pruned

Progress = Callable[[int, int, str], None]
"""Called with bytes of weights done, bytes in all, and the tensor at hand."""

_CACHE_ELEMENTS = 1 << 18
"""Elements one or two threads encode at once on a CPU: what the passes over them touch stays in the cache."""
_CROWD_ELEMENTS = 1 << 20
"""Elements more threads encode at once: they wait for Python's lock rather than for memory, so fewer, longer passes."""
_CPU_BLOCK_ELEMENTS = 1 << 22
_CUDA_BLOCK_ELEMENTS = 1 << 24
_COPY_BYTES = 1 << 23
_MAX_ENCODERS = 16
_WAITING = 2
"""Threads beyond the encoders, which read ahead or write."""


@dataclass(frozen=True, slots=True)
class _Block:
    """A piece of one step: rows of a compressed weight, or bytes of a copied tensor."""

    step: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Ready:
    """A weight that is compressed already and only has to be written.

    Attributes:
        read: returns its packed tensors by their own names, of experts with one axis more in front.
        squared_error, squared_norm, underflowed: as `checkpoint.pack.Packed` has them.
    """

    read: Callable[[], dict[str, torch.Tensor]]
    squared_error: float
    squared_norm: float
    underflowed: tuple[int, ...] = ()


def row_of(step: Step, relative_error: float | None = None) -> Row:
    """Return the report's row for a step."""
    spec = step.source.spec
    after = step.output_bytes
    shared = step.layer is not None and step.layer.stacked and isinstance(step.scheme, Assignment)
    if step.scheme is not None and step.layer is not None and not shared:
        bits = step.scheme.bits_per_weight(step.layer.shape[-1])
    else:
        bits = 8 * after / spec.numel if spec.numel else 0.0
    key = step.scheme.key() if step.scheme is not None else None
    before = step.source.nbytes
    density = None
    if isinstance(step.scheme, Pruned) and step.layer is not None:
        density = step.scheme.density(step.layer.shape[-1])
    return Row(
        spec.name, spec.shape, spec.dtype, key, bits, before, after, relative_error, step.note, step.linear, "", density
    )


class Pipeline:
    """Writes the shards of a conversion into a directory."""

    def __init__(
        self,
        conversion: Conversion,
        recipe: str,
        directory: Path,
        device: torch.device,
        progress: Progress | None,
        ready: Mapping[int, Ready] | None = None,
    ) -> None:
        """Prepare to write; nothing is opened yet.

        Args:
            conversion: what to write.
            recipe: how codes are chosen, a key of `compress.RECIPES`.
            directory: where the shards are written.
            device: where weights are encoded.
            progress: called after every block.
            ready: number of a step -> its weight, where that is compressed already.
        """
        self._ready = ready or {}
        self._conversion = conversion
        self._recipe = recipe
        self._directory = directory
        self._device = device
        self._progress = progress
        encoders = min(_MAX_ENCODERS, len(os.sched_getaffinity(0))) if device.type == "cpu" else 2
        self._threads = encoders + _WAITING
        self._pass_elements = _CACHE_ELEMENTS if encoders <= 2 else _CROWD_ELEMENTS
        self._may_encode = threading.Semaphore(encoders)
        self._recording = threading.Lock()
        self._local = threading.local()
        self._sums: dict[int, tuple[float, float]] = {}
        self._underflowed: dict[int, list[int]] = {}

    def run(self, first_shard: int, on_shard: Callable[[int, list[Row]], None]) -> None:
        """Write the shards from number `first_shard` on.

        Args:
            first_shard: number of the first shard that is not there yet.
            on_shard: called when a shard has its final name, with its number and its rows; from another thread, in
                order.

        Raises:
            NonFiniteError: a weight holds a NaN or an infinity.
            CheckpointError: the source cannot be read.
            OutputError: the output cannot be written.
        """
        writers: list[ShardWriter] = []
        pool = worker_pool(self._threads, "tersor-block")
        closer = ThreadPoolExecutor(1, "tersor-shard")
        try:
            self._run(first_shard, on_shard, pool, closer, writers)
        finally:
            pool.shutdown(cancel_futures=True)
            closer.shutdown(cancel_futures=True)
            for writer in writers:
                writer.abort()

    def _run(
        self,
        first_shard: int,
        on_shard: Callable[[int, list[Row]], None],
        pool: ThreadPoolExecutor,
        closer: ThreadPoolExecutor,
        writers: list[ShardWriter],
    ) -> None:
        steps = self._conversion.steps
        total = self._conversion.input_bytes
        skipped = [index for _, indices in self._conversion.shards[:first_shard] for index in indices]
        done = sum(steps[index].source.spec.nbytes for index in skipped)
        pending: deque[tuple[Future[tuple[float, float]], _Block]] = deque()
        closing: list[Future[None]] = []

        def collect() -> None:
            nonlocal done
            future, block = pending.popleft()
            error, norm = future.result()
            before = self._sums.get(block.step, (0.0, 0.0))
            self._sums[block.step] = (before[0] + error, before[1] + norm)
            done += _input_bytes(steps[block.step], block)
            if self._progress is not None:
                self._progress(done, total, steps[block.step].source.spec.name)

        if self._progress is not None:
            self._progress(done, total, "")
        for number, (name, indices) in enumerate(self._conversion.shards[first_shard:], start=first_shard):
            writer = ShardWriter(self._directory / name, [spec for index in indices for spec in steps[index].outputs])
            writers.append(writer)
            for index in indices:
                self._write_constants(writer, steps[index])
                for block in self._blocks(index):
                    while len(pending) >= 2 * self._threads:
                        collect()
                    pending.append((pool.submit(self._work, writer, block), block))
            while pending:
                collect()
            rows = [self._row(index) for index in indices]
            closing.append(closer.submit(_close, writer, number, rows, on_shard))
            for future in closing:
                if future.done():
                    future.result()
        for future in closing:
            future.result()

    def _blocks(self, index: int) -> Iterator[_Block]:
        step = self._conversion.steps[index]
        if index in self._ready:
            whole = math.prod(step.layer.shape[:-1]) if step.layer and step.scheme else step.source.spec.nbytes
            yield _Block(index, 0, whole)
            return
        if step.layer is None or step.scheme is None:
            size = _COPY_BYTES
            if isinstance(step.source, DecodedTensor):
                row_bytes = _row_bytes(step)
                size = step.source.spec.nbytes if step.source.all_rows else max(1, size // row_bytes) * row_bytes
            for start in range(0, step.source.spec.nbytes, size):
                yield _Block(index, start, min(start + size, step.source.spec.nbytes))
            return
        *_, oc, ic = step.layer.shape
        elements = _CPU_BLOCK_ELEMENTS if self._device.type == "cpu" else _CUDA_BLOCK_ELEMENTS
        # The rows of a transposed weight are spread over the whole tensor, those of experts over that of each.
        decoded = isinstance(step.source, DecodedTensor) and (step.layer.stacked or step.source.all_rows)
        whole = step.layer.transposed or decoded or get_recipe(self._recipe).all_rows
        rows, count = oc if whole else max(1, elements // ic), math.prod(step.layer.shape[:-1])
        for start in range(0, count, rows):
            yield _Block(index, start, min(start + rows, count))

    def _write_constants(self, writer: ShardWriter, step: Step) -> None:
        for spec, content in step.stored.constants if step.stored else ():
            writer.write(spec.name, 0, memoryview(content))

    def _row(self, index: int) -> Row:
        step = self._conversion.steps[index]
        error, norm = self._sums.pop(index, (0.0, 0.0))
        if step.scheme is None and index not in self._ready:
            return row_of(step)
        row = row_of(step, math.sqrt(error / norm) if norm else 0.0)
        rows = sorted(self._underflowed.pop(index, ()))
        return replace(row, warning=underflow_words(rows, step.scheme)) if rows and step.scheme else row

    def _work(self, writer: ShardWriter, block: _Block) -> tuple[float, float]:
        """Read, encode and write one block; return the squared error and the squared norm."""
        step = self._conversion.steps[block.step]
        if step.layer is None or step.scheme is None:
            writer.write(step.source.spec.name, block.start, self._copy(step, block))
            ready = self._ready.get(block.step)
            return (ready.squared_error, ready.squared_norm) if ready is not None else (0.0, 0.0)
        packed = self._take(self._ready[block.step]) if block.step in self._ready else self._encode(step, block)
        if packed.underflowed:
            with self._recording:
                self._underflowed.setdefault(block.step, []).extend(packed.underflowed)
        self._store(writer, step, block, packed)
        return packed.squared_error, packed.squared_norm

    def _encode(self, step: Step, block: _Block) -> Packed:
        weight = self._read(step, block)
        with self._may_encode:
            try:
                return self._pack(weight, step, block)
            except (NonFiniteError, FormatError) as error:
                raise located(step, error) from None
            except CheckpointError as error:
                raise CheckpointError(f"{_where(step)}: {error}") from None

    def _take(self, ready: Ready) -> Packed:
        """Return a weight that is compressed already, the rows of all experts one after the other."""
        tensors = {name: tensor.flatten(0, -2) if tensor.dim() > 1 else tensor for name, tensor in ready.read().items()}
        return Packed(tensors, ready.squared_error, ready.squared_norm, ready.underflowed)

    def _copy(self, step: Step, block: _Block) -> memoryview:
        """Return bytes of a tensor that stays as it is; what is stored compressed is decoded to the model's dtype."""
        source, spec = step.source, step.source.spec
        if block.step in self._ready:
            (tensor,) = self._ready[block.step].read().values()
            stored = tensor.transpose(-1, -2) if step.layer is not None and step.layer.transposed else tensor
            return stored.to(TORCH_DTYPES[spec.dtype]).contiguous().view(torch.uint8).reshape(-1).numpy().data
        if isinstance(source, DecodedTensor):
            row_bytes = _row_bytes(step)
            rows = source.read_rows(block.start // row_bytes, block.stop // row_bytes)
            return rows.to(TORCH_DTYPES[spec.dtype]).view(torch.uint8).reshape(-1).numpy().data
        view: memoryview = self._buffer(block.stop - block.start).numpy().data
        source.file.read_into(spec, block.start, view)
        return view

    def _read(self, step: Step, block: _Block) -> torch.Tensor:
        """Return rows of a weight as [rows, IC], on the CPU."""
        assert step.layer is not None
        spec, layer = step.source.spec, step.layer
        expert = block.start // layer.shape[-2]
        if isinstance(step.source, DecodedTensor):
            if layer.stacked:
                matrix = step.source.read_rows(expert, expert + 1)[0]
            else:
                rows = (0, spec.shape[0]) if layer.transposed else (block.start, block.stop)
                matrix = step.source.read_rows(*rows)
            return matrix.T.contiguous() if layer.transposed else matrix
        row_bytes = spec.nbytes // math.prod(spec.shape[:-1])
        # A block of a transposed weight is all of it, or all of one expert's.
        first, count = (expert * spec.shape[-2], spec.shape[-2]) if layer.transposed else (block.start, len(block))
        flat = self._buffer(count * row_bytes)
        step.source.file.read_into(spec, first * row_bytes, flat.numpy().data)
        matrix = flat.view(TORCH_DTYPES[spec.dtype]).view(count, spec.shape[-1])
        return matrix.T.contiguous() if layer.transposed else matrix

    def _pack(self, weight: torch.Tensor, step: Step, block: _Block) -> Packed:
        """Encode and pack a block's rows [rows, IC] on the pipeline's device."""
        assert step.scheme is not None
        form: Any = step.scheme  # what the one or the other takes
        kinds: dict[type, Any] = {Assignment: pack_mixed, Pruned: pack_sparse}
        pack_rows = kinds.get(type(form), pack)
        if self._device.type == "cpu":
            elements = self._pass_elements
            return pack_rows(weight, form, self._recipe, first_row=block.start, block_elements=elements)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream()):
            moved = weight.to(self._device, non_blocking=True)
            packed = pack_rows(moved, form, self._recipe, first_row=block.start, block_elements=moved.numel())
            tensors = {name: tensor.cpu() for name, tensor in packed.tensors.items()}
        return replace(packed, tensors=tensors)

    def _store(self, writer: ShardWriter, step: Step, block: _Block, packed: Packed) -> None:
        assert step.stored is not None
        for name, tensor in packed.tensors.items():
            spec = step.stored.tensors[name]
            if tensor.dim() == 1:  # the values of pruned weights, whose rows are as long as they are
                start = packed.starts.get(name, 0) * tensor.itemsize
                writer.write(spec.name, start, tensor.contiguous().view(torch.uint8).numpy().data)
                continue
            row_bytes = spec.nbytes // math.prod(spec.shape[:-1])
            rows = tensor.view(torch.uint8)[:, :row_bytes].contiguous()
            writer.write(spec.name, packed.starts.get(name, block.start) * row_bytes, rows.numpy().data)

    def _buffer(self, nbytes: int) -> torch.Tensor:
        """Return this thread's input buffer, uint8 [nbytes]; pinned when weights go to a GPU."""
        held: torch.Tensor | None = getattr(self._local, "buffer", None)
        if held is None or held.numel() < nbytes:
            held = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self._local.buffer = held
        return held[:nbytes]

    def _stream(self) -> torch.cuda.Stream:
        held: torch.cuda.Stream | None = getattr(self._local, "stream", None)
        if held is None:
            held = torch.cuda.Stream(self._device)
            self._local.stream = held
        return held


def _close(writer: ShardWriter, number: int, rows: list[Row], on_shard: Callable[[int, list[Row]], None]) -> None:
    writer.finish()
    on_shard(number, rows)


def located(step: Step, error: NonFiniteError | FormatError) -> NonFiniteError | FormatError:
    """Return an error of the rows of a step's weight as one that says where in the source it is."""
    if isinstance(error, NonFiniteError):
        assert step.layer is not None
        return NonFiniteError(_index(step.layer, error.index), error.value, _where(step))
    return FormatError(f"{_where(step)}: {error}")


def _where(step: Step) -> str:
    return f"{step.source.file.path}: tensor {step.source.spec.name!r}"


def _index(layer: LinearLayer, found: tuple[int, ...]) -> tuple[int, ...]:
    """Return where in the source's tensor the weight is that is at (row, column) of the layer's rows."""
    row, column = found
    expert, row = divmod(row, layer.shape[-2])
    inside = (column, row) if layer.transposed else (row, column)
    return (expert, *inside) if layer.stacked else inside


def _row_bytes(step: Step) -> int:
    """Return the bytes of a row of the source's first axis, decoded."""
    return step.source.spec.nbytes // step.source.spec.shape[0]


def _input_bytes(step: Step, block: _Block) -> int:
    if step.scheme is None or step.layer is None:
        return block.stop - block.start
    return len(block) * step.layer.shape[-1] * element_bytes(step.source.spec.dtype)
