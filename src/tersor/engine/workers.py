"""Who computes a model together? A process a rank: those that torchrun started, or those that the first one starts.

All load their parts of the model at once (`build`). Then the first goes on as any engine does, and the others launch
what it launches until it ends. One that dies ends all: who waits for it gets one line that names it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from tersor.checkpoint.source import Source, open_source
from tersor.engine.build import build
from tersor.engine.children import end_with, leave_signals
from tersor.engine.config import EngineConfig
from tersor.engine.orders import Line
from tersor.errors import InputError, LostError, TersorError
from tersor.hardware import resolve_device
from tersor.models.load import check_placed
from tersor.ops.collective import ALONE, Ranks, disconnect
from tersor.ops.one_shot import OneShot, reachable
from tersor.ops.stages import ONE, Stages
from tersor.planner.placement import Place, Placement

_HOST = "127.0.0.1"
_BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
_REACHED, _USUAL = timedelta(seconds=60), timedelta(minutes=30)
"""How long a rank that torchrun started looks for where ranks meet, and waits for others there, which start later."""
_IDLE = timedelta(days=3650)
"""Ranks wait as long as nobody asks for anything."""
_GRACE = 10.0
"""Seconds that a rank has to end before it is made to."""
_CASCADE = 0.3
"""Seconds in which ranks end after one that they cannot reach any more."""
_LEFT_ALONE = 3
"""Exit status of a rank that ended because another did."""


@dataclass(frozen=True, slots=True)
class Seat:
    """How one rank is connected to the others.

    Attributes:
        device: its own.
        place: where it is in the model; `None` is alone.
        ranks: those of its stage.
        stages: of the model, and all of their ranks.
        line: from the first of all ranks to the others; `None` with one.
    """

    device: torch.device
    place: Place | None = None
    ranks: Ranks = ALONE
    stages: Stages = ONE
    line: Line | None = None

    def leave(self, made: bool = True) -> None:
        """Let go of all groups, and of torch.distributed where it was not there before; nothing happens alone."""
        if self.place is None:
            return
        if made and distributed.is_initialized():  # torch ends it itself where an interpreter ends
            distributed.destroy_process_group()
        self.ranks.close()
        if self.stages.count > 1:
            self.stages.close()
        if self.line is not None:
            self.line.close()

    def abort(self) -> None:
        """Have nobody wait for other ranks on this rank's GPU any more; any thread may ask."""
        for one in (self.ranks, self.stages.everyone, self.stages):
            one.abort()


class Team:
    """The ranks of a model, seen from one of them. To be closed.

    Attributes:
        seat: of this rank.
        first: whether it is the first of all, which has the requests.
    """

    def __init__(self, seat: Seat, first: bool = True, end: Callable[[], None] = lambda: None) -> None:
        self.seat, self.first = seat, first
        self._calls = ExitStack()
        self._calls.callback(end)
        self._finalizer = weakref.finalize(self, self._calls.close)

    def before_end(self, call: Callable[[], None]) -> None:
        """Have something done first when this ends, such as what must not outlive the groups of the ranks."""
        self._calls.callback(call)

    def close(self) -> None:
        """End all other ranks; idempotent."""
        self._finalizer()

    def leave(self) -> None:
        """Let go of all groups, as every rank does at once: the others have been told that it is over."""
        self._finalizer.detach()
        self.seat.leave()


def by_torchrun(config: EngineConfig) -> bool:
    """Tell whether torchrun started the ranks of a model, where there are several."""
    return config.ranks > 1 and distributed.is_torchelastic_launched()


def follows(config: EngineConfig) -> bool:
    """Tell whether torchrun started this process as a rank that only computes: it makes the model, and nothing else."""
    if not by_torchrun(config):
        return False
    if not distributed.is_initialized():
        _join(resolve_device(config.device))
    return distributed.get_rank() > 0


_JOINED: list[ProcessGroup | None] = []
"""The group of all processes of torchrun, where it was made here."""
_OPEN: weakref.WeakSet[Team] = weakref.WeakSet()
"""Whom `joined` returned; what one of them says at its end would else be heard by the next."""


def _join(device: torch.device) -> None:
    """Find the other processes of torchrun.

    Raises:
        TersorError: they cannot be reached.
    """
    try:
        store, rank, count = next(distributed.rendezvous("env://", timeout=_REACHED))
        store.set_timeout(_USUAL)
        store = distributed.PrefixStore("default_pg", store)
        distributed.init_process_group(_BACKENDS[device.type], store=store, rank=rank, world_size=count)
    except (distributed.DistError, ValueError) as error:
        raise TersorError(f"the processes of torchrun do not reach each other: {str(error).splitlines()[0]}") from None
    _JOINED.append(distributed.group.WORLD)


