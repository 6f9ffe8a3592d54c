"""`tersor bench throughput` of several ranks: by a plan, under torchrun, and what is refused before that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tersor
from tersor.cli.main import run

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
ENGINE = [
    "--format",
    "16bit",
    "--device",
    "cpu",
    "--kv-bytes",
    "1000000",
    "--max-rows",
    "8",
    "--max-step-tokens",
    "256",
]
LOAD = ["--workload", "micro", "--requests", "24", "--order", "planned"]
SIZES = [word for size in ("prefix=128", "own=20", "output=4", "members=4") for word in ("--size", size)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a config.json alone."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    return tmp_path / "model"


def planned(model: Path, *words: str) -> Path:
    """A plan of one copy on two H200."""
    out = model.parent / "plan.json"
    asked = ["plan", str(model), "--devices", "2", "--copies", "1", "--chip", "h200", "-o", str(out)]
    assert run([*asked, *words]) == 0
    return out


def test_torchrun_times_a_plan_of_two_stages(model: Path) -> None:
    plan, out = planned(model, "--pipeline-parallel", "2"), model.parent / "found.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(tersor.__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tersor"]
    verb = ["run", str(plan), "bench", "throughput", str(model), *ENGINE, *LOAD, *SIZES, "-o", str(out)]
    done = subprocess.run([*torchrun, *verb], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("requests/s") == 2  # the heading of one table: the first rank alone prints
    found = json.loads(out.read_text(encoding="utf-8"))
    (row,) = found["rows"]
    assert row["output_tokens"] == 96 and row["steps"] > 1 and found["rooflines"] == {} and found["speeds"] is None


def test_what_cannot_be_timed_is_one_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = str(planned(model, "--pipeline-parallel", "2"))
    capsys.readouterr()

    def refused(*more: str) -> str:
        assert run(["bench", "throughput", str(model), *ENGINE, *LOAD, *SIZES, *more]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and not captured.out
        return captured.err

    assert (
        "the placement is of 2 ranks: start them all, torchrun --nproc-per-node 2 -m tersor bench throughput"
        in refused("--plan", plan)
    )
    assert "tensor_parallel is 2: start them all" in refused("--tensor-parallel", "2")
    assert "the plan is for model" in refused("--plan", plan, "--format", "fp6")
    assert "--plan and --placement both say who has what" in refused("--plan", plan, "--placement", "a.json")
    assert "leave out --head-format" in refused("--plan", plan, "--head-format", "fp6")
    two = str(planned(model, "--pipeline-parallel", "1", "--copies", "2"))
    capsys.readouterr()
    assert "the placement is of 2 copies of a model: an engine is one, tersor serve and batch run all" in refused(
        "--plan", two
    )
