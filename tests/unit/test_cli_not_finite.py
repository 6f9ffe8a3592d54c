"""Every verb that runs a model ends in one line and status 1 where its logits are not finite."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from helpers import checkpoints, tiny_lm
from safetensors.torch import save_file

from tersor.cli.main import run


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model with a NaN in the norm before its second MLP."""
    directory = shutil.copytree(tiny_lm.TINY, tmp_path_factory.mktemp("broken") / "model")
    name = "model.layers.1.post_attention_layernorm.weight"
    for path in directory.glob("*.safetensors"):
        tensors = checkpoints.load(path)
        if name in tensors:
            tensors[name][3] = math.nan
            save_file(tensors, path, {"format": "pt"})
    return str(directory)


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "MODEL", "--prompt", "def f(", "-n", "4"],
        ["generate", "MODEL", "--prompt", "def f(", "-n", "4", "--temperature", "0.7", "--json"],
        ["eval", "MODEL", "--text", "TEXT", "--window", "16"],
        ["eval", "MODEL", "--text", "TEXT", "--window", "16", "--reference", str(tiny_lm.TINY), "--json"],
        ["eval", str(tiny_lm.TINY), "--text", "TEXT", "--window", "16", "--reference", "MODEL"],
        ["eval", "MODEL", "--text", "TEXT", "--window", "16", "--kv-dtype", "fp8"],
        ["demo", "--model", "MODEL", "--format", "int4", "--max-tokens", "64", "--window", "32"],
    ],
    ids=lambda words: " ".join(words[:1] + words[-1:]),
)
def test_logits_that_are_not_finite_are_one_line(
    broken: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def square(x):\n    return x * x\n" * 9)
    places = {"MODEL": broken, "TEXT": str(text)}
    assert run([*(places.get(word, word) for word in words), "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("tersor: ")
    assert "not finite" in captured.err
    assert "first in model.layers.1.post_attention_layernorm" in captured.err
