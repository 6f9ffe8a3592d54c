"""Who serves a linear, and why? One decision, made from the scheme, the dtype and the device, that can be asked."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tersor import hardware
from tersor.errors import UnsupportedError
from tersor.formats import EIGHT_BIT, Activations, Scheme
from tersor.kernels import tune
from tersor.kernels.tune import LinearProblem, sm80
from tersor.layouts import STREAM, packing
from tersor.layouts.packing import LAYOUTS, Packing, activations_of, target_of
from tersor.ops import mode

_log = logging.getLogger("tersor")

FUSED = "fused"
DEQUANTIZE = "dequantize + cuBLAS"
DECOMPRESS = "decompress + cuBLAS"
REFERENCE = "reference"

E4M3_LAYOUT = f"tiles_{target_of(Activations.E4M3, torch.float16)}"
"""The layout of weights that are multiplied with activations quantised to e4m3."""
INT8_LAYOUT = f"tiles_{target_of(Activations.INT8, torch.float16)}"
"""The layout of weights that are multiplied with activations quantised to int8."""
INT8_GROUPS_LAYOUT = f"tiles_{target_of(Activations.INT8_GROUPS, torch.float16)}"
"""The same where those have one scale a token and group."""
MOST_WHOLE_CHANNELS = 1 << 17
"""Input channels whose products of int8 32 bits certainly hold the sum of, where one scale a row leaves it whole."""


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
        config: how a fused kernel runs; `None` where another serves.
        template, facts: the reason, and what stands in its braces.
        tokens: most tokens of one launch, where a call takes several launches; else 0.
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


def unsupported_reason(scheme: Scheme, dtype: torch.dtype, device: torch.device) -> str:
    """Return why no kernel can serve a scheme with activations as they come, or an empty string when one can.

    Args:
        scheme: of the weight.
        dtype, device: of the activations.
    """
    return _environment_reason(dtype, device) or _decode_reason(scheme, dtype) or _device_reason(_index(device))


def environment_reason(dtype: torch.dtype, device: torch.device) -> str:
    """Return why no kernel serves activations of a dtype on a device, whatever is asked of it, or an empty string."""
    return _environment_reason(dtype, device) or _device_reason(_index(device))


def _environment_reason(dtype: torch.dtype, device: torch.device) -> str:
    if mode.current().reference:
        return "TERSOR_KERNEL is set to reference"
    if device.type != "cuda":
        return f"kernels need a CUDA device, this is {device.type}"
    if dtype not in packing.NATIVE:
        return f"kernels take float16 and bfloat16 activations, not {dtype}"
    return ""


@functools.cache
def _decode_reason(scheme: Scheme, dtype: torch.dtype) -> str:
    """Return why no kernel decodes a scheme for a dtype that kernels take, on whatever GPU, or an empty string."""
    target = target_of(Activations.NATIVE, dtype)
    assert target is not None
    return packing.unsupported_reason(scheme, target)


@functools.cache
def _device_reason(index: int) -> str:
    from tersor.kernels.jit import arch_for

    try:
        arch_for(torch.cuda.get_device_capability(index))
    except UnsupportedError as error:
        return str(error)
    return ""


def kernel_chip(device: torch.device) -> hardware.Chip | None:
    """Return the GPU whose kernels serve tensors on a device; `None` where the reference serves all of them.

    Args:
        device: of the tensors.
    """
    if _environment_reason(torch.float16, device):
        return None
    index = _index(device)
    return None if _device_reason(index) else hardware.of_device(index)


def preferred_layout(
    scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device,
    activations: Activations | str = Activations.NATIVE,
) -> str:
    """Return the layout in which a weight should lie to be multiplied with `dtype` activations on `device`.

    Args:
        scheme: of the weight.
        dtype, device: of the activations, as they come.
        activations: `16bit`, or `fp8`, `int8` or `int8:g128`: the operator quantises them before it multiplies.

    Raises:
        InputError: no such activations.
        UnsupportedError: weights of this scheme cannot be multiplied with such activations.
    """
    chosen, scheme = Activations.of(activations), scheme.dense
    if chosen is Activations.NATIVE and environment_reason(dtype, device):
        return STREAM
    return kernel_layout(scheme, dtype, chosen)


def activations_for(
    value: Activations | str, schemes: Iterable[Scheme], chip: hardware.Chip | None = None
) -> Activations:
    """Return what a name of activations stands for beside weights of all these schemes.

    `8bit` is int8 with a scale a token where all weights are integers that kernels multiply with it, since that takes
    about as long as e4m3 and loses half as much (docs/quality.md), and e4m3 where all have kernels with that. Other
    names stand for themselves; on a GPU that has no kernel with them the logger `tersor` is told, once.

    Args:
        value: `16bit`, `8bit`, `fp8`, `int8` or `int8:g128`.
        schemes: of the weights that are multiplied.
        chip: the GPU; `None` where the reference serves all calls, or which one is not known yet.

    Raises:
        InputError: no such activations.
        UnsupportedError: of `8bit`, that weights take neither, or that a GPU has no kernel with either.
    """
    lacks = ""
    if chip is not None and chip.capability != (9, 0):
        lacks = "kernels with them need compute capability 9.0, and {} has {}.{}".format(chip.name, *chip.capability)
    if Activations.check(value) != EIGHT_BIT:
        named = Activations.of(value)
        if lacks and named is not Activations.NATIVE:
            _warn(f"activations {named}: {lacks}: the reference multiplies, slowly; leave them 16bit")
        return named
    if lacks:
        raise UnsupportedError(f"activations {EIGHT_BIT}: {lacks}: leave them 16bit")
    given, reasons = list(dict.fromkeys(scheme.dense for scheme in schemes)), []
    for chosen in (Activations.INT8, Activations.E4M3):
        refused = ((one, packing.unsupported_reason(one, packing.BYTEWISE[chosen])) for one in given)
        why = next((f"{chosen} not with {one.key()} ({reason})" for one, reason in refused if reason), "")
        if not why:
            return chosen
        reasons.append(why)
    raise UnsupportedError(f"activations {EIGHT_BIT} suit no weights as these: {', '.join(reasons)}: leave them 16bit")


@functools.cache
def _warn(line: str) -> None:
    """Say a line, once."""
    _log.warning("%s", line)


def kernel_layout(scheme: Scheme, dtype: torch.dtype, activations: Activations) -> str:
    """Return what `preferred_layout` does for a GPU that has kernels, in whatever mode.

    Raises:
        UnsupportedError: as there.
    """
    if activations is not Activations.NATIVE:
        bytewise = packing.BYTEWISE[activations]
        why = packing.unsupported_reason(scheme, bytewise)
        if why:
            raise UnsupportedError(f"activations {activations} with weights in {scheme.key()}: {why}")
        return f"tiles_{bytewise}"
    target = target_of(activations, dtype)
    return STREAM if target is None or _decode_reason(scheme, dtype) else f"tiles_{target}"


def decide(
    scheme: Scheme,
    layout: str,
    shape: tuple[int, int],
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool = True,
) -> Decision:
    """Decide who serves a product in the current mode: the one place that does, for calls and for `explain`.

    Args:
        scheme, layout, shape: of the weight; shape is (OC, IC).
        n: tokens.
        dtype, device: of the activations.
        aligned: whether rows of activations start on 16 bytes.
    """
    why = _environment_reason(dtype, device)
    if why:
        return Decision(REFERENCE, None, "{}", (why,))
    activations = activations_of(layout)
    if activations is not Activations.NATIVE:
        return _decide_bytewise(scheme, layout, activations, shape, n, device)
    why = _decode_reason(scheme, dtype) or _device_reason(_index(device))
    if why:
        return Decision(REFERENCE, None, "{}", (why,))
    if layout == STREAM:
        return Decision(REFERENCE, None, "the weight lies in the stored stream, not in kernel tiles")
    if LAYOUTS[layout] != target_of(Activations.NATIVE, dtype):
        return Decision(
            REFERENCE, None, "the weight is laid out for {} activations, these are {}", (LAYOUTS[layout], dtype)
        )
    gpu, limit = hardware.of_device(_index(device)), sm80.TOKENS
    invariant = mode.current().batch_invariant
    problem = LinearProblem.of(
        Packing.of(scheme, LAYOUTS[layout]), shape, n, aligned=aligned, batch_invariant=invariant
    )
    if invariant:
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


def _decide_bytewise(
    scheme: Scheme, layout: str, activations: Activations, shape: tuple[int, int], n: int, device: torch.device
) -> Decision:
    gpu = hardware.of_device(_index(device))
    if gpu.capability != (9, 0):
        facts = gpu.capability
        return Decision(REFERENCE, None, "8-bit activations need compute capability 9.0, this is {}.{}", facts)
    why = overflow_reason(scheme, layout, shape[1])
    if why:
        return Decision(REFERENCE, None, "{}", (why,))
    problem = LinearProblem.of(
        Packing.of(scheme, LAYOUTS[layout]),
        shape,
        n,
        activations=activations,
        batch_invariant=mode.current().batch_invariant,
    )
    config = tune.choose(problem, gpu)
    kind = "e4m3" if activations is Activations.E4M3 else activations.value
    return Decision(FUSED, config, "activations are quantised to {}; {}", (kind, config))


def overflow_reason(scheme: Scheme, layout: str, ic: int) -> str:
    """Return why sums over so many input channels may not fit where kernels have them, or an empty string."""
    whole = layout == INT8_LAYOUT and Packing.of(scheme, LAYOUTS[layout]).sums_in_block == 0
    if not whole or ic <= MOST_WHOLE_CHANNELS:
        return ""
    return f"32 bits do not hold the sums of int8 products over more than {MOST_WHOLE_CHANNELS} input channels: {ic}"


def explain(
    scheme: Scheme,
    oc: int,
    ic: int,
    n: int,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cuda",
    activations: Activations | str = Activations.NATIVE,
) -> Reason:
    """Say who would serve y[n, oc] = x[n, ic] @ W^T with W in `scheme`, in its preferred layout, and why.

    Raises:
        FormatError: the scheme does not fit `ic`.
        InputError: no such activations.
        UnsupportedError: weights of this scheme cannot be multiplied with such activations.
    """
    scheme.groups(ic)
    where = torch.device(device)
    if where.type == "cuda" and not hardware.cuda_available():
        return Reason(REFERENCE, "torch sees no CUDA device")
    if n == 0 or oc == 0:
        return Reason(REFERENCE, "there is nothing to compute")
    layout = preferred_layout(scheme, dtype, where, activations)
    decision = decide(scheme, layout, (oc, ic), n, dtype, where, ic % 8 == 0)
    return Reason(decision.kernel, decision.why)


def _index(device: torch.device) -> int:
    index: int | None = device.index
    return torch.cuda.current_device() if index is None else index
