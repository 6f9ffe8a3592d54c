"""A CUDA device that is not there: it loads what it is given, launches nothing, and remembers every number."""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.fake_driver import FakeDriver, Status
from tersor import hardware
from tersor.hardware import Chip
from tersor.kernels import jit
from tersor.kernels.jit import KernelSource, module, native, nvrtc, tensor_map
from tersor.ops import current, dispatch, prepared, workspace

_CLUSTER, _PROGRAMMATIC = 4, 6  # CUlaunchAttributeID


@dataclass(frozen=True)
class TensorMap:
    """What a tensor map was encoded from; sizes, box and steps name columns before rows, strides are bytes."""

    element: int
    address: int
    sizes: tuple[int, int]
    strides: tuple[int]
    box: tuple[int, int]
    steps: tuple[int, int]
    modes: tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One launch, as the driver was told.

    Attributes:
        kernel: name of the kernel.
        device: index of the device it was loaded on.
        stream: handle of the stream.
        grid, block: blocks and threads, (x, y, z).
        shared_bytes: dynamic shared memory of a block.
        arguments: values by the names that the kernel's own header gives them, in its order: pointers and integers as
            int, floats as float, tensor maps as `TensorMap`, other structures as bytes.
        programmatic: whether it may start before the launch ahead of it has ended.
        cluster: blocks of a cluster, or `None`.
    """

    kernel: str
    device: int
    stream: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: dict[str, Any]
    programmatic: bool
    cluster: tuple[int, int, int] | None

    def __getitem__(self, name: str) -> Any:
        """The value of an argument."""
        return self.arguments[name]


@dataclass(frozen=True)
class _Loaded:
    source: KernelSource
    device: int


class FakeGpu:
    """CUDA devices that are not there, for tests of what runs between Python and the driver.

    A module makes one in a fixture; the steps say how much is pretended::

        @pytest.fixture
        def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
            fake = FakeGpu("NVIDIA H200")       # names or `Chip`s, one a device; none: a machine without a GPU
            fake.install(monkeypatch)           # torch.cuda's questions, the driver, its functions behind ctypes
            fake.take_cpu_tensors(monkeypatch)  # for tersor.ops: CPU tensors pass for those of device 0
            return fake

    After `install` kernels are loaded and launched by the code that does so on a GPU, down to the memory that the
    driver would read. Arguments are unpacked from it by the types and the names in the kernel's own header: an order
    that differs between host and kernel shows as a wrong value, without a second list of arguments in a test. A test
    that loads kernels itself tells of them first (`knows`).

    After `take_cpu_tensors` linears choose, pack and launch as on device 0, with kernels that nobody compiled and that
    write nothing, so results are zero::

        y = ops.linear(x, weight)
        assert gpu.last["x"] == x.data_ptr() and gpu.last["y"] == y.data_ptr() and gpu.last.stream == 7
        assert gpu.last["partial"] in gpu.memory  # split sums take their memory from the driver

    With the kernels of sm_90 the activations are a map: `launch["x_map"].address`. Other threads have other streams
    (`gpu.stream = 8` holds for the thread that says it), and `with gpu.capturing(1):` puts all under a capture.

    Attributes:
        chips: the devices.
        driver: what cuda-bindings shows of them.
        launches: every launch, in order.
        asked: names of the kernels that linears of CPU tensors asked for when a call was prepared, in order.
        loaded: names of the kernels that were loaded, in order.
        images: the binaries that were loaded.
        maps: the tensor maps that were encoded, in order.
        memory: address -> (device, bytes) of what was taken from the driver and not given back.
        dynamic_limit: dynamic shared memory that the last function was allowed.
        refuses: what every launch answers.
        refuses_memory: whether there is no device memory left.
        needs_context: whether a launch fails in a thread where its device's context is not current.
        capture: id of the capture that every stream is under, or `None`.
        free_bytes, total_bytes: memory of each device.
    """

    def __init__(self, *chips: str | Chip) -> None:
        self.chips = [chip if isinstance(chip, Chip) else hardware.CHIPS[chip] for chip in chips]
        self.driver = FakeDriver(self)
        self.launches: list[Launch] = []
        self.asked: list[str] = []
        self.loaded: list[str] = []
        self.images: list[bytes] = []
        self.maps: list[TensorMap] = []
        self.memory: dict[int, tuple[int, int]] = {}
        self.dynamic_limit = 0
        self.refuses = Status.CUDA_SUCCESS
        self.refuses_memory = False
        self.needs_context = False
        self.capture: int | None = None
        self.free_bytes, self.total_bytes = 100 * 10**9, 150 * 10**9
        self._sources: dict[str, KernelSource] = {}
        self._functions: dict[tuple[KernelSource, int], jit.Function] = {}
        self._handles: dict[int, _Loaded] = {}
        self._streams = threading.local()
        self._next_address = 1 << 40
        self._native = {
            name: ctypes.CFUNCTYPE(ctypes.c_int, *native._ARGUMENTS[name])(self._failing_loudly(function))
            for name, function in (("cuLaunchKernelEx", self._launch), ("cuTensorMapEncodeTiled", self._encode))
        }

    @property
    def last(self) -> Launch:
        """The latest launch."""
        return self.launches[-1]

    @property
    def stream(self) -> int:
        """Handle of this thread's current stream; 7 where none was set."""
        handle: int = getattr(self._streams, "handle", 7)
        return handle

    @stream.setter
    def stream(self, handle: int) -> None:
        self._streams.handle = handle

    @contextmanager
    def capturing(self, capture: int) -> Iterator[None]:
        """Put every stream under a capture with this id; what torch takes from the graph's memory lies on the CPU."""
        plain = torch.empty

        def empty(*sizes: Any, device: torch.device, **options: Any) -> torch.Tensor:
            return plain(*sizes, device="cpu" if device.type == "cuda" else device, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            patch.setattr(self, "capture", capture)
            yield

    def chip_of(self, index: int) -> Chip:
        """The chip of a device; CPU tensors, index -1, are on device 0."""
        return self.chips[max(index, 0)]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the place of torch.cuda's devices and of the driver; kernels loaded before are put aside."""
        count = len(self.chips)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: self.chip_of(index).capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", self._properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index=0: (self.free_bytes, self.total_bytes))
        monkeypatch.setattr(torch.version, "cuda", "13.0" if count else None)
        monkeypatch.setattr(module, "load_driver", lambda: self.driver)
        monkeypatch.setattr(module, "_functions", {})
        monkeypatch.setattr(native, "function", self._native.__getitem__)
        for owner, name in ((dispatch, "_device_reason"), (hardware, "of_device"), (tensor_map, "rows")):
            kept = getattr(owner, name)  # facts of a device, which go with the fake
            monkeypatch.setattr(owner, name, functools.lru_cache(**kept.cache_parameters())(kept.__wrapped__))

    def take_cpu_tensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Serve linears of CPU tensors as device 0 would; `install` comes first."""
        prepared.forget()
        reason, first = dispatch._environment_reason, torch.device("cuda", 0)
        monkeypatch.setattr(dispatch, "_environment_reason", lambda dtype, device: reason(dtype, first))
        monkeypatch.setattr(jit, "get", self.get)
        monkeypatch.setattr(workspace, "_capture_id", lambda stream: self.capture)
        for name, value in vars(workspace.Workspace()).items():
            if isinstance(value, dict | list):
                monkeypatch.setattr(workspace.SHARED, name, value)
        monkeypatch.setattr(current, "stream", lambda index: self.stream)
        monkeypatch.setattr(current, "capturing", lambda: self.capture is not None)
        monkeypatch.setattr(current, "empty", _zeros)

    def get(self, source: KernelSource, index: int) -> jit.Function:
        """Return a kernel that is loaded, but was not compiled: `jit.get` after `take_cpu_tensors`."""
        self.asked.append(source.name)
        found = self._functions.get((source, index))
        if found is None:
            self.knows(source)
            found = self._functions[source, index] = jit.Function(source, index, uncompiled(source))
        return found

    def allocate(self, nbytes: int, device: int) -> tuple[Status, int]:
        """Take memory: for the driver."""
        if self.refuses_memory:
            return Status.CUDA_ERROR_OUT_OF_MEMORY, 0
        address, self._next_address = self._next_address, self._next_address + (1 << 40)
        self.memory[address] = (device, nbytes)
        return Status.CUDA_SUCCESS, address

    def knows(self, *sources: KernelSource) -> None:
        """Be told of kernels that will be loaded: the driver hears only their names. `get` needs no telling."""
        self._sources.update((source.name, source) for source in sources)

    def handle_of(self, name: str, device: int) -> int:
        """Return a handle of the kernel that is being loaded: for the driver."""
        self.loaded.append(name)
        handle = 2**46 + 16 * len(self._handles)
        self._handles[handle] = _Loaded(self._sources[name], device)
        return handle

    def _failing_loudly(self, function: Callable[..., int]) -> Callable[..., int]:
        """Turn an exception into a status, since ctypes would drop it and answer success."""

        def called(*arguments: Any) -> int:
            try:
                return function(*arguments)
            except Exception as error:
                self.driver.failure = repr(error)
                return Status.CUDA_ERROR_UNKNOWN

        return called

    def _properties(self, index: int = 0) -> SimpleNamespace:
        chip = self.chip_of(index)
        return SimpleNamespace(
            name=chip.name,
            major=chip.capability[0],
            minor=chip.capability[1],
            multi_processor_count=chip.sms,
            shared_memory_per_block_optin=chip.shared_bytes,
            total_memory=chip.memory_bytes,
            L2_cache_size=chip.l2_bytes,
            memory_clock_rate=0,  # a virtual GPU reports none
            memory_bus_width=0,
        )

    def _launch(self, config: int, function: int, parameters: int, extra: int | None) -> int:
        loaded = self._handles[function]
        assert extra is None
        if self.refuses:
            return self.refuses
        if self.needs_context and self.driver.context != 1000 + loaded.device:
            return Status.CUDA_ERROR_INVALID_CONTEXT
        *shape, shared_bytes = struct.unpack("<7I", ctypes.string_at(config, 28))
        stream, attributes, count = struct.unpack("<2QI", ctypes.string_at(config + 32, 20))
        found = {}
        for start in range(attributes, attributes + 72 * count, 72):
            (which,) = struct.unpack("<i", ctypes.string_at(start, 4))
            found[which] = struct.unpack("<3I", ctypes.string_at(start + 8, 12))
        assert found.keys() <= {_CLUSTER, _PROGRAMMATIC} and len(found) == count
        self.launches.append(
            Launch(
                kernel=loaded.source.name,
                device=loaded.device,
                stream=stream,
                grid=tuple(shape[:3]),
                block=tuple(shape[3:]),
                shared_bytes=shared_bytes,
                arguments=dict(self._arguments(loaded.source, parameters)),
                programmatic=found.get(_PROGRAMMATIC, (0,))[0] == 1,
                cluster=found.get(_CLUSTER),
            )
        )
        return Status.CUDA_SUCCESS

    def _arguments(self, source: KernelSource, parameters: int) -> Iterator[tuple[str, Any]]:
        """Follow the addresses of the arguments, as the driver does."""
        names = argument_names(source)
        addresses = (ctypes.c_uint64 * len(names)).from_address(parameters)
        for name, letter, address in zip(names, source.arguments, addresses, strict=True):
            if letter == "T" and not name.endswith("map"):
                yield name, ctypes.string_at(address, 128)
            elif letter == "T":
                (number,) = struct.unpack("<Q", ctypes.string_at(address, 8))
                yield name, self.maps[number]
            else:
                (value,) = struct.unpack("@" + letter, ctypes.string_at(address, struct.calcsize("@" + letter)))
                yield name, value

    def _encode(self, place: int, element: int, rank: int, address: int | None, *rest: Any) -> int:
        sizes, strides, box, steps, *modes = rest
        assert rank == 2 and place % 64 == 0
        if not address:
            return Status.CUDA_ERROR_INVALID_VALUE

        def read(start: int, letters: str) -> Any:
            return struct.unpack(letters, ctypes.string_at(start, struct.calcsize(letters)))

        ends = read(sizes, "<2Q"), read(strides, "<Q")
        ctypes.memset(place, 0, 128)
        ctypes.memmove(place, struct.pack("<Q", len(self.maps)), 8)
        self.maps.append(TensorMap(element, address, *ends, read(box, "<2I"), read(steps, "<2I"), tuple(modes)))
        return Status.CUDA_SUCCESS


def argument_names(source: KernelSource) -> list[str]:
    """Return the names of a kernel's arguments, read from its header."""
    text = re.sub(r"//.*", "", source.files()[source.header])
    match = re.search(r"TERSOR_ENTRY\s*\((.*?)\)\s*\{", text, re.DOTALL)
    assert match, source.header
    return [re.findall(r"\w+", argument)[-1] for argument in match[1].split(",")]


def uncompiled(source: KernelSource) -> nvrtc.Binary:
    """Return a binary for a device that is not there."""
    return nvrtc.Binary(name=source.name, arch="compute_00", data=source.name.encode(), log="")


def _zeros(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype).fill_(0)


def pretended(default: str) -> Any:
    """Return a fixture: CPU tensors pass for those of a GPU, or of the chip a test names by an indirect parameter."""

    @pytest.fixture
    def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
        fake = FakeGpu(getattr(request, "param", default))
        fake.install(monkeypatch)
        fake.take_cpu_tensors(monkeypatch)
        return fake

    return gpu
