"""Pictures of `tersor bench linear`: what they show, what they say of it, and that a file can hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tersor.bench.plot import description, kernel_words, plot
from tersor.errors import InputError, OutputError

pytest.importorskip("matplotlib")


@pytest.fixture
def taken() -> dict[str, Any]:
    """Ten times of one weight: Tersor in two chains and with 8-bit activations, and its rivals."""
    lines = [("fp6_e3m2", "pdl"), ("fp6_e3m2", "plain"), ("fp6_e3m2:a8", "pdl"), ("cublas", "plain"), ("fp8", "plain")]
    rows = [
        {
            "name": "m o_proj",
            "oc": 8000,
            "ic": 5000,
            "n": n,
            "kernel": kernel,
            "chain": chain,
            "microseconds": 10.0 * n + index,
            "weight_bytes": 30_000_000 + 10_000_000 * index,
        }
        for n in (1, 2)
        for index, (kernel, chain) in enumerate(lines)
    ]
    environment = {"commit": "abc1234", "gpu": "NVIDIA H200"}
    return {"environment": environment, "dtype": "float16", "read_bandwidth": 4e12, "rows": rows}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture(taken: dict[str, Any], tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    other = [{**row, "oc": 4096, "kernel": f"{row['kernel']}:a8"} for row in taken["rows"][:2]]
    path = tmp_path / f"times{suffix}"
    plot({**taken, "rows": taken["rows"] + other}, path)
    assert path.stat().st_size > 5000
    assert b"commit abc1234, 12 times, sha256 " in path.read_bytes()
    with pytest.raises(InputError, match="a plot is written as"):
        plot(taken, tmp_path / "times.txt")
    with pytest.raises(OutputError, match="cannot be written"):
        (tmp_path / "folder.png").mkdir()
        plot(taken, tmp_path / "folder.png")


def test_a_picture_is_the_same_file_when_it_is_drawn_again(taken: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        plot(taken, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_pictures_description_follows_the_times_and_not_their_order(taken: dict[str, Any]) -> None:
    first = description(taken)
    assert description({**taken, "rows": taken["rows"][::-1]}) == first
    changed = [{**taken["rows"][0], "microseconds": 0.01}, *taken["rows"][1:]]
    assert description({**taken, "rows": changed}) != first


def test_kernels_are_named_for_people() -> None:
    names = ("cublas", "fp8", "fp6_e3m2", "int4:g128:a8", "humming fp6_e3m2", "humming fp6_e3m2:a8")
    assert [kernel_words(name, "bfloat16") for name in names] == [
        "cuBLAS BF16",
        "cuBLAS FP8",
        "Tersor fp6_e3m2",
        "Tersor int4:g128, 8-bit activations",
        "humming fp6_e3m2",
        "humming fp6_e3m2, 8-bit activations",
    ]
    assert kernel_words("cublas", "float16") == "cuBLAS FP16"


def test_a_line_is_a_kernel_in_a_chain_and_has_its_name(taken: dict[str, Any], tmp_path: Path) -> None:
    """Text of an SVG is drawn as curves, so labels are read from the figure."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.plots.save", lambda figure, path, about: figures.append(figure))
        plot(taken, tmp_path / "times.svg")
    (panel,) = figures[0].axes
    drawn = {line.get_label(): line for line in panel.lines if not line.get_label().startswith("_")}
    assert list(drawn) == [
        "Tersor fp6_e3m2",
        "Tersor fp6_e3m2, plain launches",
        "Tersor fp6_e3m2, 8-bit activations",
        "cuBLAS FP16",
        "cuBLAS FP8",
    ]
    assert drawn["cuBLAS FP16"].get_ydata().tolist() == [13.0, 23.0]
    assert [line.get_linestyle() for line in drawn.values()] == ["-", "-", "--", "-", "--"]
    roofs = [line.get_ydata()[0] for line in panel.lines if line.get_linestyle() == ":"]
    assert roofs == [7.5, 10.0, 12.5, 15.0, 17.5]
