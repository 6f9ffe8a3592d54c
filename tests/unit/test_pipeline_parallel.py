"""Stages and groups of experts in processes over gloo: answers are those of one, and who dies is named at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models, tiny_lm
from helpers.asked import OPTIONS, answers, lost, same

import tersor
from tersor.cli.main import run
from tersor.convert import quantize
from tersor.engine import workers
from tersor.errors import InputError, LostError, ShapeError
from tersor.planner.placement import Placement


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three layers with experts in FP6."""
    changes = {"num_hidden_layers": 3, "max_position_embeddings": 256, "head_dim": 32}
    made = packed_models.case("mixtral", tmp_path_factory.mktemp("model"), {"format": "fp6_e3m2"}, **changes).packed
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_lm.TINY / name, made)
    return made


@pytest.fixture(scope="module")
def wanted(path: Path) -> list[Any]:
    """What one process answers."""
    return answers(tersor.LLM(path, **OPTIONS))


def test_two_uneven_stages_answer_as_one_process_until_the_last_dies(path: Path, wanted: list[Any]) -> None:
    model = tersor.LLM(path, pipeline_parallel=2, **OPTIONS)
    try:
        assert len(model.runner.decoder.layers) == 2 and model.runner.decoder.head is None
        for _ in range(2):
            same(answers(model), wanted)
        lost(lambda: answers(model))
    finally:
        model.close()
    assert not multiprocessing.active_children() and not torch.distributed.is_initialized()


def test_four_processes_in_stages_of_expert_groups_answer_as_one_and_name_who_died_in_the_middle(
    path: Path, wanted: list[Any]
) -> None:
    model = tersor.LLM(path, pipeline_parallel=2, expert_parallel=2, **OPTIONS)
    try:
        assert [layer.ffn.held for layer in model.runner.decoder.layers] == [2, 2]
        same(answers(model), wanted)
        others = sorted(multiprocessing.active_children(), key=lambda child: child.pid or 0)
        assert len(others) == 3 and others[1].pid is not None
        os.kill(others[1].pid, signal.SIGKILL)
        with pytest.raises(LostError, match=r"^rank 2 of 4 ended by SIGKILL$"):
            answers(model)
    finally:
        model.close()
    assert not multiprocessing.active_children()


def test_a_rank_that_cannot_reach_the_others_says_so_in_a_line() -> None:
    verb = ["generate", str(tiny_lm.TINY), "--prompt", "a", "--pipeline-parallel", "2", "--device", "cpu"]
    code = (
        "from datetime import timedelta; from tersor.engine import workers; from tersor.cli.main import run; "
        f"workers._REACHED = timedelta(seconds=2); raise SystemExit(run({verb!r}))"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        started = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]), "TORCHELASTIC_RUN_ID": "none",
            "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2",
            "PYTHONPATH": str(Path(tersor.__file__).resolve().parents[1]),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **started}, timeout=120
        )
    assert done.returncode == 1 and not done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tersor: the processes of torchrun do not reach each other: ") and "127.0.0.1" in last


def test_processes_of_torchrun_take_the_places_of_a_file_and_the_first_answers(path: Path, tmp_path: Path) -> None:
    placed, asked = tmp_path / "placement.json", tmp_path / "asked.jsonl"
    cuts = {"experts": [0, 3, 4], "vocabulary": [0, 32, 96]}
    stage = {"layers": [0, 3], "ranks": 2, "expert_groups": 2, "cuts": cuts}
    placed.write_text(json.dumps({"version": 1, "stages": [stage]}))
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    request = {"custom_id": "one", "method": "POST", "url": "/v1/completions", "body": body}
    asked.write_text(json.dumps(request) + "\n")
    tests, sources = Path(__file__).resolve().parents[1], Path(tersor.__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{sources}:{tests}", "OMP_NUM_THREADS": "1"}
    verb = ["batch", "--model", str(path), "-i", str(asked), "--device", "cpu", "--kv-bytes", str(1 << 22)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tersor"]
    together = [*command, *verb, "-o", str(tmp_path / "together.jsonl"), "--placement", str(placed)]
    done = subprocess.run(together, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 of 1 answered") == 1  # by the first alone
    assert run([*verb, "-o", str(tmp_path / "alone.jsonl")]) == 0
    found, wanted = (
        json.loads((tmp_path / f"{name}.jsonl").read_text())["response"]["body"]["choices"]
        for name in ("together", "alone")
    )
    assert found == wanted


@pytest.mark.parametrize(
    ("options", "error", "line"),
    [
        ({"pipeline_parallel": 4}, InputError, r"^pipeline_parallel is 4, and the model has 3 layers$"),
        (
            {"expert_parallel": 8},
            ShapeError,
            "and there are 8 ranks$",
        ),
        ({"placement": {"stages": [{"layers": [0, 5], "ranks": 2}]}}, ShapeError, "of 5 layers, and the model has 3"),
        (
            {"placement": {"stages": [{"layers": [0, 3], "ranks": 2, "cuts": {"vocabulary": [0, 8, 90]}}]}},
            ShapeError,
            "the placement cuts vocabulary up to 90, and there are 96",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused_before_a_process_starts_or_a_weight_is_read(
    path: Path, options: dict[str, Any], error: type[Exception], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_Children", None)
    with pytest.raises(error, match=line):
        tersor.LLM(path, **options, **OPTIONS)


def test_the_page_shows_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "parallel.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S) for line in block.splitlines()]
    shown = [shlex.split(line) for line in commands if line.startswith("tersor ")]
    quantize(tiny_lm.TINY, tmp_path / "tiny-fp6")
    monkeypatch.chdir(tmp_path)
    assert [words[1] for words in shown] == ["generate", "plan", "generate"]
    for words in shown:
        assert run(words[1:]) == 0
        assert words[1] == "plan" or "8 new tokens" in capsys.readouterr().err
    served, timed, planned = [shlex.split(line) for line in commands if line.startswith("torchrun ")]
    assert (served[3:6], timed[3:7]) == (["-m", "tersor", "serve"], ["-m", "tersor", "bench", "latency"])
    for words in ([*served[5:], "--help"], [*timed[5:], "--help"]):  # options that are not there are refused first
        assert run(words) == 0
    assert planned[:5] == ["torchrun", "--nproc-per-node", "2", "-m", "tersor"]
    assert run([*planned[5:8], "--help"]) == 0 and planned[8:] == [*shown[0][2:-4], "--device", "cpu"]
    placed = [Placement.from_dict(json.loads(one)) for one in re.findall(r"^```json\n(.*?)^```", page, re.M | re.S)]
    assert [one.ranks for one in placed] == [6]
