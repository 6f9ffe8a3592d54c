"""`tersor report` of checkpoints, of runs that are none, and in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import calibrated, measured
from helpers.browser import CHROMIUM, Browser
from helpers.pages import Page, refused, reported

from tersor.convert import quantize

INT4, GPTQ = (0.08, 0.12, 0.10, 0.06), (0.04, 0.05, 0.06, 0.03)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, calibrated by a recipe that takes no time, its down projections in another format."""
    from tersor.compress import RECIPES

    folder = tmp_path_factory.mktemp("checkpoint")
    model, text = calibrated.model("llama", folder / "model"), calibrated.text(folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "gptq", calibrated.quick(RECIPES["gptq"]))
        options = {**calibrated.OPTIONS, "calibration": text, "overrides": ["down_proj=int8:row"]}
        quantize(model, folder / "out", **options)
    return folder / "out"


def test_a_checkpoint_shows_its_choice_and_every_layer(checkpoint: Path, tmp_path: Path) -> None:
    log = json.loads((checkpoint / "tersor-calibration.json").read_text())
    page = reported(tmp_path, str(checkpoint))
    assert (
        page.row("codes")[1] == "calibrated by GPTQ"
        and page.row("override")[1] == "down_proj = int8, one float16 scale a row"
    )
    assert page.row("calibration")[1] == "3 windows of 32 tokens of text.txt"
    assert page.row("format")[1] == "int4, one float16 scale a group of 16"
    assert page.row("calibrated by")[1] == log["computed_on"] and page.row("source")[1] == "model"
    for line in log["layers"]:
        cells = page.row(line["layer"])
        assert cells[1] == line["format"] and cells[5] == f"{100 * line['relative_error']:.3g} %"
        if "objective_after" in line:
            assert cells[7:9] == [f"{line['objective_before']:.4g}", f"{line['objective_after']:.4g}"]
    errors = [line["relative_error"] for line in log["layers"]]
    bars = [float(where["width"]) for where, _ in page.named("rect", "worse")]
    assert max(bars) == 100 and min(bars) == pytest.approx(100 * min(errors) / max(errors), abs=0.01)
    assert page.row("int8:row:float16")[3] == str(len([line for line in log["layers"] if "int8" in line["format"]]))


