"""`tersor bench` on a GPU: sound times, a table that is obeyed, and right products from every configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tersor import formats, hardware, ops
from tersor.bench import linear
from tersor.bench.shapes import Shape
from tersor.cli.main import run
from tersor.compress import quantize_rtn
from tersor.kernels import tune
from tersor.kernels.tune import choice, table
from tersor.layouts import PackedWeight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FP6 = formats.get_scheme("fp6_e3m2")


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables of measured choices in a folder of this test; compiled kernels stay where they are."""
    monkeypatch.setattr(table, "user_path", lambda chip: tmp_path / "tune" / f"{table.slug(chip)}.json")
    choice.forget()
    yield
    choice.forget()


def test_linear(tmp_path: Path, own_tables: None, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "linear.json"
    rivals = ["cublas", "fp8"] if torch.cuda.get_device_capability() >= (8, 9) else ["cublas"]
    arguments = ["2048x2048", "--n", "1,8", "--against", ",".join(rivals), "--output", str(path)]
    assert run(["bench", "linear", *arguments]) == 0
    out = capsys.readouterr().out
    assert "x cuBLAS" in out
    assert "fp6_e3m2, pdl" in out
    result = json.loads(path.read_text())
    assert (result["kind"], result["version"], result["skipped"]) == (linear.KIND, linear.VERSION, [])
    assert result["environment"]["gpu"] == torch.cuda.get_device_name()
    assert result["read_bandwidth"] > 1e11
    kernels = [("fp6_e3m2", "pdl"), *((name, "plain") for name in ("fp6_e3m2", *rivals))]
    assert {(row["kernel"], row["chain"], row["n"]) for row in result["rows"]} == {
        (kernel, chain, n) for kernel, chain in kernels for n in (1, 8)
    }
    assert all(0.3 < row["microseconds"] < 100 for row in result["rows"])
    nbytes = {row["weight_bytes"] for row in result["rows"] if row["kernel"] == "fp6_e3m2"}
    assert nbytes == {2048 * 2048 * 6 // 8 + 2048 * 2}


def test_pruned_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rooflines are of the bytes that a random mask leaves, the last format's as they are stored."""
    path = tmp_path / "pruned.json"
    formats_of = ["--format", "fp6_e3m2", "--format", "fp16", "--format", "int4:g128"]
    arguments = ["2048x1024", "--n", "1,8,300", "--sparsity", "0.5", "--against", "cublas", "--output", str(path)]
    assert run(["bench", "linear", *arguments, *formats_of, "--chain", "pdl"]) == 0
    assert "fp6_e3m2:s50, pdl" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["skipped"] == [] and len(result["rows"]) == 12
    bits = {row["kernel"]: row["weight_bytes"] * 8 / 2048 / 1024 for row in result["rows"]}
    assert 2.9 < bits["int4:g128:s50"] < 3.5
    if torch.cuda.get_device_capability() == (9, 0):
        assert 5.0 < bits["fp6_e3m2:s50"] < 6.0 and 9.0 < bits["float16:s50"] < 10.5


def test_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experts.json"
    arguments = ["olmoe", "--n", "1,64", "--against", "torch,compiled", "--output", str(path)]
    assert run(["bench", "experts", *arguments]) == 0
    out = capsys.readouterr().out
    assert "x torch" in out
    result = json.loads(path.read_text())
    assert result["skipped"] == []
    for n in (1, 64):
        rows = [row for row in result["rows"] if row["n"] == n]
        for program in ("torch", "compiled"):
            assert {row["way"] for row in rows if row["kernel"] == program} == {"grouped_mm", "batched_mm"}
        (ours,) = [row for row in rows if row["kernel"] == "fp6_e3m2"]
        assert 0.5 * ours["hit_bytes"] / result["read_bandwidth"] < ours["microseconds"] * 1e-6 < 1e-3
    assert {row["experts_hit"] for row in result["rows"] if row["n"] == 1} == {8}


def test_a_chain_keeps_the_size_of_its_values() -> None:
    from tersor.bench import contenders

    weights = contenders.packed(FP6, 2048, 2048, torch.float16)[:16]
    x = contenders.random(4, 2048, torch.float16)
    outputs: list[torch.Tensor] = []
    real = ops.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "linear", lambda x, w: outputs.append(real(x, w)) or outputs[-1])
        for call in contenders.chained(weights, x, early=True):
            call()
    assert len(outputs) == 16
    assert all(0.3 < float(y.float().std()) < 3 for y in outputs)


def test_tune(tmp_path: Path, own_tables: None, capsys: pytest.CaptureFixture[str]) -> None:
    chip = hardware.of_device(torch.cuda.current_device())
    problems = [linear.problem_of(Shape(2048, 1024), FP6, n) for n in (1, 8)]
    assert choice.measured(problems[0], chip) is None
    assert run(["bench", "tune", "2048x1024", "--n", "1,8", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    path = Path(shown["table"])
    assert path == table.user_path(chip)
    assert shown["chip"] == chip.name
    assert [(row["oc"], row["ic"], row["n"]) for row in shown["choices"]] == [(2048, 1024, 1), (2048, 1024, 8)]
    assert all(0.3 < row["microseconds"] < 100 for row in shown["choices"])
    held = table.read(path, chip, table.kernels_hash())
    assert list(held.choices) == problems
    for problem in problems:
        assert tune.choose(problem, chip) == held.choices[problem].config
        assert held.choices[problem].config in tune.candidates(problem, chip)
    output = tmp_path / "other.json"
    assert run(["bench", "tune", "2048x1024", "--n", "8", "--output", str(output)]) == 0
    assert len(table.read(output, chip).choices) == 1


@pytest.mark.parametrize(("ic", "group_size"), [(1000, None), (1001, None), (1024, 128)])
def test_the_operator_asks_for_the_problem_that_is_measured(
    ic: int, group_size: int | None, own_tables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tune.LinearProblem] = []
    monkeypatch.setattr(choice, "measured", lambda problem, chip: asked.append(problem))
    scheme = formats.get_scheme("fp6_e3m2", group_size)
    encoded = quantize_rtn(torch.randn(264, ic, device="cuda"), scheme)
    weight = PackedWeight.from_encoded(encoded)
    packed = weight.to_layout(ops.preferred_layout(scheme, torch.float16, weight.data.device))
    ops.linear(torch.randn(7, ic, dtype=torch.float16, device="cuda"), packed)
    assert asked == [linear.problem_of(Shape(264, ic), scheme, 7)]


@pytest.mark.parametrize(("oc", "ic", "n"), [(200, 512, 8), (256, 1000, 33), (384, 512, 100)])
def test_every_configuration_gives_the_product(oc: int, ic: int, n: int) -> None:
    chip = hardware.of_device(torch.cuda.current_device())
    torch.manual_seed(0)
    weight = PackedWeight.from_encoded(quantize_rtn(torch.randn(oc, ic, device="cuda"), FP6))
    packed = weight.to_layout(ops.preferred_layout(FP6, torch.float16, weight.data.device))
    x = torch.randn(n, ic, dtype=torch.float16, device="cuda")
    exact_weight = weight.dequantize().double()
    exact = x.double() @ exact_weight.T
    allowed = formats.product_tolerance(x.double(), exact_weight, torch.float16)
    options = tune.candidates(linear.problem_of(Shape(oc, ic), FP6, n), chip)
    if not options:
        pytest.skip("no fused kernel takes so many tokens here")
    for config in options:
        for early in (True, False):
            with ops.using(config=config, early=early):
                y = ops.linear(x, packed)
            worst = float(((y.double() - exact).abs() / allowed).max())
            assert worst <= 1, f"{config}, early {early}: error is {worst:.2f} of what is allowed"
