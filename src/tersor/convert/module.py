"""Compress a model that is in memory, in place: every linear layer becomes a packed one."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.config import Override, parse_ignore, parse_overrides
from tersor.checkpoint.conversion import Conversion, Step, make_conversion
from tersor.checkpoint.exports import get_export
from tersor.checkpoint.header import TensorSpec
from tersor.checkpoint.modules import Architecture, Embedding, Linear
from tersor.checkpoint.names import TORCH_DTYPES
from tersor.checkpoint.pack import pack, pack_stack
from tersor.compress import DEFAULT_RECIPE, get_recipe
from tersor.convert.pipeline import Progress, row_of
from tersor.convert.report import Report, Row
from tersor.errors import FormatError, InputError, NonFiniteError, ShapeError
from tersor.formats import TABLE_DTYPES, Outliers, Scheme, dtype_name, get_scheme, store_scales
from tersor.hardware import resolve_device
from tersor.integrations.transformers import live
from tersor.nn import PackedModule
from tersor.version import __version__

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class _Held:
    """Stands for the file of a tensor that is in memory."""

    path: Path


@dataclass(frozen=True, slots=True)
class _HeldTensor:
    """A tensor in memory, described as one of a checkpoint."""

    file: _Held
    spec: TensorSpec

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in memory."""
        return self.spec.nbytes


@dataclass(frozen=True, slots=True)
class _Model:
    """A model in memory, described as a checkpoint is: `directory` is what messages call it."""

    directory: Path
    tensors: dict[str, _HeldTensor]


def quantize_module(
    model: nn.Module,
    *,
    format: str = "fp6",
    group_size: int | None = None,
    scale_dtype: str | None = None,
    algorithm: str = DEFAULT_RECIPE,
    ignore: Sequence[str] = (),
    overrides: Mapping[str, Any] | Sequence[str] = (),
    dry_run: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
    outliers: str | None = None,
) -> Report:
    """Compress the linear layers of a model in place, one after the other; each old weight is freed.

    Everything is checked before the first layer changes. A model of transformers can be saved afterwards:
    `save_pretrained` writes a Tersor checkpoint.

    Args:
        model: any module that holds linear layers, on any device but meta.
        format, group_size, scale_dtype, algorithm, ignore, overrides: as for `tersor.quantize` of a checkpoint.
        dry_run: only report what would be done.
        device: where weights are encoded: `cpu`, `cuda`, `cuda:N` or `auto`; `None` is where each weight is.
        progress: called with bytes done, bytes in all, and a tensor's name.
        outliers: as there; in the dtype of the model's first parameter where that has 16 bits, else float16, as are
            tables.

    Returns:
        What was done, tensor by tensor, under the names of the model's state dict; experts that transformers holds
        fused and stores one by one have the names of each.

    Raises:
        InputError: bad options, weights that are not there or not finite, or a model that is compressed already; the
            model is then unchanged.
    """
    started = time.monotonic()
    if get_recipe(algorithm).needs:
        raise InputError(
            f"a module in memory is rounded to nearest: for {algorithm!r} save it, and calibrate the checkpoint"
        )
    dtype = next((dtype_name(one.dtype) for one in model.parameters()), "")
    own_dtype = dtype if dtype in TABLE_DTYPES else "float16"
    scheme = get_scheme(format, group_size, scale_dtype, own_dtype)
    if outliers is not None:
        scheme = replace(scheme, outliers=Outliers.parse(outliers, own_dtype))
    patterns, chosen = parse_ignore(ignore), parse_overrides(overrides, group_size, scale_dtype, own_dtype)
    where = None if device is None else resolve_device(device)
    name = type(model).__name__
    if live.linear_shape(model) is not None:
        raise InputError(f"{name} is a layer itself, which cannot be replaced in place: give the module that holds it")
    live.check_plain(model)
    split = live.split_experts(model)
    try:
        rows = _quantize(model, name, scheme, patterns, chosen, algorithm, dry_run, where, progress, split)
    finally:
        live.settle_experts(model, split)
    report = Report(name, None, scheme.key(), "tersor", tuple(rows.values()), seconds=time.monotonic() - started)
    if report.mostly_left:
        left = report.left[0]
        warnings.warn(
            f"{name}: only {100 * report.linear_share:.0f} % of the linear weights were compressed; most of what was "
            f"left: {left.reason} ({left.example})",
            stacklevel=3,
        )
    return report


def _quantize(
    model: nn.Module,
    name: str,
    scheme: Scheme,
    ignore: Sequence[str],
    overrides: Sequence[Override],
    algorithm: str,
    dry_run: bool,
    device: torch.device | None,
    progress: Progress | None,
    split: live.Split,
) -> dict[str, Row]:
    """Decide, check, and replace layers unless it is a dry run; return the rows of the report by tensor."""
    architecture, kept = _architecture(model)
    source = _describe(model, name)
    conversion = make_conversion(
        source,  # type: ignore[arg-type]  # what is asked of a source, it has
        architecture,
        scheme=scheme,
        ignore=ignore,
        overrides=overrides,
        export=get_export("tersor"),
        shard_bytes=1 << 62,
        provenance={"tersor": __version__, "algorithm": algorithm, "source": live.label(model)},
    )
    schemes = {step.layer.module: step.one_scheme for step in conversion.steps if step.layer and step.one_scheme}
    for step in conversion.steps:
        _check(model, step)
    rows = {step.source.spec.name: _row(step, kept) for step in conversion.steps}
    if not dry_run:
        heads = live.find_ties(model, source, schemes)
        for step_name, row in _replace(model, conversion, algorithm, device, progress, split).items():
            rows[step_name] = row
        live.finish(model, conversion.config, heads)
    return rows