def test_a_mix_shows_its_levels_and_what_they_were_chosen_for(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of two levels as config.json, `inspect` and tersor-mix.json would say it."""
    from tersor.report.document import document
    from tersor.report.page import page
    from tersor.report.runs import read_runs

    copied = tmp_path / "out"
    shutil.copytree(checkpoint, copied)
    mix = {"levels": ["uint3:g64:float16", "int8:row:float16"], "shares": [0.9, 0.1], "padding_bytes": 2000}
    mix |= {"loss": 0.0125, "loss_without_units": 0.012, "layers": {}}
    measured.write(copied / "tersor-mix.json", mix)
    made = document(read_runs([str(copied)]))
    (one,) = made["checkpoints"]
    one["levels"] = [{"format": "uint3", "group_size": 64, "scale_dtype": "float16"}]
    one["layers"][0]["levels"] = [["uint3:g64:float16", 58], ["int8:row:float16", 6]]
    shown = Page(page(made))
    assert shown.row("of all output features")[1] == "90.0% at uint3:g64:float16, 10.0% at int8:row:float16"
    assert shown.row("level")[1] == "uint3, one float16 scale a group of 64"
    assert (
        shown.row("to fill units of kernels")[1] == "2.0 kB" and shown.row("expected loss")[1] == "0.0125 nats a token"
    )
    one["mix"] |= {"score": "mixllm"}
    scored = Page(page(made))
    assert scored.row("compared by the score")[1] == "mixllm"
    assert scored.row("expected loss")[1] == "0.0125 by that score"
    layer = shown.row(one["layers"][0]["layer"])
    assert layer[1].endswith(" (58 of uint3:g64:float16, 6 of int8:row:float16)")
    for broken, words in (
        ({**mix, "shares": [1]}, "no share for every level"),
        ({**mix, "loss": "x"}, "'loss' is 'x'"),
    ):
        measured.write(copied / "tersor-mix.json", broken)
        assert words in refused(["report", str(copied), "--json"], capsys)


def test_layers_are_kept_beside_a_checkpoint_that_is_rounded_to_nearest(tmp_path: Path) -> None:
    model = calibrated.model("llama", tmp_path / "model")
    done = quantize(model, tmp_path / "out", format="int4", group_size=16)
    kept = json.loads((tmp_path / "out" / "tersor-layers.json").read_text())
    assert (kept["kind"], kept["version"]) == ("tersor layers", 1)
    assert {line["tensor"]: line["relative_error"] for line in kept["layers"]} == {
        row.name: pytest.approx(row.relative_error, rel=5e-4) for row in done.compressed
    }
    page = reported(tmp_path, str(tmp_path / "out"))
    for line in kept["layers"]:
        assert page.row(line["layer"])[5] == f"{100 * line['relative_error']:.3g} %"
    (tmp_path / "out" / "tersor-layers.json").unlink()
    older = reported(tmp_path, str(tmp_path / "out"))
    assert older.row(kept["layers"][0]["layer"])[5] == "-"
    assert any("an older Tersor" in words for _, words in older.named("p"))


def test_experts_of_a_layer_are_one_line(tmp_path: Path) -> None:
    from tersor.report.checkpoints import checkpoint_dict
    from tersor.report.runs import Checkpoint, read_runs

    model = calibrated.model("qwen3_moe", tmp_path / "model")
    quantize(model, tmp_path / "out", format="int4", group_size=16)
    (found,) = read_runs([str(tmp_path / "out")])
    assert isinstance(found, Checkpoint)
    experts = [line for line in checkpoint_dict(found)["layers"] if "experts" in line["layer"]]
    own = [item for item in found.found.items if item.compressed and "experts" in item.name]
    assert sum(line["bytes"] for line in experts) == sum(item.nbytes for item in own)
    assert sum(line["count"] for line in experts) == len(own) > len(experts)
    errors = {line["layer"]: line["relative_error"] for line in found.layers}
    first = experts[0]
    several = [
        error for layer, error in errors.items() if re.sub(r"\.\d+\.(?=[a-z_]+$)", ".*.", layer) == first["layer"]
    ]
    assert len(several) == first["count"]
    assert first["relative_error"] == pytest.approx(math.sqrt(sum(error**2 for error in several) / len(several)))


def test_runs_that_are_none_are_one_line_each(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, target = measured.evaluation(measured.model("int4", INT4)), ["-o", str(tmp_path / "x.html")]
    cases: dict[str, tuple[Any, str]] = {
        "list": ([], "is no run: neither a JSON of tersor eval, bench latency"),
        "other": ({"kind": "tersor demo", "version": 1}, "is no run"),
        "newer": ({**good, "version": 2}, "results of tersor eval, version 2, and this Tersor reads version 1"),
        "empty": ({key: value for key, value in good.items() if key != "models"}, "neither models nor tasks"),
        "lacking": ({**good, "models": [{"label": "x"}]}, "model 0: damaged: 'weight_bytes' is missing"),
        "words": ({**good, "models": [{**good["models"][0], "kl": "many"}]}, "damaged: 'kl' is 'many'"),
        "windows": ({**good, "models": [{**good["models"][0], "windows": 5}]}, "no number for every window"),
        "size": ({**good, "models": [{**good["models"][0], "weight_bytes": 0}]}, "is not positive"),
        "floor": ({**good, "noise_floor": {}}, "noise_floor: damaged: 'rounding' is missing"),
        "rows": ({**measured.latency(), "rows": [{"name": "x"}]}, "damaged: a row lacks"),
    }
    for name, (result, words) in cases.items():
        path = measured.write(tmp_path / f"{name}.json", result)
        assert words in refused(["report", path, *target], capsys), name
    for name, content, words in (
        ("text", "no JSON", "cannot be read as JSON"),
        ("nan", '{"a": NaN}', "cannot be read as JSON: NaN"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert words in refused(["report", str(tmp_path / name), *target], capsys)
    assert "no such file or directory" in refused(["report", str(tmp_path / "none.json"), *target], capsys)
    model = calibrated.model("llama", tmp_path / "model")
    assert "is not compressed" in refused(["report", str(model), *target], capsys)
    assert "config.json" in refused(["report", str(tmp_path), *target], capsys)
    shutil.copytree(checkpoint, tmp_path / "newer")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    measured.write(tmp_path / "newer" / "config.json", config)
    line = refused(["report", str(checkpoint), str(tmp_path / "newer"), *target], capsys)
    assert f"{tmp_path / 'newer'}: the checkpoint has quantization_config version 99" in line
    assert "is given twice" in refused(["report", str(checkpoint), f"{checkpoint}/.", *target], capsys)
    assert "nothing to write" in refused(["report", str(checkpoint)], capsys)
    assert "does not exist" in refused(["report", str(checkpoint), "-o", str(tmp_path / "no" / "x.html")], capsys)
    assert not (tmp_path / "x.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_the_page_by_itself_within_its_width(tmp_path: Path, checkpoint: Path) -> None:
    one = measured.evaluation(measured.model("a-long-name-" * 8, INT4), measured.model("gptq", GPTQ, bits=4.5))
    reported(tmp_path, measured.write(tmp_path / "one.json", one), str(checkpoint))
    address = (tmp_path / "report.html").as_uri()
    with Browser(tmp_path / "chromium", width=900) as browser:
        browser.open(address)
        assert browser.requests == [address] and not browser.problems
        assert browser.value("document.documentElement.scrollWidth <= window.innerWidth")
        box = "document.querySelector('svg.plot').getBoundingClientRect()"
        assert browser.value(f"{box}.width > 300 && {box}.height > 200")
        paper = "getComputedStyle(document.body).backgroundColor"
        shown = []
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.call("Emulation.setEmulatedMedia", features=features)
            shown.append(browser.value(paper))
        browser.call("Emulation.setEmulatedMedia", media="print", features=features)
        assert shown == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"] and browser.value(paper) == shown[0]
