"""A mix on the command line of `tersor bench linear`: which rows have which format, and what is refused."""

from __future__ import annotations

import json

import pytest

from tersor.bench import contenders, linear
from tersor.bench.blend import Blend
from tersor.bench.shapes import Shape
from tersor.cli import bench
from tersor.cli.main import run
from tersor.errors import FormatError, InputError
from tersor.formats import Activations

SHAPE = Shape(4096, 512)


def blend(text: str, in_order: bool = False) -> Blend:
    (found,) = bench.blends([text], [SHAPE], in_order)
    assert isinstance(found, Blend)
    return found


def test_shares_of_rows_are_those_of_the_text_and_so_is_the_name() -> None:
    text = "uint4:g128=90+int8=10"
    found = blend(text)
    assert found.assignment(4096).rows == (3686, 410)
    assert found.assignment(4096).level != bytes(sorted(found.assignment(4096).level))
    assert contenders.label(found, Activations.INT8) == f"{text}:i8"
    ordered = blend(text, in_order=True)
    assert ordered.assignment(4096).level == bytes(sorted(found.assignment(4096).level))
    assert contenders.unlabelled(contenders.label(ordered, "int8")) == (f"{text}:ordered", Activations.INT8)
    assert found.packed_bytes(4096, 512) == 3686 * (256 + 4 * 3) + 410 * (512 + 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("uint4:g128=90+int8", "each level of a mix has its share"),
        ("uint4:g128=90+int8=20", "100 in all"),
        ("uint4=x+int8=10", "each level of a mix has its share"),
        ("int8=50+int8=50", "level int8.* stands there twice"),
        ("uint4:g100=50+int8=50", "100"),
        ("uint44=50+int8=50", "uint44"),
    ],
)
def test_what_is_no_mix_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises((FormatError, InputError), match=words) as caught:
        bench.blends([text], [SHAPE], False)
    assert "\n" not in str(caught.value)


def test_a_dry_run_says_how_one_launch_has_the_row_sets(capsys: pytest.CaptureFixture[str]) -> None:
    mix = "fp4_e2m1=50+fp6_e2m3=50"
    command = ["bench", "linear", "1024x512", "--format", mix, "--n", "4", "--dry-run", "--json", "--chip"]
    assert run([*command, "h200"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["kernel"] == mix and row["config"].startswith("row sets in one launch") and row["predicted_microseconds"]
    assert run([*command, "a100"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["config"] == "a product a row set" and row["predicted_microseconds"] is None


def test_a_problem_has_the_rows_of_every_level() -> None:
    problem = linear.mixed_problem(SHAPE, blend("fp4_e2m1=25+int8=75"), 7, Activations.NATIVE)
    assert [(level.oc, level.bits, level.n) for level in problem.levels] == [(1024, 4, 7), (3072, 8, 7)]
