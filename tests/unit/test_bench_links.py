"""Links of a machine, measured: processes on CPUs stand in for GPUs, and a plan takes what they wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.fakes import FakeGpu

from tersor.bench import links as measuring
from tersor.cli.main import run
from tersor.errors import InputError, OutputError
from tersor.hardware import chip_named
from tersor.planner import links

PAYLOADS = (1 << 10, 1 << 16)


def test_two_processes_measure_what_a_plan_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measuring.measured(2, chip_named("h200"), PAYLOADS, gpus=False, calls=1)
    path = tmp_path / "links.json"
    measuring.write(path, found)
    tables = links.read(path)
    assert tables.chip == "NVIDIA H200" and tables.reach == 2 and tables.one_shot is None
    for operation in links.OPERATIONS:
        one = tables.exchange(operation, PAYLOADS[0], (2,))
        assert one.seconds > 0 and one.source.startswith("measured: gloo on CPUs"), operation
        assert "estimate, not measured" in tables.exchange(operation, PAYLOADS[0], (1, 1)).source
    words = ["plan", "llama-3-70b", "--devices", "2", "--chip", "h200", "--links", str(path)]
    assert run(words) == 0
    assert "links: links.json" in capsys.readouterr().out
    assert run([*words, "--pipeline-parallel", "2", "--explain", "pipeline"]) == 0
    assert "measured: gloo" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_measured_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeGpu().install(monkeypatch)
    with pytest.raises(InputError, match="links of 1 rank"):
        measuring.measured(1, chip_named("h200"))
    with pytest.raises(InputError, match="links of 2 GPUs: torch sees 0 here"):
        measuring.measured(2, chip_named("h200"))
    with pytest.raises(OutputError, match="cannot write"):
        measuring.write(tmp_path / "none" / "links.json", {})
    assert run(["plan", "calibrate", "--chip", "h200"]) == 2
    assert "say where the tables go" in capsys.readouterr().err


@pytest.mark.parametrize("ranks, tried", [(2, [2]), (5, [2, 3, 4, 5]), (8, [2, 3, 4, 6, 8]), (16, [2, 3, 4, 6, 8, 16])])
def test_groups_of_several_sizes_are_tried(ranks: int, tried: list[int]) -> None:
    assert measuring.sizes(ranks) == tried
