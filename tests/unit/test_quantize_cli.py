"""The verbs `quantize` and `inspect`: what goes to stdout, what to stderr, and the exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import checkpoints

from tersor.cli import main
from tersor.cli.layers import collapse
from tersor.cli.quantize import parse_size
from tersor.convert import making
from tersor.errors import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.save("mixtral", tmp_path_factory.mktemp("mixtral") / "model"))


@pytest.fixture
def tersor(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; return its status, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main.run([str(word) for word in words])
        return status, *capsys.readouterr()

    return run


def lines_of(text: str) -> list[list[str]]:
    """The words of every line that has any."""
    return [line.split() for line in text.splitlines() if line.strip()]


def test_quantize_prints_a_table_of_formats(
    tersor: Callable[..., tuple[int, str, str]], model: Any, tmp_path: Path
) -> None:
    status, out, err = tersor("quantize", model, "-o", tmp_path / "out", "--override", r"\.w2$=int8:g32")
    assert status == 0 and err == ""
    table = {line[0]: line for line in lines_of(out)}
    assert table["fp6_e2m3,"][1:5] == ["row,", "float16", "24", "6.250"]
    assert table["int8,"][1:6] == ["group", "32,", "float16", "8", "8.500"]
    assert table["kept"][1:4] == ["as", "they", "are"]
    assert "32 of 41 tensors compressed to" in out
    assert f"{tmp_path / 'out'}: 1 file written in" in out
    assert (tmp_path / "out" / "config.json").is_file()


def test_quantize_prints_json_and_nothing_else(
    tersor: Callable[..., tuple[int, str, str]], model: Any, tmp_path: Path
) -> None:
    status, out, err = tersor(
        "quantize", model, "-o", tmp_path / "out", "--format", "int4", "--group-size", "32", "--json"
    )
    report = json.loads(out)
    assert status == 0 and err == ""
    assert report["scheme"] == "int4:g32:float16" and report["compressed"] == 32
    assert report["bytes_after"] == sum(row["bytes_after"] for row in report["rows"])
    assert report["worst_tensor"] in {row["name"] for row in report["rows"]}
    assert 0 < report["worst_relative_error"] < 0.3


def test_a_dry_run_prints_layers_that_are_alike_in_one_line(
    tersor: Callable[..., tuple[int, str, str]], model: Any, tmp_path: Path
) -> None:
    status, out, err = tersor("quantize", model, "--dry-run", "--ignore", r"layers\.1\..*k_proj")
    assert status == 0 and err == ""
    table = {line[0]: line for line in lines_of(out)}
    assert table["model.layers.0-1.block_sparse_moe.experts.0-3.w1"][1:3] == ["8", "96x64"]
    assert table["model.layers.0.self_attn.k_proj"][3:6] == ["fp6_e2m3,", "row,", "float16"]
    assert table["model.layers.1.self_attn.k_proj"][3:6] == ["kept:", "ignored", "by"]
    assert table["model.layers.0-1.block_sparse_moe.gate"][3:5] == ["kept:", "router"]
    assert table["lm_head"][3:6] == ["kept:", "output", "head"]
    assert table["model.norm"][3:5] == ["kept", "16.000"]
    assert list(tmp_path.iterdir()) == []


def test_inspect(tersor: Callable[..., tuple[int, str, str]], model: Any, tmp_path: Path) -> None:
    tersor("quantize", model, "-o", tmp_path / "out")
    status, out, err = tersor("inspect", tmp_path / "out")
    assert status == 0 and err == ""
    table = {line[0]: line for line in lines_of(out)}
    assert table["out:"][1] == "MixtralForCausalLM;"
    assert table["model.layers.0-1.self_attn.q_proj"][1:6] == ["2", "64x64", "fp6_e2m3,", "row,", "float16"]
    status, out, err = tersor("inspect", tmp_path / "out", "--full")
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in {line[0] for line in lines_of(out)}
    status, out, err = tersor("inspect", tmp_path / "out", "--json")
    assert json.loads(out)["quant_method"] == "tersor" and err == ""
    status, out, err = tersor("inspect", model)
    assert status == 0 and "not compressed" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize"], "Missing argument"),
        (["quantize", "MODEL", "--formt", "int4"], "No such option: --formt"),
        (["quantize", "MODEL", "--group-size", "many"], "Invalid value for '--group-size'"),
        (["quantize", "MODEL"], "no output directory given"),
        (["quantize", "MODEL", "-o", "OUT", "--format", "fp6_e4m2"], "unknown format 'fp6_e4m2', did you mean"),
        (["quantize", "MODEL", "-o", "OUT", "--shard-size", "5 apples"], "size '5 apples' is not"),
        (["quantize", "/absent", "-o", "OUT"], "no directory /absent"),
        (["inspect", "/absent"], "no directory /absent"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    tersor: Callable[..., tuple[int, str, str]], model: Any, tmp_path: Path, words: list[str], message: str
) -> None:
    words = [{"MODEL": model, "OUT": tmp_path / "out"}.get(word, word) for word in words]
    status, out, err = tersor(*words)
    assert status == 2 and out == ""
    assert message in err and err.startswith("tersor: ") and err.count("\n") == 1


def test_an_interruption_says_how_to_continue(
    tersor: Callable[..., tuple[int, str, str]], model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(making.Pipeline, "run", interrupted)
    status, _, err = tersor("quantize", model, "-o", tmp_path / "out")
    assert status == 130
    assert err == f"{tmp_path / 'out.partial'} keeps what is finished: add --resume to continue\ntersor: interrupted\n"
    monkeypatch.undo()
    assert tersor("quantize", model, "-o", tmp_path / "out", "--resume")[0] == 0


def test_a_person_sees_progress_on_stderr(
    tersor: Callable[..., tuple[int, str, str]], model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, out, err = tersor("quantize", model, "-o", tmp_path / "out", "--json")
    assert status == 0 and json.loads(out)
    assert "opening the model" in err and "model to fp6" in err and "kB" in err and "B/s" in err


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500M", 5 * 10**8), ("1.5kB", 1500), (" 7 B", 7), ("2 TB", 2 * 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5GiB", "-1", "0B", "x", "0.4B", "5", "B"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="is not a number of bytes"):
        parse_size(text)


def test_rows_collapse_only_when_they_are_alike() -> None:
    rows = [(f"a.{i}.b.{j}.w", "k", (i, j)) for i in (0, 1, 3) for j in (0, 1)]
    assert collapse(rows) == [("a.0-1,3.b.0-1.w", [(i, j) for i in (0, 1, 3) for j in (0, 1)])]
    assert [name for name, _ in collapse(rows[:-1])] == [
        f"a.{i}.b.{j}.w" for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (3, 0))
    ]
    assert [name for name, _ in collapse([("a.0.w", 1, 0), ("a.1.w", 2, 0), ("b", 1, 0)])] == ["a.0.w", "a.1.w", "b"]
