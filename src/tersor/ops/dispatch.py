"""Who serves a linear, and why? One decision, made from the scheme, the dtype and the device, that can be asked."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from tersor import hardware, settings
from tersor.errors import InputError, UnsupportedError, did_you_mean
from tersor.formats import Scheme
from tersor.hardware import Chip
from tersor.kernels import tune
from tersor.kernels.tune import sm80
from tersor.layouts import STREAM, decode_groups, scales, tiles
from tersor.ops import invariance

if TYPE_CHECKING:
    from tersor.kernels.jit import KernelSource

ACTIVATIONS_16BIT = "16bit"
ACTIVATIONS_FP8 = "fp8"
ACTIVATIONS = (ACTIVATIONS_16BIT, ACTIVATIONS_FP8)
"""What a linear multiplies with: activations as they come, or quantised to e4m3 with one scale a token."""
FP8_LAYOUT = f"tiles_{decode_groups.FP8}"

FUSED = "fused"
DEQUANTIZE = "dequantize + cuBLAS"
REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Reason:
    """Who serves a call (`fused`, `dequantize + cuBLAS` or `reference`) and why, in one sentence."""

    kernel: str
    why: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Who serves a call, and how a fused kernel is to run; the sentence is made when it is asked for.

    Attributes:
        kernel: `fused`, `dequantize + cuBLAS` or `reference`.
        config: of a fused kernel, else `None`.
        template, facts: the reason, and what stands in its braces.
        tokens: that one launch takes, where there are more; else 0.
    """

    kernel: str
    config: tune.LinearConfig | None
    template: str
    facts: tuple[object, ...] = ()
    tokens: int = 0

    @property
    def why(self) -> str:
        """The reason in one sentence."""
        return self.template.format(*self.facts)


def target_name(dtype: torch.dtype) -> str | None:
    """Return the decode target for activations of `dtype`, or `None` where the kernels have none."""
    return next((name for name, known in decode_groups.TARGETS.items() if known == dtype), None)


