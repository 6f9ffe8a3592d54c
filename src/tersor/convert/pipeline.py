"""How do weights flow from the input shards to the output? Read, encoded and written in blocks of rows.

Every worker thread reads a block, encodes it and writes the result to its place. There are more threads than
may encode at the same time, so the disk is busy while the processors are. Bytes do not depend on timing:
every block has its place in the file from the start.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tersor.checkpoint.conversion import Conversion, Step
from tersor.checkpoint.reader import TORCH_DTYPES, element_bytes
from tersor.checkpoint.writer import ShardWriter
from tersor.compress import Encoded, quantize_rtn
from tersor.convert.report import Row
from tersor.errors import FormatError, NonFiniteError
from tersor.formats import Scheme
from tersor.layouts import stream

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


def row_of(step: Step, relative_error: float | None = None) -> Row:
    """Return the report's row for a step."""
    spec = step.source.spec
    after = step.output_bytes
    if step.scheme is not None and step.layer is not None:
        bits = step.scheme.bits_per_weight(step.layer.shape[1])
    else:
        bits = 8 * after / spec.numel if spec.numel else 0.0
    key = step.scheme.key() if step.scheme is not None else None
    return Row(spec.name, spec.shape, spec.dtype, key, bits, spec.nbytes, after, relative_error, step.note)


