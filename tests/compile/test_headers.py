"""Headers stand on their own: what is included before one of them carries no meaning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tersor.formats import Activations, get_scheme
from tersor.hardware import chip_named
from tersor.kernels import (
    attention,
    attention_sm90,
    deciding,
    decode_attention,
    dense,
    experts,
    jit,
    mixed,
    norms,
    routing,
    sampling,
    sparse,
)
from tersor.kernels.jit import KernelSource, nvrtc
from tersor.kernels.tune import experts as tune_experts
from tersor.kernels.tune import sm90
from tersor.kernels.tune import sparse as tune_sparse
from tersor.layouts.packing import Packing
from tersor.layouts.sparse_packing import SparsePacking

CUDA = Path(jit.__file__).parents[1] / "cuda"
ARCH = "compute_90a"
"""PTX: a header's names and types are checked, and nothing is made into machine code."""


def whole(name: str) -> KernelSource:
    """A kernel whose parameters are those of a header that defines no kernel itself, of the schedule that it is of."""
    if name.startswith("attention/sm90"):
        return attention_sm90.prefill_source(attention.Kind(head_dim=80, dtype="float16"), chip_named("H200"))
    if name == "attention/wide.cuh":
        return attention.prefill_source(attention.Kind(head_dim=128, dtype="float16", e4m3=True), chip_named("H200"))
    if name.startswith("attention/"):
        kind = attention.Kind(head_dim=128, dtype="float16", e4m3=True)
        return decode_attention.decode_source(kind, 1, chip_named("H200"))
    if name in ("experts/choice.cuh", "experts/logits.cuh"):
        router = routing.Router(target="float16", float_weight=True, float_out=True, channels=4096)
        choice = routing.Choice(experts=60, top_k=4, biased=True, groups=4, top_groups=2)
        return deciding.source(deciding.Decider(router=router, choice=choice, norms=True), 1)
    if name in ("experts/fetch.cuh", "experts/sm90_cta.cuh", "experts/sm90_work.cuh"):
        problem = tune_experts.ExpertsProblem.of(Packing.of(get_scheme("uint4", 64), "float16"), (1, 128, 128), 1, 1)
        config = tune_experts.config(problem, sm90.Tile(16, 1, 4, 1, 1), chip_named("H200"))
        return experts.source(Packing.of(get_scheme("uint4", 64), "float16"), "float16", config, 1, False)
    if name.startswith("mixed/sm90_level"):
        packings = tuple(Packing.of(get_scheme(*level), "float16") for level in (("uint4", 64), ("int8", None)))
        source = mixed.source(packings, "float16", sm90.Tile(16, 1, 4, 1, 1), chip_named("H200"), 1)
        number = {"LEVEL": 1} if name == "mixed/sm90_level.cuh" else {}
        return replace(source, parameters={**source.parameters, **number})
    if name.startswith("sparse/"):
        tile = tune_sparse.tile_for(16, chip_named("H200"))
        return sparse.sparse_source(SparsePacking.of(get_scheme("fp8_e4m3"), "float16"), tile)
    if name.startswith("sampling/"):
        return sampling.choose_source("float16")
    if name in ("common/quantized.cuh", "small/norms.cuh"):
        return norms.norm_source("float16", False, 4096, Activations.INT8)
    sources = dense.sources(Packing.of(get_scheme("uint4", 64), "float16"), chip_named("H200"), gate=1)
    schedule = "sm80" if "sm80" in name else "sm90"
    return next(source for source in sources if source.header == f"dense/{schedule}_linear.cuh")


def parts() -> list[str]:
    """The headers that define no kernel."""
    names = sorted(str(path.relative_to(CUDA)) for path in CUDA.rglob("*.cuh"))
    return [name for name in names if "TERSOR_ENTRY" not in (CUDA / name).read_text(encoding="utf-8")]


def alone(name: str, **changes: str) -> KernelSource:
    """A kernel that does nothing, of a text that includes one header and nothing else."""
    text = f'#include "{name}"\nextern "C" __global__ void TERSOR_ENTRY(int* x) {{ *x = 0; }}\n'
    texts = {"alone.cuh": text, **changes}
    return KernelSource("tersor_test_alone", "alone.cuh", whole(name).parameters, "P", texts=texts)


@pytest.mark.parametrize("name", parts())
def test_a_header_needs_no_other_before_it(name: str) -> None:
    assert nvrtc.compile_source(alone(name), ARCH).data


def test_a_header_that_forgets_an_include_is_noticed() -> None:
    text = (CUDA / "common" / "scales.cuh").read_text(encoding="utf-8")
    changed = {"common/scales.cuh": text.replace('#include "common/tile.cuh"\n', "")}
    with pytest.raises(nvrtc.CompileError, match="tile"):
        nvrtc.compile_source(alone("common/scales.cuh", **changed), ARCH)


def test_every_folder_has_such_headers() -> None:
    folders = {"attention", "common", "dense", "experts", "mixed", "sampling", "small", "sparse"}
    assert {name.split("/")[0] for name in parts()} == folders