def unsupported_reason(scheme: Scheme, dtype: torch.dtype, device: torch.device) -> str:
    """Return why no kernel can serve this scheme, dtype and device, or an empty string when one can."""
    if _reference_wanted():
        return "TERSOR_KERNEL is set to reference"
    if device.type != "cuda":
        return f"kernels need a CUDA device, this is {device.type}"
    unsupported = _no_decode(scheme, dtype)
    if unsupported:
        return unsupported
    return _device_unsupported_reason(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _reference_wanted() -> bool:
    """Read the environment, which costs as much as a launch, once."""
    return settings.get("TERSOR_KERNEL") == "reference"


def forget() -> None:
    """Read TERSOR_KERNEL anew at the next question."""
    _reference_wanted.cache_clear()


@functools.cache
def _no_decode(scheme: Scheme, dtype: torch.dtype) -> str:
    """Return why no kernel decodes this scheme for activations of `dtype`, on whatever GPU, or an empty string."""
    target = target_name(dtype)
    if target not in decode_groups.PAIR_TARGETS:
        return f"kernels take float16 and bfloat16 activations, not {dtype}"
    unsupported = decode_groups.supported(scheme.format, target)
    if unsupported:
        return unsupported
    if scheme.group_size is not None and scheme.group_size % 16:
        return f"group size {scheme.group_size} is not a multiple of 16"
    return ""


@functools.cache
def e4m3_unsupported_reason(scheme: Scheme) -> str:
    """Return why weights of this scheme cannot be multiplied with 8-bit activations, or an empty string."""
    unsupported = decode_groups.supported(scheme.format, tiles.LAYOUTS[FP8_LAYOUT])
    if unsupported:
        return unsupported
    if scheme.group_size is not None and scheme.group_size % 32:
        return f"group size {scheme.group_size} is not a multiple of 32"
    return ""


@functools.cache
def _device_unsupported_reason(index: int) -> str:
    from tersor.kernels.jit import arch_for

    try:
        arch_for(torch.cuda.get_device_capability(index))
    except UnsupportedError as error:
        return str(error)
    return ""


def check_activations(activations: str) -> None:
    """Raise InputError where there is no such kind of activations."""
    if activations not in ACTIVATIONS:
        near = did_you_mean(activations, ACTIVATIONS)
        raise InputError(f"activations {activations!r}{near}: use {' or '.join(ACTIVATIONS)}")


def preferred_layout(
    scheme: Scheme, dtype: torch.dtype, device: torch.device, activations: str = ACTIVATIONS_16BIT
) -> str:
    """Return the layout in which a weight should lie to be multiplied with `dtype` activations on `device`.

    Args:
        scheme: of the weight.
        dtype, device: of the activations, as they come.
        activations: `16bit`, or `fp8`: the operator quantises them to e4m3, one scale a token, before it multiplies.

    Raises:
        InputError: no such kind of activations.
        UnsupportedError: weights of this scheme cannot be multiplied with 8-bit activations.
    """
    if activations == ACTIVATIONS_FP8:
        why = e4m3_unsupported_reason(scheme)
        if why:
            raise UnsupportedError(f"activations fp8 with weights in {scheme.key()}: {why}")
        return FP8_LAYOUT
    check_activations(activations)
    if unsupported_reason(scheme, dtype, device):
        return STREAM
    return f"tiles_{target_name(dtype)}"


def decide(
    scheme: Scheme,
    layout: str,
    shape: tuple[int, int],
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool = True,
    batch_invariant: bool = False,
) -> Decision:
    """Decide who serves a product: the one place that does, for calls and for `explain`.

    Args:
        scheme, layout, shape: of the weight; shape is (OC, IC).
        n: tokens.
        dtype, device: of the activations.
        aligned: rows of activations start on 16 bytes.
        batch_invariant: a token's result must not depend on the other tokens.
    """
    if layout == FP8_LAYOUT:
        return _decide_fp8(scheme, shape, n, dtype, device, batch_invariant)
    why = unsupported_reason(scheme, dtype, device)
    if why:
        return Decision(REFERENCE, None, "{}", (why,))
    if layout == STREAM:
        return Decision(REFERENCE, None, "the weight lies in the stored stream, not in kernel tiles")
    if tiles.LAYOUTS[layout] != target_name(dtype):
        facts = (tiles.LAYOUTS[layout], dtype)
        return Decision(REFERENCE, None, "the weight is laid out for {} activations, these are {}", facts)
    gpu = chip(device)
    limit = sm80.TOKENS
    problem = problem_of(scheme, shape, n, aligned=aligned, batch_invariant=batch_invariant)
    if batch_invariant:
        one = tune.launched(problem, gpu)
        config = tune.choose(one, gpu)
        sentence = "batch-invariant linears take one order of sums for any number of tokens; {}"
        return Decision(FUSED, config, sentence, (config,), one.n if one.n < n else 0)
    if tune.fused(problem, gpu):
        config = tune.choose(problem, gpu)
        if n <= limit:
            return Decision(FUSED, config, "{} tokens are at most {}; {}", (n, limit, config))
        sentence = "the sm90 schedule takes any number of tokens whose rows start on 16 bytes; {}"
        return Decision(FUSED, config, sentence, (config,))
    if gpu.capability == (9, 0):
        sentence = "{} tokens are more than {} and rows do not start on 16 bytes"
        return Decision(DEQUANTIZE, None, sentence, (n, limit))
    sentence = "{} tokens are more than {} on compute capability {}.{}"
    return Decision(DEQUANTIZE, None, sentence, (n, limit, *gpu.capability))


def _decide_fp8(
    scheme: Scheme, shape: tuple[int, int], n: int, dtype: torch.dtype, device: torch.device, batch_invariant: bool
) -> Decision:
    if _reference_wanted():
        return Decision(REFERENCE, None, "TERSOR_KERNEL is set to reference")
    if device.type != "cuda":
        return Decision(REFERENCE, None, "kernels need a CUDA device, this is {}", (device.type,))
    if target_name(dtype) not in decode_groups.PAIR_TARGETS:
        return Decision(REFERENCE, None, "kernels take float16 and bfloat16 activations, not {}", (dtype,))
    gpu = chip(device)
    if gpu.capability != (9, 0):
        facts = gpu.capability
        return Decision(REFERENCE, None, "8-bit activations need compute capability 9.0, this is {}.{}", facts)
    config = tune.choose(problem_of(scheme, shape, n, activation_bits=8, batch_invariant=batch_invariant), gpu)
    return Decision(FUSED, config, "activations are quantised to e4m3; {}", (config,))


def problem_of(
    scheme: Scheme,
    shape: tuple[int, int],
    n: int,
    *,
    aligned: bool = True,
    activation_bits: int = 16,
    batch_invariant: bool = False,
) -> tune.LinearProblem:
    """Return the problem that n tokens make with a weight of shape (OC, IC)."""
    return tune.LinearProblem(
        oc=shape[0],
        ic=shape[1],
        n=n,
        bits=scheme.format.bits,
        scale_groups=tiles.scales_in_block(scheme.group_size),
        scale_bytes=scales.row_bytes(scheme),
        aligned=aligned,
        activation_bits=activation_bits,
        batch_invariant=batch_invariant,
    )


def explain(
    scheme: Scheme,
    oc: int,
    ic: int,
    n: int,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cuda",
    activations: str = ACTIVATIONS_16BIT,
) -> Reason:
    """Say who would serve y[n, oc] = x[n, ic] @ W^T with W in `scheme`, in its preferred layout, and why.

    Raises:
        FormatError: the scheme does not fit `ic`.
        UnsupportedError: weights of this scheme cannot be multiplied with such activations.
    """
    scheme.groups(ic)
    place = torch.device(device)
    if place.type == "cuda" and not hardware.cuda_available():
        return Reason(REFERENCE, "torch sees no CUDA device")
    if n == 0 or oc == 0:
        return Reason(REFERENCE, "there is nothing to compute")
    layout = preferred_layout(scheme, dtype, place, activations)
    decision = decide(scheme, layout, (oc, ic), n, dtype, place, ic % 8 == 0, invariance.batch_invariant())
    return Reason(decision.kernel, decision.why)


def chip(device: torch.device) -> Chip:
    """Return the facts of a CUDA device that tile choice needs."""
    return _chip(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    known = next((chip for name, chip in hardware.CHIPS.items() if properties.name.startswith(name)), None)
    if known is None:
        capability = (properties.major, properties.minor)
        near = [chip for chip in hardware.CHIPS.values() if chip.capability <= capability]
        known = max(near, key=lambda chip: chip.capability)
    return replace(
        known,
        name=properties.name,
        capability=(properties.major, properties.minor),
        sms=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def kernels_for(
    scheme: Scheme,
    dtype: torch.dtype,
    chip: Chip,
    activations: str = ACTIVATIONS_16BIT,
    gated: bool = False,
) -> list[KernelSource]:
    """Return the kernels that linears of this scheme and dtype can ask for on a chip; none where they cannot run.

    Those of the batch-invariant mode are not among them.
    """
    from tersor.kernels import dense

    target = target_name(dtype)
    if activations == ACTIVATIONS_FP8:
        if target not in decode_groups.PAIR_TARGETS or e4m3_unsupported_reason(scheme):
            return []
        return list(dense.fp8_sources(scheme, target, chip, gated))
    if target is None or _no_decode(scheme, dtype):
        return []
    return list(dense.sources(scheme, target, chip, gated))