class Pipeline:
    """Writes the shards of a plan into a directory."""

    def __init__(
        self, conversion: Conversion, directory: Path, device: torch.device, progress: Progress | None
    ) -> None:
        """Prepare to write; nothing is opened yet.

        Args:
            plan: what to write.
            directory: where.
            device: where weights are encoded.
            progress: told after every block.
        """
        self._conversion = conversion
        self._directory = directory
        self._device = device
        self._progress = progress
        encoders = min(_MAX_ENCODERS, len(os.sched_getaffinity(0))) if device.type == "cpu" else 2
        self._threads = encoders + _WAITING
        self._pass_elements = _CACHE_ELEMENTS if encoders <= 2 else _CROWD_ELEMENTS
        self._may_encode = threading.Semaphore(encoders)
        self._local = threading.local()
        self._sums: dict[int, tuple[float, float]] = {}

    def run(self, first_shard: int, on_shard: Callable[[int, list[Row]], None]) -> None:
        """Write the shards from number `first_shard` on.

        Args:
            first_shard: shards before it are there already.
            on_shard: called when a shard has its final name, with its number and its rows; from another
                thread, in order.

        Raises:
            NonFiniteError: a weight holds a NaN or an infinity.
            CheckpointError: the source cannot be read.
            OutputError: the output cannot be written.
        """
        threads_before = torch.get_num_threads()
        writers: list[ShardWriter] = []
        pool = ThreadPoolExecutor(self._threads, "tersor-block", initializer=torch.set_num_threads, initargs=(1,))
        closer = ThreadPoolExecutor(1, "tersor-shard")
        try:
            self._run(first_shard, on_shard, pool, closer, writers)
        finally:
            pool.shutdown(cancel_futures=True)
            closer.shutdown(cancel_futures=True)
            for writer in writers:
                writer.abort()
            torch.set_num_threads(threads_before)

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
        if step.layer is None or step.scheme is None:
            for start in range(0, step.source.spec.nbytes, _COPY_BYTES):
                yield _Block(index, start, min(start + _COPY_BYTES, step.source.spec.nbytes))
            return
        oc, ic = step.layer.shape
        elements = _CPU_BLOCK_ELEMENTS if self._device.type == "cpu" else _CUDA_BLOCK_ELEMENTS
        # A transposed weight is one block: its rows are spread over the whole tensor.
        rows = oc if step.layer.transposed else max(1, elements // ic)
        for start in range(0, oc, rows):
            yield _Block(index, start, min(start + rows, oc))

    def _write_constants(self, writer: ShardWriter, step: Step) -> None:
        for spec, content in step.stored.constants if step.stored else ():
            writer.write(spec.name, 0, memoryview(content))

    def _row(self, index: int) -> Row:
        step = self._conversion.steps[index]
        error, norm = self._sums.pop(index, (0.0, 0.0))
        if step.scheme is None:
            return row_of(step)
        return row_of(step, math.sqrt(error / norm) if norm else 0.0)

    def _work(self, writer: ShardWriter, block: _Block) -> tuple[float, float]:
        """Read, encode and write one block; return the squared error and the squared norm."""
        step = self._conversion.steps[block.step]
        if step.layer is None or step.scheme is None:
            buffer = self._buffer(block.stop - block.start)
            view = buffer.numpy().data
            step.source.file.read_into(step.source.spec, block.start, view)
            writer.write(step.source.spec.name, block.start, view)
            return 0.0, 0.0
        weight = self._read(step, block)
        with self._may_encode:
            try:
                encoded = self._encode(weight, step)
            except NonFiniteError as error:
                row, column = error.index[0] + block.start, error.index[1]
                index = (column, row) if step.layer.transposed else (row, column)
                raise NonFiniteError(index, error.value, _where(step)) from None
            except FormatError as error:
                raise FormatError(f"{_where(step)}: {error}") from None
        self._store(writer, step, block, encoded)
        return encoded.squared_error, encoded.squared_norm

    def _read(self, step: Step, block: _Block) -> torch.Tensor:
        """Return rows of a weight as [rows, IC], on the CPU."""
        assert step.layer is not None
        spec = step.source.spec
        row_bytes = spec.nbytes // spec.shape[0]
        if step.layer.transposed:
            flat = self._buffer(spec.nbytes)
            step.source.file.read_into(spec, 0, flat.numpy().data)
            return flat.view(TORCH_DTYPES[spec.dtype]).view(spec.shape).T.contiguous()
        flat = self._buffer((block.stop - block.start) * row_bytes)
        step.source.file.read_into(spec, block.start * row_bytes, flat.numpy().data)
        return flat.view(TORCH_DTYPES[spec.dtype]).view(block.stop - block.start, spec.shape[1])

    def _encode(self, weight: torch.Tensor, step: Step) -> _EncodedRows:
        """Encode [rows, IC] and return everything on the CPU."""
        assert step.scheme is not None and step.stored is not None
        if self._device.type == "cuda":
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream()):
                return _encode_rows(weight.to(self._device, non_blocking=True), step.scheme, step.stored.row_bytes)
        rows, ic = weight.shape
        height = max(1, self._pass_elements // ic)
        parts = []
        for start in range(0, rows, height):
            try:
                part = weight[start : start + height]
                parts.append(_encode_rows(part, step.scheme, step.stored.row_bytes))
            except NonFiniteError as error:
                raise NonFiniteError((error.index[0] + start, error.index[1]), error.value) from None
        return _join(parts)

    def _store(self, writer: ShardWriter, step: Step, block: _Block, encoded: _EncodedRows) -> None:
        assert step.stored is not None
        pairs = [(step.stored.packed, encoded.packed), (step.stored.scale, encoded.scale)]
        if step.stored.zero_point is not None and encoded.zero_point is not None:
            pairs.append((step.stored.zero_point, encoded.zero_point))
        for spec, data in pairs:
            row_bytes = spec.nbytes // spec.shape[0]
            content = data.reshape(-1).view(torch.uint8).numpy()
            writer.write(spec.name, block.start * row_bytes, content.data)

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


@dataclass(frozen=True, slots=True)
class _EncodedRows:
    """Rows of a weight as they are written: uint8 [rows, bytes], scales and zero points [rows, G]."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    squared_error: float
    squared_norm: float


def _encode_rows(weight: torch.Tensor, scheme: Scheme, row_bytes: int) -> _EncodedRows:
    if weight.dtype == torch.float64:
        weight = weight.float()
    encoded: Encoded = quantize_rtn(weight, scheme)
    packed = stream.pack(encoded.codes, scheme.format.bits).view(torch.uint8)[:, :row_bytes]
    return _EncodedRows(
        packed=packed.contiguous().cpu(),
        scale=encoded.scale.cpu(),
        zero_point=None if encoded.zero_point is None else encoded.zero_point.cpu(),
        squared_error=encoded.squared_error,
        squared_norm=encoded.squared_norm,
    )


def _join(parts: list[_EncodedRows]) -> _EncodedRows:
    if len(parts) == 1:
        return parts[0]
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    return _EncodedRows(
        packed=torch.cat([part.packed for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat(zero_points) if zero_points else None,
        squared_error=math.fsum(part.squared_error for part in parts),
        squared_norm=math.fsum(part.squared_norm for part in parts),
    )


def _close(writer: ShardWriter, number: int, rows: list[Row], on_shard: Callable[[int, list[Row]], None]) -> None:
    writer.finish()
    on_shard(number, rows)


def _where(step: Step) -> str:
    return f"{step.source.file.path}: tensor {step.source.spec.name!r}"


def _input_bytes(step: Step, block: _Block) -> int:
    if step.scheme is None or step.layer is None:
        return block.stop - block.start
    return (block.stop - block.start) * step.layer.shape[1] * element_bytes(step.source.spec.dtype)
