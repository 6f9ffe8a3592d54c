"""How long do ranks of this machine take to exchange bytes? Measured by torch.distributed, for `tersor plan --links`.

A process a rank: NCCL on GPUs, gloo on CPUs. Every operation is timed for groups of the first 2, 3 and so many ranks,
by calls one behind the other; the rank that takes longest counts. Links between nodes are not measured: their tables
are those of the chip, with their source.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from tersor import files
from tersor.errors import InputError, OutputError, TersorError
from tersor.hardware import Chip
from tersor.planner import links
from tersor.planner.links import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, ONE_SHOT, REDUCE_SCATTER, SEND

PAYLOADS = tuple(1 << power for power in (10, 13, 15, 17, 19, 20, 21, 23, 25, 27, 29))
"""Bytes that are tried, 1 KiB to 512 MiB."""
CALLS, REPEATS = 20, 4
_LARGE = 1 << 25
"""From so many bytes on a few calls are enough."""


def sizes(ranks: int) -> list[int]:
    """Return the numbers of ranks that are timed: 2, 3, 4, 6, 8 and all."""
    return sorted({size for size in (2, 3, 4, 6, 8, ranks) if size <= ranks})


def measured(
    ranks: int, chip: Chip, payloads: Sequence[int] = PAYLOADS, *, gpus: bool = True, calls: int = CALLS
) -> dict[str, Any]:
    """Return tables of the links of this machine, as `planner.links.read` reads them.

    Args:
        ranks: processes; on GPUs each has one.
        chip: whose tables these are, and whose are given for links between nodes.
        payloads: bytes that are timed.
        gpus: whether GPUs exchange, by NCCL; else CPUs, by gloo.
        calls: one behind the other, of a run.

    Raises:
        InputError: fewer than two ranks, or more than there are GPUs.
        TersorError: a process failed.
    """
    if ranks < 2:
        raise InputError(f"links of {ranks} rank: at least 2 exchange something")
    if gpus and torch.cuda.device_count() < ranks:
        raise InputError(f"links of {ranks} GPUs: torch sees {torch.cuda.device_count()} here")
    with tempfile.TemporaryDirectory(prefix="tersor-links-") as folder:
        try:
            torch.multiprocessing.spawn(_rank, (ranks, tuple(payloads), gpus, calls, folder), nprocs=ranks)  # type: ignore[no-untyped-call]
        except torch.multiprocessing.ProcessExitedException as error:
            raise TersorError(f"a rank ended while links were measured: {error}") from None
        except torch.multiprocessing.ProcessRaisedException as error:
            raise TersorError(f"links could not be measured: {str(error).strip().splitlines()[-1]}") from None
        times = json.loads((Path(folder) / "times.json").read_text(encoding="utf-8"))
    known = links.of_chip(chip)
    how = f"{'NCCL' if gpus else 'gloo on CPUs'}, torch {torch.__version__}, {ranks} processes of one machine"
    inside: dict[str, Any] = {
        name: {"source": f"measured: {how}", "us": _rising(table)} for name, table in times.items()
    }
    if ONE_SHOT in inside:
        inside[ONE_SHOT] |= {"most_bytes": 1 << 20, "most_ranks": 8}
        inside[ONE_SHOT]["source"] = f"measured: one-shot sum of Tersor, {how}"
    return {
        "kind": links.KIND,
        "version": links.VERSION,
        "chip": chip.name,
        "reach": ranks,
        "inside": inside,
        "between": {name: _written(table) for name, table in known.between.items()},
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """Write tables to a file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        files.write_whole(path, (json.dumps(found, indent=1) + "\n").encode())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def _rising(table: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    """Return a table in which more bytes take no less: what was faster was noise."""
    found = {}
    for ranks, points in table.items():
        times = itertools.accumulate((time for _, time in points), max)
        found[ranks] = [[size, time] for (size, _), time in zip(points, times, strict=True)]
    return found


def _written(table: links.Table) -> dict[str, Any]:
    raw = dataclasses.asdict(table)
    rows = {str(ranks): [list(point) for point in points] for ranks, points in raw.pop("rows").items()}
    return {"source": raw["source"], "us": rows}


def _rank(rank: int, ranks: int, payloads: tuple[int, ...], gpus: bool, calls: int, folder: str) -> None:
    """Be one of the processes; the first writes what was measured."""
    warnings.simplefilter("ignore", FutureWarning)  # names that newer versions of torch have changed
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    store = distributed.FileStore(os.path.join(folder, "store"), ranks)
    distributed.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=ranks)
    try:
        times: dict[str, dict[str, list[list[float]]]] = {}
        for count in sizes(ranks):
            group = distributed.new_group(list(range(count)))
            if rank < count:
                for name, prepare in _operations(device, rank, count, group):
                    for nbytes in payloads:
                        call = prepare(nbytes)
                        if call is not None:
                            seconds = _seconds(call, calls if nbytes < _LARGE else -(-calls // 5), device, group)
                            times.setdefault(name, {}).setdefault(str(count), []).append([nbytes, seconds * 1e6])
            distributed.barrier()
        if rank == 0:
            times[SEND] = {"2": times[SEND]["2"]}
            (Path(folder) / "times.json").write_text(json.dumps(times), encoding="utf-8")
    finally:
        distributed.destroy_process_group()


Prepare = Callable[[int], Callable[[], object] | None]


def _operations(device: torch.device, rank: int, count: int, group: Any) -> Iterator[tuple[str, Prepare]]:
    """Yield operations; each prepares a call for a payload, or says that it has none of that size."""

    def tensor(nbytes: int) -> torch.Tensor:
        return torch.zeros(max(1, nbytes // 2), dtype=torch.bfloat16, device=device)

    def whole(nbytes: int) -> int:
        return -(-nbytes // (2 * count)) * 2 * count  # as many for each rank

    def reduce(nbytes: int) -> Callable[[], object]:
        x = tensor(nbytes)
        return lambda: distributed.all_reduce(x, group=group)

    def gather(nbytes: int) -> Callable[[], object]:
        own, every = tensor(whole(nbytes) // count), tensor(whole(nbytes))
        return lambda: distributed.all_gather_into_tensor(every, own, group=group)

    def scatter(nbytes: int) -> Callable[[], object]:
        own, every = tensor(whole(nbytes) // count), tensor(whole(nbytes))
        return lambda: distributed.reduce_scatter_tensor(own, every, group=group)

    def exchange(nbytes: int) -> Callable[[], object]:
        x, out = tensor(whole(nbytes)), tensor(whole(nbytes))
        return lambda: distributed.all_to_all_single(out, x, group=group)

    def send(nbytes: int) -> Callable[[], object] | None:
        if count != 2:
            return None
        x = tensor(nbytes)
        if rank == 0:
            return lambda: distributed.send(x, 1, group=group)
        return lambda: distributed.recv(x, 0, group=group)

    yield from (
        (ALL_REDUCE, reduce),
        (ALL_GATHER, gather),
        (REDUCE_SCATTER, scatter),
        (ALL_TO_ALL, exchange),
        (SEND, send),
    )
    if device.type == "cuda":
        yield from _one_shot(device, rank, count, group, tensor)


def _one_shot(
    device: torch.device, rank: int, count: int, group: Any, tensor: Callable[[int], torch.Tensor]
) -> Iterator[tuple[str, Prepare]]:
    from tersor.ops.one_shot import OneShot, reachable

    if not reachable(rank, count):
        return
    own = OneShot(group, device, rank, count)

    def prepare(nbytes: int) -> Callable[[], object] | None:
        x = tensor(nbytes)
        return (lambda: own.sum(x)) if own.serves(x) else None

    yield ONE_SHOT, prepare


def _seconds(call: Callable[[], object], calls: int, device: torch.device, group: Any) -> float:
    """Return the seconds of a call, the median of some runs of calls one behind the other, of the slowest rank."""
    found = []
    for _ in range(1 + REPEATS):
        distributed.barrier(group)
        _wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        found.append((time.perf_counter() - began) / calls)
    slowest = torch.tensor([statistics.median(found[1:])], dtype=torch.float64, device=device)
    distributed.all_reduce(slowest, distributed.ReduceOp.MAX, group=group)
    return float(slowest)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
