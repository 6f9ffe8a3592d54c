"""Every element format and every kind of scale through the kernels: codes bit for bit, products against float64."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tersor import formats, hardware, ops
from tersor.compress import Encoded
from tersor.hardware import Chip
from tersor.kernels import dense as family
from tersor.kernels import jit, tune
from tersor.layouts import PackedWeight, decode_groups
from tersor.layouts.packing import LAYOUTS, Packing
from tersor.ops import dispatch, prepared

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float16, torch.bfloat16)
GROUPED = ((128, "float16"), (64, "float32"), (32, "e8m0"), (128, "bfloat16"), (16, "bfloat16"))
TOKENS = (5, 70)
OC, IC = 200, 640


def schemes(name: str) -> list[formats.Scheme]:
    """A format with one scale a row and two kinds of scales in groups, by turns; some formats with every kind.

    Zero points and e8m0 do not go together.
    """
    kinds = [kind for kind in GROUPED if not (name.startswith("uint") and kind[1] == "e8m0")]
    if name not in ("fp6_e3m2", "int8", "uint4"):
        first = formats.names().index(name)
        kinds = [kinds[(first + turn) % len(kinds)] for turn in (0, 2)]
    return [formats.get_scheme(name, group_size, dtype) for group_size, dtype in ((None, "float16"), *kinds)]


def chips() -> dict[str, Chip]:
    """The GPU as it is, and as if it were of the generation that the sm80 schedule is for."""
    chip = hardware.of_device(0)
    known = {"sm80": replace(chip, capability=(8, 0))}
    if chip.capability == (9, 0):
        known["sm90"] = chip
    return known


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compile side by side what the tests below would compile one after the other."""
    sources = {}
    for scheme in (scheme for name in formats.names() for scheme in schemes(name)):
        for target in decode_groups.PAIR_TARGETS:
            for chip in chips().values():
                for n in TOKENS:
                    problem = family.problem_of(scheme, (OC, IC), n)
                    if tune.fused(problem, chip):
                        sources[family.fused_source(Packing.of(scheme, target), target, tune.choose(problem, chip))] = (
                            None
                        )
            sources[family.dequantize_source(Packing.of(scheme, target))] = None
            sources[family.epilogue_source(Packing.of(scheme, target))] = None
    chip = hardware.of_device(0)
    jit.compile_many(list(sources), jit.arch_for(chip.capability), os.cpu_count())


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Leave no prepared call behind that a test made as if the GPU were another."""
    prepared.forget()
    yield
    prepared.forget()


def random_weight(scheme: formats.Scheme) -> tuple[PackedWeight, torch.Tensor]:
    """A weight [OC, IC] of random codes, every code among them, and float32 decode(code) - zero point."""
    generator = torch.Generator().manual_seed(scheme.format.bits)
    fmt = scheme.format
    codes = torch.randint(0, 1 << fmt.bits, (OC, IC), dtype=torch.uint8, generator=generator)
    codes.view(-1)[: 1 << fmt.bits] = torch.arange(1 << fmt.bits, dtype=torch.uint8)
    groups = scheme.groups(IC)
    zero_point = None
    values = fmt.decode(codes)
    if scheme.has_zero_point:
        zero_point = torch.randint(0, 1 << fmt.bits, (OC, groups), dtype=torch.uint8, generator=generator)
        values -= zero_point.repeat_interleave(IC // groups, dim=1)
    wanted = (torch.rand(OC, groups, generator=generator) + 0.05) / fmt.max
    weight = PackedWeight.from_encoded(
        Encoded(scheme, codes, formats.store_scales(wanted, scheme), zero_point, 0.0, 0.0)
    )
    on_gpu = PackedWeight(
        scheme,
        weight.shape,
        weight.data.cuda(),
        weight.scale.cuda(),
        None if zero_point is None else zero_point.cuda(),
    )
    return on_gpu, values.cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", formats.names())
def test_dequantize_is_exact_for_every_code(name: str, dtype: torch.dtype) -> None:
    """Without scales the very bits of the decoded value; with them the value rounded once."""
    device = torch.device("cuda", 0)
    for scheme in schemes(name):
        weight, values = random_weight(scheme)
        layout = ops.preferred_layout(scheme, dtype, device)
        target = LAYOUTS[layout]
        packed = weight.to_layout(layout)
        exponent = decode_groups.decode_group(scheme.format, target).exponent
        scratch = torch.full((OC, IC), float("nan"), dtype=dtype, device=device)
        family.launch_dequantize(
            jit.get(family.dequantize_source(Packing.of(scheme, target)), device),
            torch.cuda.current_stream(device).cuda_stream,
            weight=packed.data.data_ptr(),
            scale=packed.scale.data_ptr(),
            scratch=scratch.data_ptr(),
            first_block=0,
            oc=OC,
            ic=IC,
            factor=math.ldexp(1.0, exponent),
        )
        if scheme.group_size is None:
            expected = (values * 2.0**-exponent).to(dtype)
            assert torch.equal(scratch.view(torch.int16), expected.view(torch.int16)), scheme.key()
        else:
            assert torch.equal(scratch, weight.dequantize(dtype)), scheme.key()


@pytest.mark.parametrize("schedule", ["sm80", "sm90"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", formats.names())
def test_products_of_every_type(name: str, dtype: torch.dtype, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = chips().get(schedule)
    if chip is None:
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setattr(hardware, "of_device", lambda index: chip)
    generator = torch.Generator(device="cuda").manual_seed(3)
    for scheme in schemes(name):
        weight, _ = random_weight(scheme)
        packed = weight.to_layout(ops.preferred_layout(scheme, dtype, weight.data.device))
        for n in TOKENS:
            x = torch.randn(n, IC, dtype=dtype, device="cuda", generator=generator)
            bias = torch.randn(OC, dtype=dtype, device="cuda", generator=generator)
            decision = dispatch.decide(scheme, packed.layout, (OC, IC), n, dtype, x.device)
            assert decision.kernel != dispatch.REFERENCE, decision.why
            y = ops.linear(x, packed, bias)
            fused = decision.config is not None
            assert fused == (schedule == "sm90" or n <= 64)
            assert decision.config is None or decision.config.schedule == schedule
            rounded = scheme.group_size is not None and not fused
            exact_weight = weight.dequantize(dtype if rounded else torch.float32).double()
            exact = x.double() @ exact_weight.T + bias.double()
            allowed = formats.product_tolerance(x.double(), exact_weight, dtype)
            allowed += bias.abs().double() * torch.finfo(dtype).eps
            assert torch.isfinite(y).all(), (scheme.key(), n)
            worst = float(((y.double() - exact).abs() / allowed).max())
            assert worst <= 1, f"{scheme.key()}, {n} tokens: the error is {worst:.2f} of what is allowed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "group_size"), [("uint4", None), ("uint4", 80), ("uint8", 128), ("uint3", 320)])
def test_odd_sizes_with_zero_points(name: str, group_size: int | None, dtype: torch.dtype) -> None:
    """Rows beyond the last unit and channels beyond the last block have zero points too; none may leak."""
    scheme = formats.get_scheme(name, group_size)
    for oc, ic in ((1, 960), (63, 1920), (65, 320 if group_size else 37)):
        if group_size is not None and ic % group_size:
            ic = 640
        generator = torch.Generator().manual_seed(ic)
        codes = torch.randint(0, 1 << scheme.format.bits, (oc, ic), dtype=torch.uint8, generator=generator)
        groups = scheme.groups(ic)
        zero_point = torch.randint(0, 1 << scheme.format.bits, (oc, groups), dtype=torch.uint8, generator=generator)
        scale = formats.store_scales(torch.rand(oc, groups, generator=generator) * 0.02 + 1e-3, scheme)
        stored = PackedWeight.from_encoded(Encoded(scheme, codes, scale, zero_point, 0.0, 0.0))
        weight = PackedWeight(scheme, (oc, ic), stored.data.cuda(), scale.cuda(), zero_point.cuda())
        packed = weight.to_layout(ops.preferred_layout(scheme, dtype, weight.data.device))
        back = packed.to_layout("stream")
        assert back.zero_point is not None
        assert torch.equal(back.zero_point, zero_point.cuda())
        assert torch.equal(back.data, weight.data)
        for n in (1, 33, 64):
            x = torch.randn(n, ic, dtype=dtype, device="cuda")
            y = ops.linear(x, packed)
            exact_weight = weight.dequantize().double()
            allowed = formats.product_tolerance(x.double(), exact_weight, dtype)
            assert (((y.double() - x.double() @ exact_weight.T).abs()) <= allowed).all()
