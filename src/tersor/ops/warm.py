"""Which kernels can a compressed model ask for? They are compiled ahead of its first run, into the cache."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tersor.checkpoint import QuantizationConfig
from tersor.checkpoint.names import MASK, stored_weights
from tersor.checkpoint.source import Source, open_source, quantization_of
from tersor.errors import InputError, UnsupportedError
from tersor.formats import Activations, Mix, Scheme, Sparse
from tersor.formats.sparse import MASK_BITS
from tersor.kernels import mixed, quantizing
from tersor.kernels.dense import kernels_for
from tersor.kernels.jit import arch_for, cache, compile_many
from tersor.kernels.routing import combine_source, tables_source
from tersor.kernels.tune import SM90
from tersor.kernels.tune import experts as tune
from tersor.kernels.tune import mixed as tune_mixed
from tersor.layouts.gated import gated_rows
from tersor.layouts.packing import Packing, target_of, unsupported_reason
from tersor.ops import mixed_launch, needed, needed_sparse
from tersor.ops.dispatch import activations_for, preferred_layout
from tersor.ops.gates import Gate

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
    also: Callable[[Source, Chip], Iterable[KernelSource]] = lambda source, chip: (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compiled:
    """Compile every kernel that a model can ask for on some chips; needs NVRTC, but no GPU.

    Args:
        model: a checkpoint directory, or a hub id, which is downloaded.
        chips: what to compile for.
        activations: what its weights will be multiplied with.
        fuse: whether layers that read the same activations are joined, too.
        revision: branch, tag or commit of a hub id.
        also: returns what else the checkpoint needs on a chip.
        progress: told (kernels done, in all) at the start and after every kernel.

    Raises:
        InputError: no such model, or one that needs no kernel.
        KernelError: a kernel does not compile.
        UnsupportedError: NVRTC is not installed, or weights or chip do not take such activations.
    """
    with open_source(model, revision) as source:
        schemes, dtypes = needs(source.config)
        chosen = activations_for(activations, schemes)
        uniform, mixes = kinds(source.config)
        mixture = mixture_of(source.config, source.tensors)
        for scheme in schemes:
            preferred_layout(scheme, torch.float16, torch.device("cpu"), chosen)
        wanted: dict[str, dict[KernelSource, None]] = {}
        for chip in chips:
            found = dict.fromkeys(sources(uniform, dtypes, chip, chosen, fuse))
            for mix in mixes:
                found.update(dict.fromkeys(mixed_sources(mix, dtypes, chip, chosen, fuse)))
            if mixture is not None:
                found.update(dict.fromkeys(mixture.sources(uniform, dtypes, chip, chosen)))
            if schemes and chosen is not Activations.NATIVE and not found:
                raise UnsupportedError(
                    f"8-bit activations need compute capability 9.0: {chip.name} has no kernel for them"
                )
            if chosen is Activations.NATIVE:
                found.update(dict.fromkeys(pruned_sources(source, dtypes, chip)))
            found.update(dict.fromkeys(also(source, chip)))
            wanted.setdefault(arch_for(chip.capability), {}).update(found)
    total = sum(map(len, wanted.values()))
    if not total:
        raise InputError(f"{model} is not compressed and runs through transformers, so it needs no kernels")
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


def needs(config: dict[str, Any]) -> tuple[list[Scheme], list[str]]:
    """Return the schemes that a checkpoint uses, none where it is plain, and the dtypes that its activations may have.

    Args:
        config: its config.json.
    """
    quantization = quantization_of(config)
    schemes: dict[Scheme, None] = {}
    if quantization is not None:
        parsed = QuantizationConfig.from_dict(quantization)
        schemes = dict.fromkeys(parsed.schemes)
    holders = [config, config.get("text_config") or {}]
    stored = next((holder[key] for holder in holders for key in ("dtype", "torch_dtype") if holder.get(key)), None)
    return list(schemes), [stored] if stored in KERNEL_DTYPES else list(KERNEL_DTYPES)


def kinds(config: dict[str, Any]) -> tuple[list[Scheme], list[Mix]]:
    """Return the schemes that whole weights of a checkpoint have, and the mixes of others.

    Args:
        config: its config.json.
    """
    quantization = quantization_of(config)
    if quantization is None:
        return [], []
    parsed = QuantizationConfig.from_dict(quantization)
    whole = (one for one in parsed.uniform if isinstance(one, Scheme))
    return list(dict.fromkeys(whole)), list(parsed.mixes)


def pruned_sources(source: Source, dtypes: Iterable[str], chip: Chip) -> Iterator[KernelSource]:
    """Yield the kernels that the linears of pruned weights of a checkpoint ask for, by their shapes.

    Args:
        source: the checkpoint; none of its weights is read.
        dtypes: of activations.
        chip: the GPU.
    """
    quantization = quantization_of(source.config)
    kinds: dict[tuple[Sparse, tuple[int, int]], None] = {}
    for name, tensor in source.tensors.items() if quantization is not None else ():
        stem, dot, last = name.rpartition(".")
        said = QuantizationConfig.from_dict(quantization).resolve(stem) if last == MASK and dot else None
        if said is not None and not isinstance(said, Mix):
            oc, octets = tensor.spec.shape
            kinds[said if isinstance(said, Sparse) else Sparse(said), (oc, octets * MASK_BITS)] = None
    for (sparse, shape), dtype in itertools.product(kinds, dtypes):
        yield from needed_sparse.of_shape(sparse, shape, getattr(torch, dtype), 0, _PRUNED_TOKENS, chip)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The experts of a model's layers, as its config.json has them.

    Attributes:
        experts, top_k, hidden, inner: E, K, H and F.
        gate: how gate and up become one.
    """

    experts: int
    top_k: int
    hidden: int
    inner: int
    gate: Gate

    def sources(
        self, schemes: Iterable[Scheme], dtypes: Iterable[str], chip: Chip, activations: Activations
    ) -> Iterator[KernelSource]:
        """Yield the kernels that its experts ask for with any number of tokens, in weights of one of these schemes.

        The kernel that chooses experts by logits is not among them: how it chooses, config.json does not say.
        """
        native = activations is Activations.NATIVE
        has_sm90 = tune.schedule(chip) == SM90
        for dtype in dtypes if has_sm90 or native else ():
            yield combine_source(dtype)
            yield from (tables_source(self.experts, index) for index in ("int32", "int64"))
            for scheme in schemes:
                target = target_of(activations, getattr(torch, dtype))
                if target is None or unsupported_reason(scheme, target):
                    continue
                both, shape = (Packing.of(scheme, target),) * 2, (self.experts, self.hidden, self.inner)
                shapes = ((self.experts, gated_rows(self.inner), self.hidden), shape)
                ups, downs = ([(packing, shape)] for packing, shape in zip(both, shapes, strict=True))
                yield from needed.products(ups, downs, self.top_k, self.gate, dtype, _TOKENS, chip)


