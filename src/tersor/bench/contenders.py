"""Who is timed? Each contender makes copies of a random weight and the calls that walk over them.

Weights of Tersor, cuBLAS and humming have variance 1 / IC, so that the values of a chain keep their size; FP8 weights
have variance 1, as a scale of their own would give them.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from tersor import ops
from tersor.bench import timing
from tersor.bench.blend import Blend
from tersor.bench.thinned import Thinned
from tersor.compress import quantize_rtn
from tersor.errors import InputError, UnsupportedError, did_you_mean
from tersor.formats import Activations, Plain, Scheme
from tersor.kernels.tune import LinearConfig
from tersor.layouts import STREAM, MixedWeight, PackedWeight, SparseWeight, TiledSparseWeight
from tersor.ops import dispatch

Calls: TypeAlias = Sequence[Callable[[], object]]
Schedule: TypeAlias = Callable[[int, str], Calls]
"""(tokens, chain) -> the calls of one graph."""

PLAIN = "plain"
PDL = "pdl"
CHAINS = {PLAIN: (PLAIN,), PDL: (PDL,), "both": (PDL, PLAIN)}
"""Value of --chain -> the chains that Tersor is timed in."""

CUBLAS, FP8, HUMMING = "cublas", "fp8", "humming"
RIVALS = (CUBLAS, FP8, HUMMING)
HUMMING_INPUTS = {Activations.E4M3: {"dtype": "float8e4m3"}, Activations.INT8: {"dtype": "int8"}}
"""What humming calls 8-bit activations."""
BYTEWISE = {Activations.E4M3: ":a8", Activations.INT8: ":i8", Activations.INT8_GROUPS: ":i8g128"}
"""Ends the name of a kernel that multiplies with 8-bit activations."""
_HUMMING_ROWS = 256
_RESTART = 8
"""A chain starts again from the same activations after so many launches, so that rounding does not add up."""


class UnfitError(Exception):
    """A contender that does not take a shape or a number of tokens; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One column of a comparison.

    Attributes:
        name: what rows call it.
        chains: the chains it is timed in.
        weight_bytes: (OC, IC) -> bytes of the weight that a call reads.
        build: (OC, IC) -> the calls; holds the copies of the weight. Both raise `UnfitError` for what they do not take.
    """

    name: str
    chains: tuple[str, ...]
    weight_bytes: Callable[[int, int], int]
    build: Callable[[int, int], Schedule]


def contenders(
    schemes: Sequence[Scheme | Blend | Thinned],
    dtype: torch.dtype,
    chains: tuple[str, ...],
    rivals: Sequence[str],
    activations: Sequence[Activations | str] = (Activations.NATIVE,),
) -> list[Contender]:
    """Return Tersor in every scheme and kind of activations, then the rivals: cuBLAS in `dtype`, FP8, and humming."""
    both = [(scheme, kind) for kind in activations for scheme in schemes]
    found = [tersor(scheme, dtype, chains, kind) for scheme, kind in both]
    if CUBLAS in rivals:
        found.append(cublas(dtype))
    if FP8 in rivals:
        found.append(fp8(dtype))
    if HUMMING in rivals:
        found += [humming(scheme, dtype, kind) for scheme, kind in both if not isinstance(scheme, Thinned)]
    return found


def parse_rivals(text: str | None, known: tuple[str, ...] = RIVALS) -> tuple[str, ...]:
    """Read names of rivals such as `cublas,fp8,humming`, or `none`; `None` is every rival that is installed.

    Raises:
        InputError: an unknown name.
        UnsupportedError: humming is named and not installed.
    """
    if text is None:
        return tuple(name for name in known if name != HUMMING or installed(HUMMING))
    names = named_rivals(text, known)
    if HUMMING in names:
        need_installed(HUMMING, "humming-kernels")
    return names


def installed(package: str) -> bool:
    """Whether a package could be imported; it is not."""
    return importlib.util.find_spec(package) is not None


def need_installed(package: str, distribution: str) -> None:
    """Refuse to time a rival that is not there.

    Args:
        package: that is imported.
        distribution: what pip calls it.

    Raises:
        UnsupportedError: it is not installed.
    """
    if not installed(package):
        raise UnsupportedError(f"{package} is not installed, so it cannot be timed: pip install {distribution}")


def named_rivals(text: str, known: tuple[str, ...] = RIVALS) -> tuple[str, ...]:
    """Read names of rivals, or `none`, whether they are installed or not.

    Raises:
        InputError: an unknown name.
    """
    names = () if text == "none" else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known:
            raise InputError(f"--against {name!r}{did_you_mean(name, known)}: use {', '.join(known)} or none")
    return names


def label(scheme: Scheme | Blend | Thinned | Plain, activations: Activations | str = Activations.NATIVE) -> str:
    """Name a scheme as it is asked for, `fp6_e3m2` or `int4:g128`, and 8-bit activations: `fp6_e3m2:a8`, `int8:i8`.

    Of a mix it is `uint4:g128=90+int8=10`, and `:ordered` behind it where its rows stand in the order of levels; of
    pruned weights `fp6_e3m2:s50`.
    """
    if isinstance(scheme, Blend):
        levels = zip(scheme.levels, scheme.percents, strict=True)
        words = "+".join(f"{label(level)}={percents}" for level, percents in levels)
        return words + ":ordered" * scheme.in_order + BYTEWISE.get(Activations.of(activations), "")
    if isinstance(scheme, Thinned):
        return label(scheme.values) + scheme.ending + BYTEWISE.get(Activations.of(activations), "")
    if isinstance(scheme, Plain):
        return scheme.name
    name = scheme.name if scheme.group_size is None or scheme.is_mx else f"{scheme.name}:g{scheme.group_size}"
    return name + BYTEWISE.get(Activations.of(activations), "")


def unlabelled(name: str) -> tuple[str, Activations]:
    """Undo `label`: return the name of the scheme, and the activations."""
    for activations, ending in BYTEWISE.items():
        if name.endswith(ending):
            return name.removesuffix(ending), activations
    return name, Activations.NATIVE


def packed_bytes(scheme: Scheme | Blend | Thinned, oc: int, ic: int) -> int:
    """Return the bytes of a packed weight with its scales."""
    if isinstance(scheme, Blend | Thinned):
        return scheme.packed_bytes(oc, ic)
    return round(oc * ic * scheme.bits_per_weight(ic) / 8)


def tersor(
    scheme: Scheme | Blend | Thinned,
    dtype: torch.dtype,
    chains: tuple[str, ...],
    activations: Activations | str = Activations.NATIVE,
) -> Contender:
    """Return Tersor's own operator, in the given chains; quantising activations is part of its time."""

    made: dict[tuple[int, int], int] = {}

    def build(oc: int, ic: int) -> Schedule:
        weights = copies_of(scheme, oc, ic, dtype, activations)
        if isinstance(weights[0], SparseWeight | TiledSparseWeight):
            made[oc, ic] = weights[0].nbytes  # a random mask decides
        return lambda n, chain: chained(weights, random(n, ic, dtype), early=chain == PDL)

    return Contender(
        name=label(scheme, activations),
        chains=chains,
        weight_bytes=lambda oc, ic: made.get((oc, ic)) or packed_bytes(scheme, oc, ic),
        build=build,
    )