def gather(config: EngineConfig, source: Source) -> Team:
    """Return the ranks of a model; under torchrun every rank calls this, and else the first one alone.

    Args:
        config: of the engine, which says how many ranks there are.
        source: the checkpoint.

    Raises:
        InputError: there are not so many processes of torchrun, or GPUs.
        ShapeError: the model cannot be placed so.
        TersorError: a rank cannot be started.
    """
    count, device, said = config.ranks, resolve_device(config.device), config.ranks_said
    if count == 1:
        return Team(Seat(device))
    if distributed.is_torchelastic_launched():
        return joined(config, check_placed(source, config.placed), device)
    if device.type == "cuda" and torch.cuda.device_count() < (device.index or 0) + count:
        since = "" if device.index is None else f", from {device} on"
        raise InputError(f"{said}{since}, and there are {torch.cuda.device_count()} CUDA GPUs here")
    if distributed.is_initialized():
        raise InputError("torch.distributed is in use in this process, as by another model of several ranks")
    if multiprocessing.current_process().daemon:
        raise InputError(f"{said}: a daemon process cannot start processes of its own")
    placement = check_placed(source, config.placed)
    children = _Children(config.settled(str(device), placement), source.directory)
    try:
        children.greet()
        seat = _connect(0, placement, device, children.store, children.lost)
        children.watch(seat if device.type == "cuda" else None)
    except BaseException:
        with ExitStack() as calls:
            calls.callback(disconnect, device)
            children.end()
        raise

    def end() -> None:
        children.closing = True
        with ExitStack() as calls:  # all of it, also where somebody interrupts
            calls.callback(children.end)
            calls.callback(seat.leave)
            _say_end(seat)

    return Team(seat, end=end)


def _say_end(seat: Seat) -> None:
    """Have all other ranks end."""
    if seat.line is not None and distributed.is_initialized():  # at an interpreter's end torch has ended it
        with suppress(LostError):  # they have ended
            seat.line.end()


def joined(config: EngineConfig, placement: Placement, device: torch.device) -> Team:
    """Return the ranks that torchrun started, on this machine or on several; every one of them calls this.

    Args:
        config: of the engine.
        placement: of the model.
        device: of all ranks, by its type.

    Raises:
        InputError: there are not so many processes, or GPUs, or another model of several ranks is not closed.
    """
    if any(team._finalizer.alive for team in _OPEN):
        raise InputError("this process is a rank of another model: close that one first")
    if not distributed.is_initialized():
        _join(device)
    made = distributed.group.WORLD in _JOINED
    rank, found = distributed.get_rank(), distributed.get_world_size()
    if found != placement.ranks:
        raise InputError(f"{config.ranks_said}, and torchrun started {found} processes")
    local = (device.index or 0) + distributed.get_node_local_rank(rank)
    if device.type == "cuda" and local >= torch.cuda.device_count():
        raise InputError(
            f"rank {rank} would be on cuda:{local}, and there are {torch.cuda.device_count()} CUDA GPUs here"
        )
    seat = _connect(rank, placement, device, None, lambda _: "")

    def end() -> None:
        if rank == 0:
            _say_end(seat)
        _JOINED.clear()
        seat.leave(made)

    team = Team(seat, rank == 0, end)
    _OPEN.add(team)
    return team


def _connect(rank: int, placement: Placement, device: torch.device, store: Any, lost: Callable[[float], str]) -> Seat:
    """Connect a rank to all others; without a store all are connected, and groups of some of them are left."""
    own, count, place = device, placement.ranks, placement.place(rank)
    if own.type == "cuda":  # those of one machine have one each, from the given one on
        local = rank if store is not None else distributed.get_node_local_rank(rank)
        own = torch.device("cuda", (device.index or 0) + local)
        torch.cuda.set_device(own)
    if store is not None:
        distributed.init_process_group(_BACKENDS[device.type], store=store, rank=rank, world_size=count)
    hosts = distributed.new_group(backend="gloo", timeout=_IDLE)
    world = distributed.group.WORLD
    assert world is not None
    group, stages = world, ONE
    if place.stages > 1:
        for index in range(place.stages):  # all ranks make the groups of all stages, in one order
            made = distributed.new_group(list(placement.members(index)))
            group = made if index == place.index else group
        onward, back = distributed.new_group(), distributed.new_group()
        stages = Stages(placement, rank, Ranks(rank, count, world, lost), onward, back)
    size, quick = place.stage.ranks, None
    if own.type == "cuda" and size > 1:
        near = reachable(place.rank, size, own.index - place.rank)
        if Ranks(place.rank, size, group, lost).least(int(near), own):
            quick = OneShot(group, own, place.rank, size)
    ranks = Ranks(place.rank, size, group, lost, quick)
    stages.greet(rank, own)
    everyone = ranks if place.stages == 1 else stages.everyone
    return Seat(own, place, ranks, stages, Line(everyone, hosts, place.stages > 1))


