"""A format, a mix or pruned weights without a kernel: said before the work starts, by the GPU that is there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from helpers import calibrated

import tersor
from tersor.cli.main import main
from tersor.convert import kernels
from tersor.convert.pipeline import Pipeline
from tersor.hardware import CHIPS

TEXT: dict[str, Any] = {"calibration_tokens": 64, "calibration_window": 32, "algorithm": "rtn"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kernels")
    calibrated.model("llama", made / "model", num_hidden_layers=1)
    calibrated.text(made / "text.txt")
    return made


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said when the first weight is written."""
    said: list[str] = []
    run = Pipeline.run

    def running(self: Pipeline, *rest: Any) -> None:
        said.extend(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
        run(self, *rest)

    monkeypatch.setattr(Pipeline, "run", running)
    monkeypatch.setattr(kernels, "gpu_of", lambda device: None)
    return said


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"format": "fp6_e1m4"}, ["fp6_e1m4:row:float16 has no kernel beside float16 or bfloat16 activations (no "]),
        ({"format": "int4", "group_size": 8}, ["int4:g8:float16 has no kernel beside .* (group size 8 is not a mul"]),
        ({"overrides": ["down_proj=fp8_e3m4"]}, ["fp8_e3m4:row:float16 has no kernel"]),
        ({"format": "fp6"}, []),
        ({"format": "lut3"}, []),
        ({"target_bits": 6.0, "levels": ["fp4_e2m1", "fp8_e3m4"], **TEXT}, ["fp8_e3m4:row:float16 has no kernel"]),
        ({"target_bits": 6.0, "levels": ["fp4_e2m1", "int8"], **TEXT}, []),
    ],
)
def test_schemes_without_a_kernel_on_any_gpu_are_said_before_the_work(
    folder: Path, tmp_path: Path, begun: list[str], options: dict[str, Any], lines: list[str]
) -> None:
    given = {"calibration": folder / "text.txt"} if "levels" in options else {}
    tersor.quantize(folder / "model", tmp_path / "out", **given, **options)
    assert len(begun) == len(lines)
    for said, line in zip(begun, lines, strict=True):
        assert all(part in said for part in line.split(" .* "))


def test_a_gpu_says_what_it_has_no_kernel_for(
    folder: Path, tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "gpu_of", lambda device: CHIPS["NVIDIA A100"])
    mixed = {"target_bits": 6.0, "levels": ["fp4_e2m1", "int8"], "calibration": folder / "text.txt", **TEXT}
    tersor.quantize(folder / "model", tmp_path / "mixed", **mixed)
    (line,) = begun
    assert line.startswith("one launch for all levels of a layer needs compute capability 9.0, and ")
    assert line.endswith(" has 8.0: each will be a launch")
    begun.clear()
    monkeypatch.setattr(kernels, "gpu_of", lambda device: "compute capability 7.5 is older than the kernels need")
    tersor.quantize(folder / "model", tmp_path / "old", format="fp6")
    assert any(line.startswith("no kernel will multiply the weights on this GPU, but the reference") for line in begun)


def test_pruned_weights_are_said_of_where_a_gpu_expands_them(
    folder: Path, tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "gpu_of", lambda device: CHIPS["NVIDIA A100"])
    tersor.prune(folder / "model", tmp_path / "out", sparsity=0.5, algorithm="magnitude", values="fp32")
    assert any("a product with pruned weights as they lie needs compute capability 9.0" in line for line in begun)


def test_the_command_says_it_on_stderr_and_an_export_is_for_other_engines(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "gpu_of", lambda device: None)
    for export, said in (("tersor", True), ("compressed-tensors", False)):
        arguments = [str(folder / "model"), "--format", "int4", "--group-size", "8", "--export", export, "--dry-run"]
        with pytest.raises(SystemExit) as ended:
            main(["quantize", *arguments])
        assert not ended.value.code
        assert ("has no kernel beside" in capfd.readouterr().err) is said