def copies_of(
    scheme: Scheme | Blend | Thinned, oc: int, ic: int, dtype: torch.dtype, activations: Activations | str
) -> Sequence[PackedWeight | MixedWeight | SparseWeight | TiledSparseWeight]:
    """Return copies of a random weight as `packed` does, mixed, pruned or neither.

    Raises:
        UnfitError: no kernel serves the scheme, or a level of the mix.
    """
    if isinstance(scheme, Thinned):
        return scheme.packed(oc, ic, dtype, Activations.of(activations))
    if isinstance(scheme, Blend):
        for level in scheme.levels:
            kernel_layout(level, dtype, torch.device("cuda", torch.cuda.current_device()), activations)
        return scheme.packed(oc, ic, dtype, Activations.of(activations))
    return packed(scheme, oc, ic, dtype, activations)


def packed(
    scheme: Scheme, oc: int, ic: int, dtype: torch.dtype, activations: Activations | str = Activations.NATIVE
) -> list[PackedWeight]:
    """Return copies of a random packed weight [oc, ic] on the current GPU, in the layout its kernels read.

    Raises:
        UnfitError: no kernel serves the scheme.
    """
    layout = kernel_layout(scheme, dtype, torch.device("cuda", torch.cuda.current_device()), activations)
    encoded = quantize_rtn(random(oc, ic, dtype) * ic**-0.5, scheme)
    weight = PackedWeight.from_encoded(encoded).to_layout(layout)
    return [
        replace(weight, data=weight.data.clone(), scale=weight.scale.clone())
        for _ in range(timing.copies(weight.nbytes))
    ]


def kernel_layout(
    scheme: Scheme, dtype: torch.dtype, device: torch.device, activations: Activations | str = Activations.NATIVE
) -> str:
    """Return the layout that kernels read a weight in.

    Raises:
        UnfitError: no kernel serves the scheme.
    """
    try:
        layout = ops.preferred_layout(scheme, dtype, device, activations)
    except UnsupportedError as error:
        raise UnfitError(str(error)) from None
    if layout == STREAM:
        raise UnfitError(f"no kernel serves {label(scheme)}: {dispatch.unsupported_reason(scheme, dtype, device)}")
    return layout


def chained(
    weights: Sequence[PackedWeight | MixedWeight | SparseWeight | TiledSparseWeight],
    x: torch.Tensor,
    *,
    early: bool,
    config: LinearConfig | None = None,
) -> Calls:
    """Return calls of Tersor's operator that each wait for the one before.

    Where the weight is square a call's input is the output of the one before; elsewhere all read the same x.

    Args:
        weights: one a call, [OC, IC].
        x: activations [N, IC].
        early: whether weights may be fetched before the launch ahead has ended (`ops.launches`).
        config: how the kernel runs; `None` is Tersor's own choice.
    """
    square = weights[0].shape[0] == weights[0].shape[1]
    last = [x]

    def call(index: int) -> None:
        source = last[0] if square and index % _RESTART else x
        with ops.using(config=config, early=early):
            last[0] = ops.linear(source, weights[index])

    return [partial(call, index) for index in range(len(weights))]


