"""Which weights that a compression makes will no kernel multiply? Said before the work starts, not behind it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from tersor import hardware
from tersor.checkpoint.conversion import Conversion
from tersor.formats import Assignment, Pruned, Scheme
from tersor.hardware import Chip
from tersor.layouts.packing import NATIVE, unsupported_reason
from tersor.layouts.tiled_sparse import tiles_reason
from tersor.ops import dispatch

_log = logging.getLogger("tersor")
_ELSE = "the reference multiplies it, slowly"
_DECODED = "every product decodes it for cuBLAS"


def tell(conversion: Conversion, dtype: str, device: torch.device, levels: Sequence[Scheme] = ()) -> None:
    """Tell the logger `tersor` what `without_kernel` says of a compression, as a warning a line.

    Args:
        conversion: what becomes of every tensor.
        dtype: of the model, such as `bfloat16`.
        device: where the work is done; of a CPU the GPU that stands beside it counts, if there is one.
        levels: those that output features are about to get, in place of the scheme of most weights.
    """
    for line in without_kernel(conversion, dtype, gpu_of(device), levels):
        _log.warning(line)


def gpu_of(device: torch.device) -> Chip | str | None:
    """Return the GPU of a device or beside a CPU, or why it has no kernels; `None` where there is none."""
    if device.type != "cuda" and not torch.cuda.is_available():
        return None
    gpu = device if device.type == "cuda" else torch.device("cuda", 0)
    return dispatch.environment_reason(torch.float16, gpu) or hardware.of_device(gpu.index or 0)


def without_kernel(
    conversion: Conversion, dtype: str, gpu: Chip | str | None, levels: Sequence[Scheme] = ()
) -> list[str]:
    """Return a line for every scheme of linear weights that no kernel multiplies, and for what a GPU does in pieces.

    Args:
        conversion, dtype, levels: as `tell` takes them; a model in float32 runs in either 16-bit dtype.
        gpu: which one, or why it has no kernels; `None` where there is none, so that only what no GPU has is said.
    """
    if isinstance(gpu, str):
        return [f"no kernel will multiply the weights on this GPU, but the reference, slowly: {gpu}"]
    names = [name for name in NATIVE.values() if name == dtype] or list(NATIVE.values())
    forms = {step.scheme for step in conversion.steps if step.linear and step.scheme is not None}
    found = dict[str, None]()
    schemes: list[Scheme] = list(levels)
    for form in forms:
        if isinstance(form, Assignment):
            schemes += form.mix.levels
        elif isinstance(form, Pruned):
            found |= _said(form.sparse.key(), (tiles_reason(form.sparse, name) for name in names), names, _DECODED)
        else:
            schemes.append(form)
    for scheme in schemes:
        found |= _said(scheme.key(), (unsupported_reason(scheme, name) for name in names), names)
    if gpu is not None and gpu.capability != (9, 0):
        needs = "needs compute capability 9.0, and {} has {}.{}".format(gpu.name, *gpu.capability)
        if levels or any(isinstance(form, Assignment) for form in forms):
            found[f"one launch for all levels of a layer {needs}: each will be a launch"] = None
        if any(isinstance(form, Pruned) for form in forms):
            found[f"a product with pruned weights as they lie {needs}: they will be expanded first"] = None
    return sorted(found)


def _said(key: str, reasons: Iterable[str], names: Sequence[str], then: str = _ELSE) -> dict[str, None]:
    """Return the line of a scheme that has no kernel beside any dtype in which activations may come, else nothing."""
    every = list(reasons)
    if not all(every):
        return {}
    beside = " or ".join(names)
    return {f"{key} has no kernel beside {beside} activations ({every[0]}): {then}": None}
