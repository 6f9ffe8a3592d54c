"""A checkpoint of random weights for another program: others read it, it has room, and it is gone at the end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.tiny_configs import DENSE, MIXTURE
from safetensors.torch import load_file

from tersor.bench import random_checkpoint
from tersor.errors import OutputError
from tersor.models.geometries import GEOMETRIES

OPT = {**GEOMETRIES["opt-6.7b"], "vocab_size": 96, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2}
GPT_OSS = {**GEOMETRIES["gpt-oss-20b"], **MIXTURE, "architectures": ["GptOssForCausalLM"], "num_local_experts": 4}
HALF = torch.float16


class Usage(NamedTuple):
    """What `shutil.disk_usage` answers."""

    free: int


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Folders `memory` and `disk` with the free bytes that the test says; the machine's memory is `available`."""
    free = {"memory": 1 << 40, "disk": 1 << 40, "available": 1 << 40}
    for name in ("memory", "disk"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(random_checkpoint, "MEMORY", tmp_path / "memory")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "disk"))
    monkeypatch.setattr(random_checkpoint.shutil, "disk_usage", lambda path: Usage(free[Path(path).name]))
    monkeypatch.setattr(random_checkpoint, "_memory", lambda: free["available"])
    return free


@pytest.mark.parametrize("config", [{**DENSE, "tie_word_embeddings": True}, MIXTURE, OPT, GPT_OSS])
def test_transformers_finds_every_tensor_and_no_other(config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    random_checkpoint.write(config, 128, tmp_path, HALF, torch.device("cpu"))
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert model.dtype is HALF and model.config.architectures == config["architectures"]
    first = load_file(tmp_path / "model-0.safetensors")
    assert first and all(tensor.dtype is HALF and bool(tensor.isfinite().all()) for tensor in first.values())
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        *("model-0.safetensors", "model-1.safetensors", "model-rest.safetensors"),
    ]


def test_a_checkpoint_is_in_memory_where_there_is_room_and_else_on_disk(places: dict[str, int]) -> None:
    assert random_checkpoint.place(DENSE, 64, HALF).name == "memory"
    places["available"] = 8 << 30
    assert random_checkpoint.place(DENSE, 64, HALF).name == "disk"
    places |= {"available": 1 << 40, "memory": 1 << 26}
    with random_checkpoint.temporary(DENSE, 64, HALF) as folder:
        assert folder.parent.name == "disk"
    random_checkpoint.MEMORY.rmdir()
    assert random_checkpoint.place(DENSE, 64, HALF).name == "disk"


def test_where_no_folder_has_room_nothing_is_made(places: dict[str, int]) -> None:
    places |= {"memory": 1 << 26, "disk": 17 << 30}
    small = random_checkpoint.place(GEOMETRIES["llama-3-8b"], 512, HALF)
    assert small.name == "disk"
    message = r"take 141\.11 GB, .* has room for 17\.18 GB: free some, or name a folder that has room in TMPDIR"
    with (
        pytest.raises(OutputError, match=message),
        random_checkpoint.temporary(GEOMETRIES["llama-3-70b"], 512, HALF),
    ):
        pass
    assert not list(small.parent.glob("*/*"))


def test_tensors_without_a_file_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    random_checkpoint.write(DENSE, 64, tmp_path, HALF, cpu)
    stored = {name: one for file in tmp_path.glob("*.safetensors") for name, one in load_file(file).items()}
    found = dict(random_checkpoint.tensors(DENSE, 64, HALF, cpu))
    assert {name: (one.shape, one.dtype) for name, one in found.items()} == {
        name: (one.shape, one.dtype) for name, one in stored.items()
    }
    assert all(bool(one.isfinite().all()) and one.float().abs().mean() > 0.01 for one in found.values())


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_checkpoint_is_gone_whichever_signal_ends_the_work(ending: signal.Signals, places: dict[str, int]) -> None:
    usual = signal.default_int_handler if ending is signal.SIGINT else signal.SIG_DFL
    before = signal.signal(ending, usual)
    try:
        with (
            pytest.raises((SystemExit, KeyboardInterrupt)),
            random_checkpoint.temporary(DENSE, 64, HALF) as folder,
        ):
            assert (folder / "config.json").exists()
            assert ending is signal.SIGINT or signal.getsignal(ending) != usual  # or it would end the tests
            os.kill(os.getpid(), ending)
            raise AssertionError("the signal ended nothing")
        assert not folder.exists() and signal.getsignal(ending) == usual
    finally:
        signal.signal(ending, before)


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(
    places: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise random_checkpoint.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(random_checkpoint, "save_file", full)
    with pytest.raises(OutputError, match="No space left on device"), random_checkpoint.temporary(DENSE, 64, HALF):
        pass
    assert not list(random_checkpoint.MEMORY.iterdir())
