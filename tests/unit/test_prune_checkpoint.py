"""A pruned checkpoint: its zeros, what each layer is pruned on, how it loads, and what is refused before the work."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrated, checkpoints, packed_models
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tersor import files
from tersor.cli import main
from tersor.compress.prune import Pattern
from tersor.compress.prune.allocate import MOST_APART
from tersor.convert import prune as job
from tersor.convert.calibrate import pruning
from tersor.convert.calibrate.pruning import PruneCoder
from tersor.convert.calibrate.store import Store
from tersor.convert.calibrate.text import read_windows
from tersor.errors import FormatError, InputError, OutputError, TersorError
from tersor.formats import Plain, Sparse
from tersor.layouts import SparseWeight

Told = Mapping[str, torch.Tensor]
OPTIONS: dict[str, Any] = {"sparsity": 0.5, "calibration_tokens": 96, "calibration_window": 32}
ALONE: dict[str, Any] = {
    **dict.fromkeys(("calibration", "calibration_tokens", "calibration_window")),
    "sparsity": 0.5,
    "algorithm": "magnitude",
}
"""Without a text."""
PARTS = ("mask", "values")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated.model("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated.text(tmp_path_factory.mktemp("text") / "calibration.txt")


def pruned(model: Path, text: Path, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Prune, load the result through transformers, and return what its linear layers multiply by."""
    job.prune(model, output, calibration=text, **{**OPTIONS, **options})
    return weights(output)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            features = torch.eye(module.in_features)
            found[name] = module(features).detach().T.contiguous()
    return found


def log_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "tersor-calibration.json").read_text())
    return found


def zeros(weight: torch.Tensor) -> float:
    return float((weight == 0).double().mean())


@pytest.mark.parametrize("values", [None, "fp16", "bf16", "fp6", "int4:g16"])
def test_every_linear_layer_has_its_share_of_zeros_and_loads_through_transformers(
    llama: Path, text: Path, tmp_path: Path, values: str | None
) -> None:
    found = pruned(llama, text, tmp_path / "out", values=values, overrides=["down_proj=0.75"])
    for name, weight in found.items():
        share = 0.75 if "down_proj" in name else 0.5
        assert zeros(weight) >= share - 1e-3, name
        if values is None:
            assert zeros(weight) == pytest.approx(share, abs=1e-3), name
    for line in log_of(tmp_path / "out")["layers"]:
        share = 0.75 if "down_proj" in line["layer"] else 0.5
        assert line["left"] == Pattern(share).kept(1, line["weights"])
        assert line["loss_reweighted"] <= line["loss_mask"] * (1 + 1e-6)
        assert line["loss_reweighted"] <= line["loss_magnitude"] * (1 + 1e-6)


@pytest.mark.parametrize(("values", "loaded"), [("int4", {"int4"}), (None, set())])
def test_kernels_are_loaded_ahead_that_give_codes_to_what_is_left(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: str | None, loaded: set[str]
) -> None:
    found: set[str] = set()
    monkeypatch.setattr(pruning, "load_columns", lambda formats, device: found.update(one.name for one in formats))
    job.prune(llama, tmp_path / "out", calibration=text, values=values, algorithm="magnitude", **OPTIONS)
    assert found == loaded