def cublas(dtype: torch.dtype) -> Contender:
    """Return the 16-bit product of cuBLAS, `torch.mm`."""

    def build(oc: int, ic: int) -> Schedule:
        weights = [random(oc, ic, dtype) * ic**-0.5 for _ in range(timing.copies(2 * oc * ic))]

        def schedule(n: int, chain: str) -> Calls:
            x = random(n, ic, dtype)
            return [partial(torch.mm, x, weight.T) for weight in weights]

        return schedule

    return Contender(name=CUBLAS, chains=(PLAIN,), weight_bytes=lambda oc, ic: 2 * oc * ic, build=build)


def fp8(dtype: torch.dtype) -> Contender:
    """Return `torch._scaled_mm`: weights and activations in e4m3, one scale each, output in `dtype`."""

    def build(oc: int, ic: int) -> Schedule:
        if oc % 16 or ic % 16:
            raise UnfitError("torch._scaled_mm takes channels in multiples of 16")
        weights = [random(oc, ic, dtype).to(torch.float8_e4m3fn) for _ in range(timing.copies(oc * ic))]
        one = torch.ones((), device="cuda")

        def multiply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)

        def schedule(n: int, chain: str) -> Calls:
            x = random(n, ic, dtype).to(torch.float8_e4m3fn)
            return [partial(multiply, x, weight) for weight in weights]

        return schedule

    return Contender(name=FP8, chains=(PLAIN,), weight_bytes=lambda oc, ic: oc * ic, build=build)


def humming(
    scheme: Scheme | Blend, dtype: torch.dtype, activations: Activations | str = Activations.NATIVE
) -> Contender:
    """Return humming-kernels with the same weights and activations, its own tuner choosing.

    It has no mixes: of one, a layer of the rows of every level is called, their number rounded to a multiple of
    `_HUMMING_ROWS`, and nothing puts results in order.
    """

    def build(oc: int, ic: int) -> Schedule:
        parts = [(scheme, oc)] if isinstance(scheme, Scheme) else _humming_rows(scheme, oc)
        sizes = [packed_bytes(one, rows, ic) for one, rows in parts]
        count = timing.copies(sum(sizes))
        layers = foreign(lambda: [_humming_layers(one, rows, ic, dtype, activations, count) for one, rows in parts])

        def call(own: Sequence[Any], x: torch.Tensor) -> None:
            for layer in own:
                layer(x)

        def schedule(n: int, chain: str) -> Calls:
            x = random(n, ic, dtype)
            return [partial(foreign, partial(call, own, x)) for own in zip(*layers, strict=True)]

        return schedule

    return Contender(
        name=f"{HUMMING} {label(scheme, activations)}",
        chains=(PLAIN,),
        weight_bytes=lambda oc, ic: packed_bytes(scheme, oc, ic),
        build=build,
    )


def foreign(call: Callable[[], Any]) -> Any:
    """Run another package's code; whatever it raises becomes the reason why it is not timed."""
    try:
        return call()
    except UnfitError:
        raise
    except Exception as error:
        raise UnfitError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def humming_weight(scheme: Scheme) -> dict[str, Any]:
    """Return what humming calls a scheme of weights."""
    name = scheme.format.name
    if scheme.format.kind == "float":
        name = f"float{scheme.format.bits}{name.partition('_')[2]}"
    return {"dtype": name} if scheme.group_size is None else {"dtype": name, "group_size": scheme.group_size}


def _humming_rows(blend: Blend, oc: int) -> list[tuple[Scheme, int]]:
    """Return the levels of a mix and the rows that a layer of humming has of each."""
    rows = zip(blend.levels, blend.assignment(oc).rows, strict=True)
    return [(level, max(1, round(count / _HUMMING_ROWS)) * _HUMMING_ROWS) for level, count in rows]


def _humming_layers(scheme: Scheme, oc: int, ic: int, dtype: torch.dtype, activations: str, count: int) -> list[Any]:
    from humming.layer import HummingLayer

    options: dict[str, Any] = {"weight_config": humming_weight(scheme), "torch_dtype": dtype}
    if activations != Activations.NATIVE:
        if Activations.of(activations) not in HUMMING_INPUTS:
            raise UnfitError(f"humming is called with one scale a token, not with activations {activations}")
        options["input_config"] = HUMMING_INPUTS[Activations.of(activations)]
    layer = HummingLayer(shape_n=oc, shape_k=ic, **options).cuda()
    layer.load_from_unquantized(random(oc, ic, dtype) * ic**-0.5)
    layer.transform()
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def random(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return normal numbers [rows, columns] on the current GPU."""
    return torch.randn(rows, columns, dtype=dtype, device="cuda")