def _architecture(model: nn.Module) -> tuple[Architecture, dict[str, str]]:
    """Return the model's layers that can be replaced, and why others cannot: module name -> words."""
    found = live.architecture(model)
    kept: dict[str, str] = {}
    owners: dict[int, str] = {}
    adapted = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer"))
    linears: dict[str, Linear] = {}
    embeddings: dict[str, Embedding] = {}
    stacks = dict(found.stacks)
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            kept[name] = "packed already"
            continue
        for own in (f"{name}.{own}" for own in module._parameters):
            if own in stacks and ((adapted and own.startswith(adapted)) or not live.unpatched(module)):
                kept[own] = (
                    "part of an adapter" if live.unpatched(module) else "fused experts with a forward of their own"
                )
                del stacks[own]
        if name not in found.linears and name not in found.embeddings:
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            kept[name] = "parametrized"
        elif adapted and name.startswith(adapted):
            kept[name] = "part of an adapter"
        elif name in found.linears and not live.packable(module):
            kept[name] = f"a {type(module).__name__}, which computes more than a linear layer"
        elif id(weight) in owners and name != found.head:
            kept[name] = kept[owners[id(weight)]] = "shares its weight"
        owners.setdefault(id(weight), name)
        if name in kept:
            continue
        if name in found.linears:
            linears[name] = found.linears[name]
        else:
            embeddings[name] = found.embeddings[name]
    linears = {name: linear for name, linear in linears.items() if name not in kept}
    embeddings = {name: embedding for name, embedding in embeddings.items() if name not in kept}
    return replace(found, linears=linears, embeddings=embeddings, stacks=stacks), kept


def _describe(model: nn.Module, name: str) -> _Model:
    """Describe every tensor of a model's state dict, each under its first name."""
    tensors: dict[str, _HeldTensor] = {}
    seen: set[int] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or id(tensor) in seen or tensor.dtype not in _NAMES:
            continue
        seen.add(id(tensor))
        tensors[key] = _HeldTensor(_Held(Path(name)), TensorSpec(key, _NAMES[tensor.dtype], tuple(tensor.shape)))
    return _Model(Path(name), tensors)


def _row(step: Step, kept: Mapping[str, str]) -> Row:
    row = row_of(step)
    name = step.source.spec.name
    owner, _, own = name.rpartition(".")
    why = next(
        (kept[module] for module in (name, owner, owner.partition(".parametrizations")[0]) if module in kept), ""
    )
    if not why or own.startswith("bias"):
        return row
    return replace(row, scheme=None, note=why)


def _weight(model: nn.Module, step: Step) -> torch.Tensor:
    """Return a layer's weight as [OC, IC], that of all its experts as it is."""
    assert step.layer is not None
    if step.layer.stacked:
        return model.get_parameter(step.layer.module).detach()
    weight: torch.Tensor = model.get_submodule(step.layer.module).weight.detach()  # type: ignore[operator,union-attr]
    return weight.T if step.layer.transposed else weight


def _check(model: nn.Module, step: Step) -> None:
    """Check that a weight is there, finite, and within the reach of its scales.

    Raises:
        ShapeError: it is on the meta device: not loaded, or offloaded.
        NonFiniteError: it holds a NaN or an infinity.
        FormatError: a scale does not fit its dtype.
    """
    scheme = step.one_scheme
    if scheme is None:
        return
    name, weight = step.source.spec.name, _weight(model, step)
    if weight.device.type == "meta":
        raise ShapeError(f"{name} is on the meta device, not loaded or offloaded: load the model into memory first")
    low, high = (float(value) for value in weight.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        found = tuple(int(axis) for axis in (~torch.isfinite(weight)).nonzero()[0])
        turned = step.layer is not None and step.layer.transposed and not step.layer.stacked
        raise NonFiniteError(found[::-1] if turned else found, float(weight[found]), f"{name!r}")
    extent = max(high, 0.0) - min(low, 0.0) if scheme.has_zero_point else max(abs(low), abs(high))
    try:
        store_scales(torch.tensor([[extent if scheme.has_table else extent / scheme.format.max]]), scheme)
    except FormatError as error:
        raise FormatError(f"{name!r}: {error}") from None


def _replace(
    model: nn.Module,
    conversion: Conversion,
    recipe: str,
    device: torch.device | None,
    progress: Progress | None,
    split: live.Split,
) -> dict[str, Row]:
    """Put a packed layer in place of every layer with a scheme; return the rows of the report by tensor."""
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    steps = [step for step in conversion.steps if step.scheme is not None]
    total, done = sum(step.source.spec.nbytes for step in steps), 0
    rows = {}
    for step in steps:
        name, scheme = step.layer.module if step.layer else "", step.one_scheme
        assert step.layer is not None and scheme is not None
        weight = _weight(model, step)
        home = weight.device
        moved = weight if device is None else weight.to(device)
        if step.layer.stacked:
            packed = pack_stack(moved, scheme, recipe, transposed=step.layer.transposed)
        else:
            packed = pack(moved, scheme, recipe)
        del weight, moved
        tensors = {key: tensor.to(home) for key, tensor in packed.tensors.items()}
        # What holds all experts of a layer is replaced, and holds their packed weights.
        place = name.rpartition(".")[0] if step.layer.stacked else name
        old = model.get_submodule(place)
        live.replace(model, name, scheme, tensors, step.layer.stacked)
        split.pop(name.rsplit(".", 2)[0], None)
        for other in aliases.pop(id(old), ()):  # the number of what is gone may be another's next
            model.set_submodule(other, model.get_submodule(place))
        norm = packed.squared_norm
        rows[step.source.spec.name] = row_of(step, (packed.squared_error / norm) ** 0.5 if norm else 0.0)
        done += step.source.spec.nbytes
        if progress is not None:
            progress(done, total, step.source.spec.name)
    return rows
