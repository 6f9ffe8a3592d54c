"""Which kernels can a compressed model ask for? They are compiled ahead of its first run, into the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tersor.checkpoint import QuantizationConfig
from tersor.checkpoint.source import open_source, quantization_of
from tersor.errors import InputError, UnsupportedError
from tersor.formats import Activations, Scheme
from tersor.kernels.dense import kernels_for
from tersor.kernels.jit import arch_for, cache, compile_many
from tersor.ops.dispatch import preferred_layout

if TYPE_CHECKING:
    from tersor.hardware import Chip
    from tersor.kernels.jit import KernelSource

KERNEL_DTYPES = ("float16", "bfloat16")
"""Dtypes of activations that kernels take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What `compile_ahead` did.

    Attributes:
        model: as it was named.
        schemes: keys of the schemes that the model uses.
        dtypes: of the activations that it may have.
        architectures: what was compiled for, such as `sm_90a`, sorted.
        kernels: how many there are now, over all architectures.
        from_cache: how many of them were there before.
        seconds: the time it took.
    """

    model: str
    schemes: list[str]
    dtypes: list[str]
    architectures: list[str]
    kernels: int
    from_cache: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def compile_ahead(
    model: str | Path,
    chips: Sequence[Chip],
    *,
    activations: Activations | str = Activations.NATIVE,
    fuse: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compiled:
    """Compile every kernel that a compressed model can ask for on some chips; needs NVRTC, but no GPU.

    Args:
        model: a checkpoint directory, or a hub id, which is downloaded.
        chips: what to compile for.
        activations: what its weights will be multiplied with.
        fuse: whether its layers will be joined (`tersor generate --fuse`), too.
        revision: branch, tag or commit of a hub id.
        progress: told (kernels done, in all) at the start and after every kernel.

    Raises:
        InputError: no such model, or one that Tersor did not compress.
        KernelError: a kernel does not compile.
        UnsupportedError: NVRTC is not installed, or weights or chip do not take such activations.
    """
    chosen = Activations.of(activations)
    with open_source(model, revision) as source:
        schemes, dtypes = needs(model, source.config)
    for scheme in schemes:
        preferred_layout(scheme, torch.float16, torch.device("cpu"), chosen)
    wanted: dict[str, dict[KernelSource, None]] = {}
    for chip in chips:
        needed = dict.fromkeys(sources(schemes, dtypes, chip, chosen, fuse))
        if chosen is not Activations.NATIVE and not needed:
            raise UnsupportedError(f"8-bit activations need compute capability 9.0: {chip.name} has no kernel for them")
        wanted.setdefault(arch_for(chip.capability), {}).update(needed)
    total = sum(map(len, wanted.values()))
    known = sum(cache.load(cache.key(source, arch)) is not None for arch in wanted for source in wanted[arch])
    start = time.monotonic()
    done = 0
    progress(done, total)

    def advance(source: KernelSource, binary: object) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for arch, of_arch in wanted.items():
        compile_many(of_arch, arch, on_done=advance)
    return Compiled(
        model=str(model),
        schemes=[scheme.key() for scheme in schemes],
        dtypes=dtypes,
        architectures=sorted(wanted),
        kernels=total,
        from_cache=known,
        seconds=round(time.monotonic() - start, 3),
    )


def needs(model: str | Path, config: dict[str, Any]) -> tuple[list[Scheme], list[str]]:
    """Return the schemes that a checkpoint uses and the dtypes that its activations may have.

    Args:
        model: what a message calls it.
        config: its config.json.

    Raises:
        InputError: it is not compressed.
    """
    quantization = quantization_of(config)
    if quantization is None:
        raise InputError(f"{model} is not compressed, so it needs no kernels: run tersor quantize first")
    parsed = QuantizationConfig.from_dict(quantization)
    schemes = dict.fromkeys([parsed.scheme, *(override.scheme for override in parsed.overrides)])
    holders = [config, config.get("text_config") or {}]
    stored = next((holder[key] for holder in holders for key in ("dtype", "torch_dtype") if holder.get(key)), None)
    return list(schemes), [stored] if stored in KERNEL_DTYPES else list(KERNEL_DTYPES)


def sources(
    schemes: Iterable[Scheme],
    dtypes: Iterable[str],
    chip: Chip,
    activations: Activations = Activations.NATIVE,
    fuse: bool = False,
) -> list[KernelSource]:
    """Return the kernels that linears of these schemes can ask for on a chip, with activations of these dtypes.

    Args:
        schemes, dtypes: what `needs` returned.
        chip: the GPU.
        activations: what weights are multiplied with.
        fuse: whether gated linears are among them.
    """
    wanted = [
        (scheme, getattr(torch, dtype), gated)
        for scheme in schemes
        for dtype in dtypes
        for gated in ((False, True) if fuse else (False,))
    ]
    return [
        source for scheme, dtype, gated in wanted for source in kernels_for(scheme, dtype, chip, activations, gated)
    ]