class _Children:
    """The processes of all ranks but the first.

    Attributes:
        store: where ranks find each other.
        closing: whether they are to end.
    """

    def __init__(self, config: EngineConfig, directory: Path) -> None:
        count = config.ranks
        self.store = distributed.TCPStore(_HOST, 0, count, is_master=True, wait_for_workers=False)
        self.closing = False
        self._count, self._reason, self._news = count, "", threading.Event()
        context = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
        self._links: dict[int, Connection] = {}
        self._processes: dict[int, Any] = {}
        for rank in range(1, count):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.store.port, config, directory, torch.get_num_threads())
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._links[rank], self._processes[rank] = ours, process

    def greet(self) -> None:
        """Wait until all are there.

        Raises:
            TersorError: one ended; a program that starts ranks has to keep what it does at its top from being run again
                in each of them (`if __name__ == "__main__":`).
        """
        for rank, link in self._links.items():
            try:
                link.recv()
            except EOFError:
                raise TersorError(
                    f"{self._ended(rank, '')} before it began: does the program keep what it does under "
                    'if __name__ == "__main__"?'
                ) from None

    def watch(self, seat: Seat | None) -> None:
        """Begin to look out for one that ends; a seat on a GPU waits for it no longer."""
        threading.Thread(target=self._watch, args=(seat,), name="tersor ranks", daemon=True).start()

    def lost(self, seconds: float) -> str:
        """Return which rank is gone, waiting for one to be at most so long; empty if none is."""
        if seconds:
            self._news.wait(seconds)
        return self._reason

    def end(self) -> None:
        """See that all end; idempotent."""
        self.closing = True
        until = time.monotonic() + (0 if self._news.is_set() else _GRACE)
        for process in self._processes.values():
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        for link in self._links.values():
            link.close()

    def _watch(self, seat: Seat | None) -> None:
        ranks = {link: rank for rank, link in self._links.items()}
        said: dict[int, str] = {}
        ended: list[int] = []
        while not ended:
            try:
                self._listen(ranks, said, ended, None)
            except OSError:  # closed on this side
                return
        if self.closing:
            return
        self._listen(ranks, said, ended, _CASCADE)
        first = next((rank for rank in ended if self._code(rank) != _LEFT_ALONE), ended[0])
        self._reason = self._ended(first, said.get(first, ""))
        self._news.set()
        if seat is not None:
            seat.abort()

    def _listen(
        self, ranks: dict[Connection, int], said: dict[int, str], ended: list[int], seconds: float | None
    ) -> None:
        """Note what ranks say, and which end."""
        for link in wait([link for link, rank in ranks.items() if rank not in ended], seconds):
            assert isinstance(link, Connection)
            try:
                said[ranks[link]] = link.recv()
            except (EOFError, ConnectionError):
                ended.append(ranks[link])

    def _code(self, rank: int) -> int:
        self._processes[rank].join(_GRACE)
        return self._processes[rank].exitcode or 0

    def _ended(self, rank: int, said: str) -> str:
        code = self._code(rank)
        how = f" by {signal.Signals(-code).name}" if code < 0 else ""
        return f"rank {rank} of {self._count} ended{how}" + (f": {said}" if said else "")


def _work(link: Connection, rank: int, port: int, config: EngineConfig, directory: Path, threads: int) -> None:
    """Be a rank: load a part of the model, and launch what the first rank launches."""
    leave_signals()
    torch.set_num_threads(threads)  # sums of all ranks are to be the same
    link.send("")
    threading.Thread(target=end_with, args=(link, _LEFT_ALONE), daemon=True).start()
    code = 0
    try:
        device = torch.device(config.device)
        store = distributed.TCPStore(_HOST, port, config.ranks, is_master=False)
        assert isinstance(config.placement, Placement), "the first rank has settled it"
        seat = _connect(rank, config.placement, device, store, lambda _: "")
        with open_source(directory) as source:
            built = build(source, config, seat.device, seat.ranks, seat.line, seat.stages, seat.place)
        built.runner.follow()
    except LostError:
        code = _LEFT_ALONE
    except Exception as error:
        link.send(" ".join(str(error).split()) or type(error).__name__)
        code = 1
    os._exit(code)  # a communicator that waits for one that is gone would keep the process
