"""What a linear passes to its kernel, by the names in the kernel's own header, on a device that only remembers."""

from __future__ import annotations

import pytest
import torch
from helpers.fakes import FakeGpu, Launch

from tersor import formats, ops
from tersor.compress import quantize_rtn
from tersor.errors import KernelError
from tersor.layouts import PackedWeight
from tersor.ops import dispatch, workspace

OC, IC, N = 256, 1024, 3
HALF = torch.float16


@pytest.fixture(params=["NVIDIA A100", "NVIDIA H200"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu(request.param)
    fake.install(monkeypatch)
    fake.take_cpu_tensors(monkeypatch)
    for name in ("_streams", "_captures", "_stock"):
        monkeypatch.setattr(workspace, name, {})
    return fake


def packed(layout: str = "tiles_float16") -> PackedWeight:
    scheme = formats.get_scheme("fp6_e3m2")
    values = torch.randn(OC, IC, generator=torch.Generator().manual_seed(0))
    return PackedWeight.from_encoded(quantize_rtn(values, scheme), scheme).to_layout(layout)


def activations_of(launch: Launch) -> tuple[int, int, int, int]:
    """Address, tokens, channels and elements from row to row, passed one by one or as a map."""
    if "x_map" not in launch.arguments:
        return launch["x"], launch["n"], launch["ic"], launch["x_stride"]
    ic, n = launch["x_map"].sizes
    width = 1 if launch["x_map"].element == 0 else 2
    return launch["x_map"].address, n, ic, launch["x_map"].strides[0] // width


def test_every_tensor_and_size_arrives_under_its_name(gpu: FakeGpu) -> None:
    weight, bias = packed(), torch.zeros(OC, dtype=HALF)
    x, residual = torch.zeros(N, IC + 8, dtype=HALF)[:, :IC], torch.zeros(N, OC, dtype=HALF)
    y = ops.linear(x, weight, bias, residual=residual)
    (launch,) = gpu.launches
    pointers = {name: launch[name] for name in ("weight", "scale", "bias", "residual", "y")}
    tensors = {"weight": weight.data, "scale": weight.scale, "bias": bias, "residual": residual, "y": y}
    assert pointers == {name: tensor.data_ptr() for name, tensor in tensors.items()}
    assert activations_of(launch) == (x.data_ptr(), N, IC, IC + 8)
    assert (launch["oc"], launch["ic"], launch["n"]) == (OC, IC, N)
    assert launch.kernel == gpu.loaded[0] and "fp6_e3m2_float16" in launch.kernel
    assert (launch.stream, launch.device) == (7, -1)


def test_what_is_not_there_is_null(gpu: FakeGpu) -> None:
    ops.linear(torch.zeros(N, IC, dtype=HALF), packed())
    assert (gpu.launches[-1]["bias"], gpu.launches[-1]["residual"]) == (0, 0)


def test_split_sums_lie_in_memory_of_the_driver(gpu: FakeGpu) -> None:
    weight, x = packed(), torch.zeros(N, IC, dtype=HALF)
    ops.linear(x, weight)
    gpu.stream = 8
    ops.linear(x, weight)
    borrowing = [launch for launch in gpu.launches if launch["partial"]]
    assert len({launch["partial"] for launch in borrowing}) == len(gpu.memory)
    for launch in borrowing:
        (address, (_, nbytes)), *_ = [
            item for item in gpu.memory.items() if 0 <= launch["partial"] - item[0] < item[1][1]
        ]
        assert address <= launch["arrived"] < address + nbytes
    assert borrowing or gpu.chips[0].capability == (9, 0), "an A100 splits so small a product"


def test_without_memory_a_call_fails_and_says_so(gpu: FakeGpu) -> None:
    gpu.refuses_memory = True
    with gpu.capturing(1):  # a graph's counters always come from the driver
        if gpu.chips[0].capability == (9, 0):
            ops.linear(torch.zeros(N, IC, dtype=HALF), packed())
        else:
            with pytest.raises((KernelError, AssertionError, RuntimeError)):
                ops.linear(torch.zeros(N, IC, dtype=HALF), packed())


def test_activations_of_8_bits_are_quantised_by_a_kernel_of_their_own(gpu: FakeGpu) -> None:
    if gpu.chips[0].capability != (9, 0):
        pytest.skip("kernels for 8-bit activations are for sm_90")
    x = torch.zeros(N, IC, dtype=HALF)
    ops.linear(x, packed(dispatch.FP8_LAYOUT))
    quantise, multiply = gpu.launches
    assert (quantise["x"], quantise["stride"], quantise["ic"]) == (x.data_ptr(), IC, IC)
    assert activations_of(multiply) == (quantise["codes"], N, IC, quantise["codes_stride"])
    assert multiply["x_scale"] == quantise["scales"] == quantise["codes"] + N * quantise["codes_stride"]
