"""`tersor doctor`: complete on any machine, right about what is missing, and able to compile ahead."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fakes import FakeGpu
from helpers.jit_kernels import axpy
from safetensors.torch import save_file

from tersor import formats, hardware, ops
from tersor.cli import doctor
from tersor.cli.main import run
from tersor.errors import UnsupportedError
from tersor.kernels.jit import KernelSource, nvrtc
from tersor.ops import Reason


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, whatever the machine."""
    FakeGpu().install(monkeypatch)


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["doctor", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_machine_without_a_gpu(capsys: pytest.CaptureFixture[str], cache_dir: Path) -> None:
    found = report(capsys)
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["versions"]["NVRTC"] == "{}.{}".format(*nvrtc.version())
    assert found["gpus"] == []
    assert found["cache"] == {"directory": str(cache_dir / "jit"), "entries": 0, "bytes": 0}
    assert found["environment"]["TERSOR_CACHE_DIR"] == str(cache_dir)
    assert found["environment"]["TERSOR_KERNEL"] is None
    assert found["advice"] == ["torch is built without CUDA: everything runs on the CPU"]
    kernels = found["kernels"]
    assert len(kernels) == len(formats.scheme_names()) * len(doctor.DTYPES) * len(doctor.TOKENS)
    assert {entry["kernel"] for entry in kernels} == {"reference"}
    assert {entry["why"] for entry in kernels} == {"torch sees no CUDA device"}


def test_the_page_has_every_section_on_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERSOR_JIT_JOBS", "3")
    assert run(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    titles = ["Versions", "GPUs", "Who serves a linear", "Compiled kernels", "Environment", "Advice"]
    assert [line for line in lines if line in titles] == titles
    assert "none torch sees no CUDA device" in lines
    assert "float16, bfloat16, float32 all reference reference torch sees no CUDA device" in lines
    assert "TERSOR_JIT_JOBS 3" in lines and "TERSOR_KERNEL auto (not set)" in lines
    assert "holds 0 kernels, 0 B" in lines


def test_what_is_missing_is_said_and_is_no_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version

    def installed(package: str) -> str:
        if package in ("transformers", "cuda-core"):
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    def absent() -> tuple[int, int]:
        raise UnsupportedError("NVRTC is missing: install it")

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(nvrtc, "version", absent)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = report(capsys)
    assert [found["versions"][name] for name in ("transformers", "cuda-core", "NVRTC")] == [None, None, None]
    assert [line.split(",")[0].split(":")[0] for line in found["advice"]] == [
        "NVRTC is missing",
        "transformers is missing",
        "torch is built for CUDA 13.0 but sees no GPU",
    ]


def test_gpus_are_described(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(hardware.CHIPS["NVIDIA A100"], name="NVIDIA T4", capability=(7, 5), sms=40)
    FakeGpu("NVIDIA H200", old).install(monkeypatch)
    assert run(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "cuda:0 NVIDIA H200, compute capability 9.0, 132 multiprocessors, 100.0 GB of 150.0 GB free" in text
    assert "kernels are built for sm_90a cuda:1 NVIDIA T4" in text and "no kernel can be built for it" in text
    assert "float16, bfloat16 all fused fused" in text


def test_formats_that_fare_alike_share_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explain(scheme: formats.Scheme, oc: int, ic: int, n: int, dtype: torch.dtype) -> Reason:
        if dtype == torch.float32:
            return Reason("reference", "kernels take no float32")
        if scheme.has_zero_point:
            return Reason("reference", "zero [points]")
        return Reason("fused", f"{n} tokens, tile {scheme.format.bits}") if n == 1 else Reason("decode", "many")

    monkeypatch.setattr(ops, "explain", explain)
    assert run(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    names = formats.scheme_names()
    with_zero = [name for name in names if name.startswith("uint")]
    assert "float32 all reference reference kernels take no float32" in lines
    page = " ".join(lines)
    assert f"float16, bfloat16 {', '.join(with_zero)} reference reference zero [points]" in page
    assert "fp8_e4m3" in page and page.count("tile 6") == 0


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb\nGCC version: 12.2.0\n", "535.161.08"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n", "580.95.05"),
        ("something else\n", None),
    ],
)
def test_the_driver_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(hardware, "_DRIVER_FILE", tmp_path / "version")
    assert hardware.driver_version() == version


QUANTIZATION = {
    "quant_method": "tersor",
    "version": 1,
    "format": "fp6_e3m2",
    "overrides": {"down_proj": {"format": "int8", "group_size": 64}, "v_proj": {"format": "uint4"}},
}


def write_model(folder: Path, **config: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file({"model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    return str(folder)


def test_warm_compiles_what_the_model_needs_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, torch.dtype, str]] = []

    def kernels_for(
        scheme: formats.Scheme, dtype: torch.dtype, chip: Any, activations: str, gated: bool
    ) -> list[KernelSource]:
        assert (activations, gated) == ("16bit", False)
        asked.append((scheme.key(), dtype, chip.name))
        return [] if scheme.has_zero_point else [axpy(scheme.format.bits), axpy(0)]

    monkeypatch.setattr(ops, "kernels_for", kernels_for)
    model = write_model(tmp_path / "model", quantization_config=QUANTIZATION, dtype="bfloat16")
    warm = report(capsys, "--warm", model, "--chip", "NVIDIA H100")["warm"]
    assert asked == [
        ("fp6_e3m2:row:float16", torch.bfloat16, "NVIDIA H100"),
        ("int8:g64:float16", torch.bfloat16, "NVIDIA H100"),
        ("uint4:row:float16", torch.bfloat16, "NVIDIA H100"),
    ]
    assert (warm["kernels"], warm["from_cache"], warm["architectures"]) == (3, 0, ["sm_90a"])
    found = report(capsys, "--warm", model, "--chip", "NVIDIA H100")
    assert (found["warm"]["kernels"], found["warm"]["from_cache"], found["cache"]["entries"]) == (3, 3, 3)
    assert run(["doctor", "--warm", model, "--chip", "NVIDIA H100"]) == 0
    assert "3 kernels for sm_90a, 3 of them there" in capsys.readouterr().out


def test_warm_asks_for_real_kernels_in_both_dtypes_where_the_model_names_neither(tmp_path: Path) -> None:
    from tersor.hardware import CHIPS

    schemes, dtypes = doctor._needs("m", {"quantization_config": {**QUANTIZATION, "overrides": {}}, "dtype": "float32"})
    assert dtypes == ["float16", "bfloat16"]
    names = [source.name for source in doctor._sources(schemes, dtypes, CHIPS["NVIDIA A100"])]
    assert len(names) >= 4
    assert any("fp6_e3m2_float16" in name for name in names)
    assert any("fp6_e3m2_bfloat16" in name for name in names)


def test_warm_knows_8_bit_activations_and_joined_layers(tmp_path: Path) -> None:
    from tersor.hardware import CHIPS

    scheme, chip = formats.get_scheme("fp6_e3m2"), CHIPS["NVIDIA H100"]
    plain = {source.name for source in doctor._sources([scheme], ["float16"], chip)}
    joined = {source.name for source in doctor._sources([scheme], ["float16"], chip, fuse=True)}
    eight = {source.name for source in doctor._sources([scheme], ["float16"], chip, "fp8")}
    assert plain < joined
    assert "tersor_quantize_activations_float16" in eight
    assert all("float8_e4m3fn" in name for name in eight if "linear" in name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chip", "NVIDIA H100"], "--chip says what --warm compiles for: add --warm MODEL"),
        (["--activations", "fp8"], "--activations says what --warm compiles for: add --warm MODEL"),
        (["--fuse"], "--fuse says what --warm compiles for: add --warm MODEL"),
        (["--warm", "MODEL", "--chip", "NVIDIA H10"], "unknown chip 'NVIDIA H10', did you mean 'NVIDIA H100'?"),
        (["--warm", "MODEL"], "torch sees no GPU to compile for: name one with --chip (NVIDIA A100"),
        (["--warm", "PLAIN"], "is not compressed, so it needs no kernels: run tersor quantize first"),
        (["--warm", "no/such/folder/anywhere"], "no directory no/such/folder/anywhere"),
        (["--cheap"], "No such option: --cheap"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    models = {
        "MODEL": write_model(tmp_path / "model", quantization_config=QUANTIZATION),
        "PLAIN": write_model(tmp_path / "plain"),
    }
    assert run(["doctor", *(models.get(argument, argument) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("tersor: ") and words.lower() in captured.err.lower()


def test_a_malformed_setting_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSOR_KERNEL", "fastest")
    FakeGpu("NVIDIA H200").install(monkeypatch)
    assert run(["doctor"]) == 2
    assert "environment variable TERSOR_KERNEL is 'fastest'" in capsys.readouterr().err
