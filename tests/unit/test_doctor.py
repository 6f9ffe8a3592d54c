"""`tersor doctor`: complete on any machine, and right about what is missing."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fakes import FakeGpu

from tersor import formats, hardware, ops
from tersor.cli import doctor
from tersor.cli.main import run
from tersor.errors import UnsupportedError
from tersor.kernels.jit import nvrtc
from tersor.ops import Reason


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU and no driver, whatever the machine."""
    FakeGpu().install(monkeypatch)
    monkeypatch.setattr(hardware, "_DRIVER_FILE", tmp_path / "no driver")


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run(["doctor", "--json"]) == 0
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
    assert len(found["pruned"]) == len(doctor.PRUNED) * len(doctor.DTYPES) * len(doctor.TOKENS)
    assert {entry["why"] for entry in found["pruned"]} == {"torch sees no CUDA device"}


def test_the_page_has_every_section_on_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERSOR_JIT_JOBS", "3")
    assert run(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    titles = [
        "Versions",
        "GPUs",
        "Who serves a linear",
        "Who serves a linear that is half pruned",
        "Compiled kernels",
        "Environment",
        "Advice",
    ]
    assert [line for line in lines if line in titles] == titles
    assert "none torch sees no CUDA device" in lines
    assert "float16, bfloat16, float32 all reference reference torch sees no CUDA device" in lines
    assert "TERSOR_JIT_JOBS 3" in lines and "TERSOR_KERNEL auto (not set)" in lines
    assert "holds 0 kernels, 0 B" in lines


def test_a_key_is_not_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert report(capsys)["environment"]["TERSOR_API_KEY"] is None
    monkeypatch.setenv("TERSOR_API_KEY", "sesame")
    for words in (["doctor"], ["doctor", "--json"]):
        assert run(words) == 0
        shown = capsys.readouterr().out
        assert "(set)" in shown and "sesame" not in shown


def test_what_is_missing_is_said_and_is_no_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version

    def installed(package: str) -> str:
        if package in ("transformers", "cuda-bindings"):
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    def absent() -> tuple[int, int]:
        raise UnsupportedError("NVRTC is missing: install it")

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(nvrtc, "version", absent)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = report(capsys)
    assert [found["versions"][name] for name in ("transformers", "cuda-bindings", "NVRTC")] == [None, None, None]
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
    assert "slices of rows are decoded: pruned weights with scales in groups are not expanded" in text


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


@pytest.mark.parametrize(
    ("compiler", "driver", "least"),
    [
        ((13, 5), "550.54.15", "580"),
        ((13, 0), "580.65.06", ""),
        ((12, 8), "550.54.15", ""),
        ((12, 8), "470.10", "525"),
        ((13, 5), None, ""),
    ],
)
def test_a_driver_that_loads_no_binary_of_this_nvrtc_is_said(
    compiler: tuple[int, int], driver: str | None, least: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "version", lambda: compiler)
    monkeypatch.setattr(hardware, "driver_version", lambda: driver)
    said = [line for line in doctor.examine()["advice"] if "drivers from" in line]
    assert bool(said) is bool(least) and all(
        f"from {least} on, this one is {driver}: update it" in line for line in said
    )


@pytest.mark.parametrize("argument", ["--warm", "--cheap"])
def test_an_unknown_option_is_one_line_and_status_2(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", argument]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"tersor: No such option: {argument}")


def test_a_malformed_setting_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSOR_KERNEL", "fastest")
    FakeGpu("NVIDIA H200").install(monkeypatch)
    assert run(["doctor"]) == 2
    assert "environment variable TERSOR_KERNEL is 'fastest'" in capsys.readouterr().err


@pytest.mark.parametrize("started", [True, False])
def test_it_says_whether_programs_that_do_not_import_tersor_load_checkpoints(
    started: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("_tersor_hook.started", started)
    assert doctor.examine()["hook"] is started
    assert run(["doctor"]) == 0
    assert ("as random weights" in capsys.readouterr().out) is not started