_TOKENS = 1 << 16
"""Up to so many tokens experts are prepared for."""
_PRUNED_TOKENS = 1 << 13
"""The same of pruned weights, whose kernels for more are no others."""
_SIZES = {
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok",),
    "hidden": ("hidden_size",),
    "inner": ("moe_intermediate_size", "intermediate_size"),
}
"""Field of `Mixture` -> names that it has in a config.json, the first one that is there counts."""
_GATES = {"silu": Gate.SILU, "swish": Gate.SILU, "gelu": Gate.GELU, "gelu_pytorch_tanh": Gate.GELU_TANH}


def mixture_of(config: Mapping[str, Any], names: Iterable[str]) -> Mixture | None:
    """Return the experts of a model; `None` where it has none that are compressed, or they are of another kind.

    Args:
        config: its config.json.
        names: of its tensors.
    """
    if not any(".experts." in stem for stem in stored_weights(names)):
        return None
    for holder in (config, config.get("text_config") or {}):
        found: dict[str, Any] = {
            field: next((holder[key] for key in keys if key in holder), None) for field, keys in _SIZES.items()
        }
        act = holder.get("hidden_act", holder.get("hidden_activation"))
        gate = Gate.CLAMPED if holder.get("model_type") == "gpt_oss" else _GATES.get(act or "")
        if gate is not None and all(isinstance(size, int) for size in found.values()):
            return Mixture(**found, gate=gate)
    return None


def mixed_sources(
    mix: Mix, dtypes: Iterable[str], chip: Chip, activations: Activations = Activations.NATIVE, fuse: bool = False
) -> Iterator[KernelSource]:
    """Yield the kernels that linears of a mix can ask for on a chip: one a tile where all row sets are one launch.

    Args:
        mix: the levels.
        dtypes: of activations as they come.
        chip, activations, fuse: as for `sources`.
    """
    for dtype in dtypes:
        target = target_of(activations, getattr(torch, dtype))
        if target is None or mixed_launch.reason(mix, f"tiles_{target}", 0, getattr(torch, dtype), chip):
            yield from sources(mix.levels, [dtype], chip, activations, fuse)
            continue
        packings = tuple(Packing.of(level, target) for level in mix.levels)
        if activations is not Activations.NATIVE:
            yield quantizing.quantize_source(dtype, activations)
        for tile in tune_mixed.tiles_of([packing.sums_in_block for packing in packings], activations):
            for gate in (0, int(Gate.SILU)) if fuse else (0,):
                yield mixed.source(packings, dtype, tile, chip, gate)


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
