"""Products of many tokens beside outliers: the weight decoded with them as C++ on a CPU, and when that is chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated

from tersor.compress import encode
from tersor.formats import Outliers, get_scheme, outlier_columns, outlier_values, outlier_words
from tersor.kernels import dense
from tersor.layouts import PackedWeight
from tersor.layouts.outliers import rounds_of
from tersor.layouts.packing import Packing

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def weight_of(form: str, size: int | None, share: str, target: str, shape: tuple[int, int], first: bool) -> PackedWeight:
    """Return a random weight in kernel tiles whose outliers stand at random places, or in the first columns."""
    (oc, ic), generator = shape, torch.Generator().manual_seed(shape[1])
    of = replace(get_scheme(form, size, target), outliers=Outliers.parse(share, target))
    encoded = encode(torch.randn(shape, generator=generator).to(_DTYPES[target]), of)
    assert of.outliers is not None and encoded.outliers is not None
    if first:
        columns = torch.arange(of.outliers.per_row(ic)).repeat(oc, 1)
        zeros = torch.full_like(encoded.codes, of.format.zero_code)
        if encoded.zero_point is not None:
            zeros = encoded.zero_point.repeat_interleave(ic // encoded.zero_point.shape[1], dim=1)
        codes = encoded.codes.scatter(1, columns, zeros.gather(1, columns))
        values = torch.randn(columns.shape, generator=generator).to(_DTYPES[target])
        encoded = replace(encoded, codes=codes, outliers=outlier_words(columns, values))
    return PackedWeight.from_encoded(encoded).to_layout(f"tiles_{target}")


def decoded(weight: PackedWeight, slice_oc: int, folder: Path) -> torch.Tensor:
    """Return the weight as the kernel leaves it, `slice_oc` rows a launch."""
    (oc, ic), kept, target = weight.shape, weight.scheme.outliers, weight.packing.target
    assert kept is not None and weight.arranged is not None
    packing = Packing.of(weight.scheme.dense, target)
    function = Emulated(dense.dequantize_source(packing, rounds_of(kept, ic)), folder, 900)
    made = torch.full((oc, ic), torch.nan, dtype=_DTYPES[target])
    for first in range(0, oc, slice_oc):
        dense.launch_dequantize(
            function,  # type: ignore[arg-type]
            0,
            weight=weight.data.data_ptr(),
            scale=weight.scale.data_ptr(),
            scratch=made[first:].data_ptr(),
            first_block=first // 16,
            oc=min(slice_oc, oc - first),
            ic=ic,
            factor=packing.factor,
            kept=weight.arranged.data_ptr(),
            weight_oc=oc,
        )
    return made


@needs_compiler
@pytest.mark.parametrize(
    ("form", "size", "share", "target", "shape", "first"),
    [
        ("int4", 32, "3%", "float16", (200, 352), False),
        ("uint4", 128, "10%", "bfloat16", (70, 256), True),
        ("fp6_e2m3", None, "0.5%", "float16", (130, 264), False),
        ("uint3", None, "8%", "bfloat16", (64, 129), True),
        ("lut3", None, "2%", "bfloat16", (100, 256), False),
    ],
)
def test_a_weight_is_decoded_with_its_scales_and_its_outliers_exactly(
    form: str, size: int | None, share: str, target: str, shape: tuple[int, int], first: bool, tmp_path: Path
) -> None:
    weight = weight_of(form, size, share, target, shape, first)
    found, exact = decoded(weight, 64, tmp_path), weight.dequantize().double()
    assert weight.outliers is not None and weight.scheme.outliers is not None
    assert torch.equal(found, exact.to(_DTYPES[target]))  # each number rounded once
    if not weight.scheme.has_table:
        columns = outlier_columns(weight.outliers)
        assert torch.equal(found.gather(1, columns), outlier_values(weight.outliers, weight.scheme.outliers.dtype))