def test_a_layer_is_pruned_on_what_it_reads_in_the_pruned_model(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, torch.Tensor] = {}
    code = PruneCoder.code

    def noting(
        self: PruneCoder, task: Any, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor], first: int
    ) -> Any:
        told[task.name] = statistics["hessian"].clone()
        return code(self, task, weight, statistics, first)

    monkeypatch.setattr(PruneCoder, "code", noting)
    job.prune(llama, tmp_path / "out", calibration=text, algorithm="wanda", **OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name in told:
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
    ids = read_windows(str(text), calibrated.tokenizer(), 3, 32, calibrated.VOCABULARY)
    with torch.no_grad():
        model(ids)
    assert len(told) == 14
    for name, hessian in told.items():
        x = seen[name].flatten(0, -2)
        torch.testing.assert_close(hessian, x.T @ x / len(x), rtol=1e-3, atol=1e-5)


def test_n_of_m_holds_in_every_layer_and_for_an_override(llama: Path, text: Path, tmp_path: Path) -> None:
    found = pruned(
        llama, text, tmp_path / "out", sparsity=None, pattern="2:4", algorithm="wanda", overrides=["k_proj=0.75:4:8"]
    )
    for name, weight in found.items():
        size, most = (8, 4) if "k_proj" in name else (4, 2)
        assert int((weight != 0).view(-1, size).sum(dim=1).max()) <= most, name
        assert zeros(weight) == pytest.approx(0.75 if "k_proj" in name else 0.5, abs=0.02), name


def test_shares_are_allocated_by_what_zeros_cost_and_their_mean_is_the_one_asked_for(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    found = pruned(llama, text, tmp_path / "out", algorithm="magnitude", allocate=True, overrides=["o_proj=0.75"])
    own = {name: weight for name, weight in found.items() if "o_proj" not in name}
    total = sum(weight.numel() for weight in own.values())
    assert sum(zeros(weight) * weight.numel() for weight in own.values()) / total == pytest.approx(0.5, abs=1e-3)
    shares = [zeros(weight) for weight in own.values()]
    assert max(shares) - min(shares) > 0.02
    assert max(abs(share - 0.5) for share in shares) < MOST_APART + 0.01
    assert all(zeros(found[name]) == pytest.approx(0.75, abs=1e-3) for name in found.keys() - own.keys())


def written(output: Path) -> dict[str, Any]:
    """Return the bytes of every file; of the log what does not depend on the clock."""
    found: dict[str, Any] = checkpoints.bytes_of(output)
    log = json.loads(found.pop("tersor-calibration.json"))
    for part in (log, *log["blocks"], *log["layers"]):
        part.pop("seconds")
    return {**found, "log": log}


def test_a_killed_process_is_continued_with_the_same_bytes(llama: Path, text: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "values": "fp6", "allocate": True, "dead_neurons": "report"}
    job.prune(llama, tmp_path / "whole", calibration=text, **options)
    output = tmp_path / "out"
    program = f"""
import os, signal, torch
torch.set_num_threads({torch.get_num_threads()})
from tersor.convert.prune import prune
from tersor.convert.calibrate.store import Store
finish = Store.finish
def kill(self, block, *rest):
    finish(self, block, *rest)
    os.kill(os.getpid(), signal.SIGKILL)
Store.finish = kill
prune({str(llama)!r}, {str(output)!r}, calibration={str(text)!r}, **{options!r})
"""
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()
    with pytest.raises(InputError, match=r'made with sparsity "0\.5", now "0\.6"'):
        job.prune(llama, output, calibration=text, resume=True, **{**options, "sparsity": 0.6})
    job.prune(llama, output, calibration=text, resume=True, **options)
    assert written(output) == written(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity 1.5 is not a share"),
        ({"sparsity": "x"}, "sparsity 'x' is not a share"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "sparsity 0.3 is out of reach"),
        ({"overrides": ["q_proj=2"]}, "override 'q_proj=2': sparsity 2.0 is not a share"),
        ({"overrides": ["q_proj=0.2:2:4"]}, "override 'q_proj=0.2:2:4': sparsity 0.2 is out of reach"),
        ({"overrides": ["nowhere=0.3"]}, "override 'nowhere' matches no linear layer"),
        ({"overrides": ["q_proj"]}, "is not REGEX=SPARSITY"),
        ({"pattern": "3:7", "sparsity": None}, "pattern 3:7 does not divide the 96 input channels of model"),
        ({"algorithm": "wand"}, "unknown algorithm 'wand', did you mean 'wanda'"),
        ({"values": "fp66"}, "values 'fp66': unknown"),
        ({"group_size": 16}, "group size and scale dtype are for values with codes"),
        ({"values": "int4:g24"}, "group size 24 does not divide"),
        ({"sparsity": 0.01}, "sparsity 0.01 makes no weight smaller whose values are float32"),
        ({"calibration": None}, "algorithm 'admm' needs a text to calibrate on: add --calibration FILE"),
        ({**ALONE, "update": True}, "fitting weights to a mask needs a text"),
        ({**ALONE, "allocate": True}, "allocating shares needs a text"),
        ({**ALONE, "dead_neurons": "report"}, "looking for dead neurons needs a text"),
        ({"calibration": None, "algorithm": "magnitude"}, "calibration tokens, window and seed say nothing without"),
        ({**ALONE, "seed": 1}, "calibration tokens, window and seed say nothing without"),
        ({"calibration": "no-such-file.txt"}, "no-such-file.txt"),
        ({"calibration_tokens": 100_000}, "has 200 tokens, and 3125 windows of 32 take 100000"),
        ({"pattern": "2:4", "sparsity": 0.5, "allocate": True}, "2:4 leaves no share to allocate"),
        ({"dead_neurons": "bury"}, "dead neurons 'bury' is neither of report, drop"),
        ({"ignore": ["nothing"]}, "ignore 'nothing' matches no module"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_before_the_work_starts(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    for start in ("calibrate", "code_alone"):
        monkeypatch.setattr(job, start, lambda *_: pytest.fail("the work has started"))
    with pytest.raises(TersorError, match=message) as caught:
        job.prune(llama, tmp_path / "out", **{"calibration": text, **OPTIONS, **options})
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("values", [None, "fp6", "uint4:g16"])
def test_magnitude_needs_no_text_and_leaves_the_largest_weights_as_they_are(
    llama: Path, tmp_path: Path, values: str | None
) -> None:
    report = job.prune(llama, tmp_path / "out", values=values, overrides=["down_proj=0.5:2:4"], **ALONE)
    before, after = weights(llama), weights(tmp_path / "out")
    for name, weight in after.items():
        size = before[name].abs()
        kept = size >= size.flatten().sort().values[size.numel() // 2]
        if "down_proj" in name:
            kept = torch.zeros_like(kept, dtype=torch.bool).view(-1, 4)
            kept = kept.scatter(1, size.view(-1, 4).topk(2).indices, True).view(size.shape)
        assert not weight[~kept].any(), name
        near = torch.linalg.vector_norm((weight - before[name])[kept]) / torch.linalg.vector_norm(before[name][kept])
        assert near == 0 if values is None else 0 < near < 0.1, name
    assert len(report.compressed) == 14 and report.dead_units is None
    assert not (tmp_path / "out" / "tersor-calibration.json").exists()
    assert "pruned by magnitude" in (tmp_path / "out" / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_without_a_text_an_interrupted_run_goes_on_at_the_weight_it_was_at_with_the_same_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**ALONE, "values": "int4"}
    job.prune(llama, tmp_path / "whole", **options)
    code, coded = PruneCoder.code, []

    def interrupted(self: PruneCoder, task: Any, *rest: Any) -> Any:
        if len(coded) == 5:
            coded.append("interrupted")
            raise KeyboardInterrupt
        coded.append(task.name)
        return code(self, task, *rest)

    monkeypatch.setattr(PruneCoder, "code", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.prune(llama, tmp_path / "out", **options)
    job.prune(llama, tmp_path / "out", resume=True, **options)
    assert len(coded) == len(set(coded)) == 14 + 1
    assert checkpoints.bytes_of(tmp_path / "out") == checkpoints.bytes_of(tmp_path / "whole")


def test_values_without_a_kernel_are_named_before_the_work(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", str(llama), "--algorithm", "magnitude", "--sparsity", "0.5"]
    for place, (values, reason) in enumerate(
        (
            ("int4:g16", "pruned weights with scales in groups are not expanded"),
            ("uint4", "zero points"),
            ("mxfp6_e3m2", "scales in groups"),
            ("fp32", "values in float32"),
            ("int4", ""),
            ("fp6_e3m2", ""),
            ("bf16", ""),
        )
    ):
        assert main.run([*command, "-o", str(tmp_path / str(place)), "--values", values]) == 0
        said = [line for line in capfd.readouterr().err.splitlines() if "has no kernel beside" in line]
        assert len(said) == bool(reason), values
        assert all(reason in line and line.endswith("every product decodes it for cuBLAS") for line in said), values


def test_plain_values_are_of_the_dtype_asked_for_and_weights_that_stay_dense_of_their_own(
    llama: Path, tmp_path: Path
) -> None:
    job.prune(llama, tmp_path / "out", values="fp16", overrides=["q_proj=0.02"], **ALONE)
    before, after = checkpoints.weights(llama), packed_models.tensors(tmp_path / "out")
    dense = after["model.layers.0.self_attn.q_proj.weight"]
    assert dense.dtype == torch.float32 and zeros(dense) == pytest.approx(0.02, abs=1e-3)
    name = "model.layers.0.mlp.up_proj"
    sparse = SparseWeight.from_stored(
        Sparse(Plain("float16")), before[f"{name}.weight"].shape, *(after[f"{name}.weight_{part}"] for part in PARTS)
    )
    kept = sparse.dequantize(torch.float32) != 0
    assert torch.equal(sparse.dequantize(torch.float16)[kept], before[f"{name}.weight"].half()[kept])
    held = {**before, f"{name}.weight": before[f"{name}.weight"] * 1e6}
    shutil.copytree(llama, tmp_path / "large")
    save_file(held, tmp_path / "large" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"up_proj.weight': has numbers up to .*, which float16 cannot be"):
        job.prune(tmp_path / "large", tmp_path / "no", values="fp16", **ALONE)


def test_a_disk_that_fills_up_is_one_line_and_the_same_bytes_after_resuming(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "values": "fp6", "algorithm": "wanda", "calibration": text}
    job.prune(llama, tmp_path / "whole", **options)
    output, whole, written_blocks = tmp_path / "out", files.write_whole, []

    def full(path: Path, content: Any, **how: Any) -> None:
        if path.name.startswith("block"):
            written_blocks.append(path.name)
            if len(written_blocks) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, content, **how)

    monkeypatch.setattr(files, "write_whole", full)
    with pytest.raises(OutputError, match=r"no space left while writing .* run again with --resume") as caught:
        job.prune(llama, output, **options)
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value) and not output.exists()
    job.prune(llama, output, **options, resume=True)
    assert len(written_blocks) == 3, "the first one is kept"
    assert written(output) == written(tmp_path / "whole")


def held_bytes() -> int:
    """Return the bytes of all tensors in memory, each storage once; fake ones, of a trace before, have none."""
    plain = (torch.Tensor, torch.nn.Parameter)
    found = [one for one in gc.get_objects() if type(one) in plain and one.device.type == "cpu"]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}.values())


@pytest.mark.parametrize("alone", [False, True], ids=["with a text", "without"])
def test_memory_does_not_grow_with_the_number_of_blocks(
    alone: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in memory as the last block, or the last weight, is finished."""
    finish, held = Store.finish, dict[int, int]()
    for layers in (2, 6):
        model = calibrated.model("llama", tmp_path / f"model{layers}", num_hidden_layers=layers)
        before, calls = held_bytes(), itertools.count(1)

        def noting(self: Store, *given: Any, layers: int = layers, calls: Iterator[int] = calls) -> None:
            if next(calls) == layers * (7 if alone else 1):
                held[layers] = held_bytes()
            finish(self, *given)

        monkeypatch.setattr(Store, "finish", noting)
        options = ALONE if alone else {**OPTIONS, "algorithm": "wanda", "update": False, "calibration": text}
        job.prune(model, tmp_path / f"out{layers}", values="fp6", **options)
        held[layers] -= before
    block = sum(one.numel() * 4 for name, one in checkpoints.weights(model).items() if "layers.0." in name)
    assert 0 < held[6] < held[2] + block


def test_experts_are_refused_unless_they_are_ignored(text: Path, tmp_path: Path) -> None:
    model = calibrated.model("mixtral", tmp_path / "model")
    with pytest.raises(InputError, match="is a layer's experts, which have no sparse form: ignore them"):
        job.prune(model, tmp_path / "out", calibration=text, **OPTIONS)
    report = job.prune(model, tmp_path / "out", calibration=text, ignore=[r"\.experts\b"], **OPTIONS)
    assert len(report.compressed) == 8
