"""`tersor report --card`: what was measured of a checkpoint stands in its model card, once, whatever else is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import calibrated, measured
from helpers.pages import refused

from tersor.cli.main import run
from tersor.convert import quantize
from tersor.errors import InputError
from tersor.report import card

KL = (0.08, 0.12, 0.10, 0.06)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small checkpoint in int4."""
    quantize(calibrated.model("llama", tmp_path / "model"), tmp_path / "int4", format="int4", group_size=16)
    return tmp_path / "int4"


def judged(checkpoint: Path, label: str = "int4", **more: Any) -> dict[str, Any]:
    """Return a result of `tersor eval` that measured a checkpoint, on another machine."""
    nbytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    return measured.evaluation(measured.model(label, KL, size=nbytes, model="elsewhere/int4"), **more)


def test_the_card_says_what_was_measured_and_a_second_time_in_its_place(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (checkpoint / "README.md").read_text()
    one = measured.write(tmp_path / "one.json", judged(checkpoint, text="some/folder/text_a.txt"))
    assert run(["report", one, str(checkpoint), "--card"]) == 0
    assert capsys.readouterr().out == f"written to {checkpoint / 'README.md'}\n"
    first = (checkpoint / "README.md").read_text()
    assert first.startswith(before) and first.count(card.BEGIN) == first.count(card.END) == 1
    assert "## Measured against base\n" in first and "4 windows of 64 tokens of text\\_a.txt" in first
    assert (
        "| 16bit activations | 4.250 |" in first and "| +9.4 +- 1.4 | 90 +- 13 | 90.00 | 900.0 | 12.5 +- 2.0 |" in first
    )
    assert "KL x 1000 = 2.00 +- 0.10." in first and "commit abc1234, 2026-11-30." in first

    (checkpoint / "README.md").write_text(first + "\nWritten by hand.\n")
    two = judged(checkpoint, "int4@kv-dtype=fp8", floor=None)
    two["models"][0] |= {"kv_dtype": "fp8", "kl": 0.5}
    again = ["report", measured.write(tmp_path / "two.json", two), str(checkpoint), "--card", "--json"]
    assert run(again) == 0
    second = (checkpoint / "README.md").read_text()
    assert json.loads(capsys.readouterr().out)["checkpoints"][0]["label"] == "int4"
    assert second.startswith(before) and second.endswith(f"{card.END}\n\nWritten by hand.\n")
    assert "| 16bit activations, keys and values in fp8 |" in second and "Noise floor" not in second
    assert "| 500 +- 13 |" in second and "90 +- 13" not in second
    assert run(again) == 0 and (checkpoint / "README.md").read_text() == second


def test_a_card_is_written_whole_or_not_at_all(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = measured.write(tmp_path / "one.json", judged(checkpoint))
    before = (checkpoint / "README.md").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(["report", one, str(checkpoint), "--card"]) == 1
    assert "README.md: cannot be written: No space left on device" in capsys.readouterr().err
    assert (checkpoint / "README.md").read_bytes() == before and not list(checkpoint.glob("*.tmp"))


def test_cards_that_cannot_be_written_into_are_one_line_each(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = measured.write(tmp_path / "one.json", judged(checkpoint))
    assert "give their directories" in refused(["report", one, "--card"], capsys)
    assert "none of the runs measured it" in refused(["report", str(checkpoint), "--card"], capsys)
    other = judged(checkpoint)
    other["models"][0]["weight_bytes"] += 1
    two = measured.write(tmp_path / "two.json", other)
    assert "none of the runs measured it" in refused(["report", two, str(checkpoint), "--card"], capsys), "it changed"
    (checkpoint / "README.md").write_text(f"{card.BEGIN}\nhalf")
    assert "do not stand there once each" in refused(["report", one, str(checkpoint), "--card"], capsys)
    (checkpoint / "README.md").unlink()
    assert "there is no model card" in refused(["report", one, str(checkpoint), "--card"], capsys)


def test_marks_out_of_order_are_refused() -> None:
    for text in (f"{card.END} {card.BEGIN}", f"{card.BEGIN} {card.END} {card.BEGIN}", card.END):
        with pytest.raises(InputError, match="once each"):
            card.replaced(text, "x", "card")
    assert card.replaced("a\n", "x\n", "card") == f"a\n\n{card.BEGIN}\nx\n{card.END}\n"
