"""GPUs that nobody here has: what dispatch chooses on each, and that docs/gpus.md says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.fakes import FakeGpu

from tersor import ops
from tersor.cli.main import run
from tersor.compress.rtn import quantize_rtn
from tersor.formats import Activations, Mix, Sparse, get_scheme, scheme_names
from tersor.hardware import CHIPS, Chip
from tersor.kernels import attention, attention_sm90, tune
from tersor.kernels.jit import arch_for
from tersor.kernels.tune import experts, sm80
from tersor.layouts import PackedWeight
from tersor.layouts.packing import Packing
from tersor.ops import dispatch, mixed_launch, norm, outlier_sums, sparse_layout

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "gpus.md"
OTHERS = {
    "NVIDIA A100": "sm_80",
    "NVIDIA GeForce RTX 3090": "sm_86",
    "NVIDIA L4": "sm_89",
    "NVIDIA B200": "sm_100",
    "NVIDIA GeForce RTX 5090": "sm_120",
}
"""Chip -> what is compiled for it."""
COLUMNS = {(8, 0): 1, (8, 6): 1, (8, 9): 1, (9, 0): 2, (10, 0): 3, (12, 0): 3}
"""Compute capability -> column of the table."""
CUDA, HALF = torch.device("cuda", 0), torch.float16


@pytest.fixture(params=[*OTHERS, "NVIDIA H200"])
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Chip:
    """A machine with one such GPU."""
    FakeGpu(request.param).install(monkeypatch)
    return CHIPS[request.param]


def dense(tokens: int) -> str:
    found = {
        ops.explain(get_scheme(name), 4096, 4096, tokens, HALF).kernel
        for name in scheme_names()
        if not dispatch.unsupported_reason(get_scheme(name), HALF, CUDA)
    }
    return {"fused": "fused", "dequantize + cuBLAS": "decoded"}[found.pop() if len(found) == 1 else "differ"]


def mixed(chip: Chip) -> str:
    mix = Mix((get_scheme("int8"), get_scheme("uint4")))
    return "a product" if mixed_launch.reason(mix, "tiles_float16", 4096, HALF, chip) else "one launch"


def outliers(chip: Chip) -> str:
    problem = tune.LinearProblem.of(Packing.of(get_scheme("int4"), "float16"), (4096, 4096), 8)
    return "in the product" if tune.choose_beside(problem, 1, chip) is not None else "a kernel ahead"


def of_experts(chip: Chip, sets: int = 1) -> str:
    problem = experts.ExpertsProblem.of(Packing.of(get_scheme("int4"), "float16"), (8, 512, 512), 100, 2)
    if sets > 1:
        return "one launch" if experts.together((problem,) * sets, chip) else "a launch a level"
    (up,), _ = experts.choose_sets((problem,), (problem,), chip)
    return "fused (`mma" if isinstance(up, experts.Sm80ExpertsConfig) else "fused (`wgmma"


def prefill(chip: Chip) -> str:
    taken = attention_sm90.takes(attention.Kind(head_dim=128, dtype="float16"), chip)
    return "kernel (`wgmma" if taken else "kernel (`mma"


ROWS: dict[str, Callable[[Chip], str]] = {
    "dense, up to 64 tokens": lambda chip: dense(64),
    "dense, more tokens": lambda chip: dense(65),
    "outliers": outliers,
    "mixed weights": mixed,
    "pruned weights": lambda chip: (
        "decoded" if sparse_layout.chip_reason(Sparse(get_scheme("int8")), (64, 64), HALF, chip) else "fused or decoded"
    ),
    "experts, any number of tokens": of_experts,
    "experts of a mix": lambda chip: of_experts(chip, 2),
    "8-bit activations": lambda chip: {"fused": "fused", "reference": "none"}[
        ops.explain(get_scheme("int8"), 4096, 4096, 8, HALF, activations="int8").kernel
    ],
    "attention, more new tokens": prefill,
    "kernels that start before": lambda chip: "most" if norm.launched_early(CUDA) else "none",
}
"""Start of a row of the table -> what stands at the start of a chip's cell."""


