"""Weights of a calibrated model become zero, and the others what loses least: the coder of `tersor prune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tersor.checkpoint.names import DENSE, MASK, PACKED, SCALE, SPARSE, TORCH_DTYPES, VALUES, ZERO_POINT
from tersor.compress.prune import Pattern, Pruned, prune
from tersor.convert.calibrate.coder import Coded
from tersor.convert.calibrate.tasks import Task, matrices
from tersor.convert.calibrate.units import Units
from tersor.convert.survey import dense_bytes
from tersor.errors import FormatError
from tersor.formats import FLOAT_DTYPES, Plain, Sparse
from tersor.layouts import PackedWeight, SparseWeight
from tersor.ops import load_columns

WEIGHT = "weight"
"""Name of a pruned weight [OC, IC] without codes that is smaller dense."""


class PruneCoder:
    """Prunes weights, each with a pattern of its own, and packs each as what is smaller: sparse or dense."""

    def __init__(
        self,
        patterns: Mapping[str, Pattern],
        algorithm: str,
        sparse: Sparse,
        *,
        update: bool,
        units: Units | None = None,
    ) -> None:
        """Take what is asked for.

        Args:
            patterns: by the name of the layer.
            algorithm: a key of `compress.prune.ALGORITHMS`.
            sparse: with the values of the weights that stay.
            update: whether those weights are fitted to their mask.
            units: what may not stay because it never fires.
        """
        self._patterns, self._algorithm, self._sparse = patterns, algorithm, sparse
        self._update, self._units = update, units
        self.recipe = "gptq"

    def prepare(self, tasks: Sequence[Task], device: torch.device) -> None:
        """Load the kernels that go over columns, where weights get codes; masks are torch operations."""
        if self._sparse.scheme is not None:
            load_columns([self._sparse.scheme.format], device)

    def code(self, task: Task, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor], first: int) -> Coded:
        """Prune a weight and pack it.

        Raises:
            FormatError: it has numbers that those that stay cannot be, or as `prune` does.
            NonFiniteError: as `prune` does.
        """
        found = prune(
            self._numbers(weight),
            self._patterns[task.name],
            self._algorithm,
            statistics,
            scheme=self._sparse.scheme,
            update=self._update,
            allowed=self._units.allowed(task, weight) if self._units is not None else None,
        )
        line: dict[str, Any] = {f"loss_{step}": loss for step, loss in found.losses.items()}
        line |= {"weights": found.kept.numel(), "left": int(found.kept.sum())}
        underflowed = [first + row for row in found.encoded.underflowed] if found.encoded is not None else []
        tensors = {name: tensor.contiguous() for name, tensor in self._packed(task, found).items()}
        return Coded(tensors, found.squared_error, found.squared_norm, underflowed, line)

    def _numbers(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight in the dtype of its values, where these are plain numbers."""
        values = self._sparse.values
        if not isinstance(values, Plain) or FLOAT_DTYPES[values.dtype] == weight.dtype:
            return weight
        found = weight.to(FLOAT_DTYPES[values.dtype])
        if bool((found.isinf() & weight.isfinite()).any()):
            raise FormatError(f"has numbers up to {float(weight.abs().max()):.3g}, which {values.dtype} cannot be")
        return found

    def _packed(self, task: Task, found: Pruned) -> dict[str, torch.Tensor]:
        """Return what is stored of a weight; plain numbers of one that is not sparse have the dtype that they had."""
        if found.encoded is None:
            packed = SparseWeight.from_plain(found.weight, found.kept)
        else:
            packed = SparseWeight.from_encoded(found.encoded, found.kept)
        oc, ic = packed.shape
        if packed.form.nbytes(ic) < dense_bytes(self._sparse, oc, ic):
            return SPARSE.pack(packed)
        return (
            {WEIGHT: found.weight.to(TORCH_DTYPES[task.step.source.spec.dtype])}
            if found.encoded is None
            else DENSE.pack(found.encoded)
        )

    def decode(self, task: Task, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return what a pruned weight's tensors stand for."""
        assert task.step.layer is not None
        oc, ic = task.step.layer.shape
        if WEIGHT in tensors:
            decoded = tensors[WEIGHT].to(dtype)
        elif MASK in tensors:
            parts = (tensors[MASK], tensors[VALUES], tensors.get(SCALE), tensors.get(ZERO_POINT))
            decoded = SparseWeight.from_stored(self._sparse, (oc, ic), *parts).dequantize(dtype)
        else:
            assert self._sparse.scheme is not None
            zero_point = tensors.get(ZERO_POINT)
            dense = PackedWeight(self._sparse.scheme, (oc, ic), tensors[PACKED], tensors[SCALE], zero_point)
            decoded = dense.dequantize(dtype)
        return matrices(task.step, decoded)
