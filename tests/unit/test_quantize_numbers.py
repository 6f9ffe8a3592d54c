"""Numbers at the edges of a whole conversion: errors, warnings and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints
from safetensors.torch import save_file
from typer.testing import CliRunner

from tersor.cli.main import app
from tersor.convert import quantize
from tersor.integrations.transformers import TersorConfig

DOWN = "model.layers.0.mlp.down_proj.weight"


def changed(directory: Path, change: Any, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A small llama whose `DOWN` is what `change` makes of it."""
    source = checkpoints.save("llama", directory, dtype=dtype)
    tensors = checkpoints.weights(source)
    tensors[DOWN] = change(tensors[DOWN])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


def test_rows_that_vanish_are_warned_about_by_number_and_tensor(tmp_path: Path) -> None:
    def shrink(weight: torch.Tensor) -> torch.Tensor:
        weight[[3, 7, 9, 20, 63]] *= 1e-9
        return weight

    source = changed(tmp_path / "model", shrink)
    report = quantize(source, tmp_path / "out")
    (line,) = report.warnings
    assert line.startswith(f"{DOWN}: rows 3, 7, 9 and 2 more: weights too small for float16 scales ")
    assert line.endswith("use bfloat16 scales (--scale-dtype)") and "\n" not in line
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["warnings"] == [line]
    assert quantize(source, tmp_path / "wide", scale_dtype="bfloat16").warnings == ()
    result = CliRunner().invoke(app, ["quantize", str(source), "-o", str(tmp_path / "again"), "--json"])
    assert result.exit_code == 0 and f"warning: {line}" in result.stderr
    assert json.loads(result.stdout)["warnings"] == [line]


def test_compression_while_loading_warns_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = changed(tmp_path / "model", lambda weight: weight * 1e-12)
    with pytest.warns(UserWarning, match=rf"tensor '{DOWN}': rows 0, 1, 2 and 61 more: .* use bfloat16 scales"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=TersorConfig(format="int4"))


def test_a_resumed_run_keeps_its_warnings(tmp_path: Path) -> None:
    from tersor.convert.report import Row

    row = Row("a", (1, 1), "F32", "int4:row:float16", 4.0, 4, 1, 0.5, "", "row 0: small")
    import dataclasses

    assert Row.from_dict(json.loads(json.dumps(dataclasses.asdict(row)))) == row


@pytest.mark.parametrize("factor", [1e-35, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_error_of_a_layer_does_not_depend_on_its_magnitude(
    tmp_path: Path, factor: float, dtype: torch.dtype
) -> None:
    source = changed(tmp_path / "model", lambda weight: (weight.double() * factor).to(dtype))
    report = quantize(source, tmp_path / "out", scale_dtype="float32")
    row = next(row for row in report.rows if row.name == DOWN)
    assert row.relative_error == pytest.approx(0.025, abs=0.01) and not report.warnings
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_tensor_of_zeros_has_no_error_and_no_warning(tmp_path: Path) -> None:
    report = quantize(changed(tmp_path / "model", torch.zeros_like), tmp_path / "out")
    assert next(row for row in report.rows if row.name == DOWN).relative_error == 0 and not report.warnings


def test_infinities_of_a_config_are_json_and_mean_the_same(tmp_path: Path) -> None:
    from transformers import AutoConfig

    source = checkpoints.save("llama", tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["limits"] = [0.0, float("inf"), {"low": float("-inf"), "none": float("nan")}]
    (source / "config.json").write_text(json.dumps(config))
    for export in ("tersor", "compressed-tensors"):
        quantize(source, tmp_path / export, format="int4", export=export)
        written = (tmp_path / export / "config.json").read_text()
        json.loads(written, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        read = AutoConfig.from_pretrained(tmp_path / export).limits
        assert read[:2] == [0.0, float("inf")] and read[2]["low"] == float("-inf")
        assert read[2]["none"] != read[2]["none"]