@pytest.mark.parametrize("row", ROWS)
def test_the_table_says_what_dispatch_chooses(chip: Chip, row: str) -> None:
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {row}")]
    cells = [cell.strip() for cell in lines[0].split("|")[1:]]
    assert len(lines) == 1 and cells[COLUMNS[chip.capability]].startswith(ROWS[row](chip))


def test_every_capability_of_a_known_chip_is_in_the_table() -> None:
    assert {chip.capability for chip in CHIPS.values()} == set(COLUMNS)
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"{major}.{minor}" in text for major, minor in COLUMNS)


@pytest.mark.parametrize("name", OTHERS)
def test_a_gpu_gets_a_binary_of_its_own_and_no_kernel_of_hopper(name: str) -> None:
    chip = CHIPS[name]
    assert arch_for(chip.capability) == OTHERS[name]
    for scheme in map(get_scheme, ("fp6_e3m2", "uint4", "int8")):
        sources = ops.kernels_for(scheme, HALF, chip)
        assert len(sources) == len(sm80.TILES) + 2 and not any("sm90" in source.header for source in sources)
        assert not ops.kernels_for(scheme, HALF, chip, Activations.INT8 if scheme.format.name == "int8" else "fp8")
    weight = PackedWeight.from_encoded(quantize_rtn(torch.ones(64, 128), get_scheme("int4")))
    assert not outlier_sums.inside(weight.to_layout("tiles_float16"), HALF, chip.capability)


@pytest.mark.parametrize("name", OTHERS)
def test_doctor_says_who_serves_a_linear_there(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeGpu(name).install(monkeypatch)
    assert run(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"kernels are built for {OTHERS[name]}" in text and "float16, bfloat16 all fused dequantize + cuBLAS" in text
    assert "needs compute capability 9.0" in re.sub("need compute", "needs compute", text)


@pytest.mark.parametrize("name", OTHERS)
def test_a_plan_and_a_dry_run_of_times_need_no_such_gpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    chip = name.removeprefix("NVIDIA ").replace(" ", "-").lower()
    assert run(["plan", "llama-3-8b", "--devices", "2", "--chip", chip, "--batch", "4", "--context", "1024"]) == 0
    assert f"2 x {name}" in capsys.readouterr().out
    assert run(["bench", "linear", "4096x4096", "--n", "1,256", "--dry-run", "--chip", chip]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "sm80 schedule" in text and "decoded once for cuBLAS" in text


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 5090"])
def test_a_card_has_splits_for_its_own_multiprocessors_and_shared_memory(name: str) -> None:
    """82 or 170 of them, with 99 KB a block, not the 132 of an H200 with 227 KB: one wave, of a CTA each at least."""
    chip = CHIPS[name]
    problem = tune.LinearProblem.of(Packing.of(get_scheme("fp6"), "float16"), (4096, 4096), 1)
    config = tune.choose(problem, chip)
    assert 0.9 * chip.sms < config.ctas <= chip.sms * config.resident
    assert config.resident * config.shared_bytes <= chip.shared_bytes
    slower = replace(chip, bandwidth=chip.bandwidth / 2)
    assert tune.seconds(problem, config, slower) > 1.5 * tune.seconds(problem, config, chip)


def test_a_gpu_without_a_table_of_its_own_is_predicted_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERSOR_CACHE_DIR", str(tmp_path))
    tune.choice.forget()
    problem = tune.LinearProblem.of(Packing.of(get_scheme("fp6"), "float16"), (4096, 4096), 1)
    unknown = replace(CHIPS["NVIDIA L4"], name="NVIDIA GeForce RTX 4070", sms=46, bandwidth=504e9, l2_bytes=36 << 20)
    assert tune.choose(problem, unknown) == tune.predict(problem, unknown)
