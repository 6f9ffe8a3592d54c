"""The page of a plan: it holds every number of the terminal's report, stands alone, and draws what the plan says."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.fakes import FakeGpu
from helpers.pages import Page

from tersor.cli.main import run
from tersor.hardware import chip_named
from tersor.planner import links
from tersor.planner.plan import Plan, read
from tersor.report.mesh_picture import MOST_NODES, axes_of, mesh_picture, seats
from tersor.report.plan_page import page

DENSE = ("llama-3-70b", "--format", "int4:g128", "--mesh", "2x8", "--chip", "h200")
MIXTURE = ("qwen3-30b-a3b", "--format", "fp6", "--devices", "7", "--chip", "h200")
PRICES = links.of_chip(chip_named("h200"))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, whatever the machine."""
    FakeGpu().install(monkeypatch)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """The files of two plans."""
    folder, found = tmp_path_factory.mktemp("plans"), {}
    for number, words in enumerate((DENSE, MIXTURE)):
        found[words] = folder / f"{number}.json"
        assert run(["plan", *words, "-o", str(found[words])]) == 0
    return found


def words_of(text: str) -> str:
    """What a reader sees of a page, a blank between elements."""
    return html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)))


@pytest.mark.parametrize("words", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_every_number_of_the_terminals_report_is_in_the_page(
    words: tuple[str, ...], plans: dict[tuple[str, ...], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "page.html"
    assert run(["plan", "--from", str(plans[words]), "--html", str(target)]) == 0
    told = capsys.readouterr().out
    assert f"wrote {target}" in told
    numbers = re.findall(r"\d[\d,]*(?:\.\d+)?", told.replace(f"wrote {target}", ""))
    assert len(numbers) > 150
    shown = set(re.findall(r"\d[\d,]*(?:\.\d+)?", words_of(target.read_text(encoding="utf-8"))))
    assert not {number.rstrip(",") for number in numbers} - {number.rstrip(",") for number in shown}


@pytest.mark.parametrize("words", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_the_page_is_whole_and_asks_nobody_for_anything(
    words: tuple[str, ...], plans: dict[tuple[str, ...], Path]
) -> None:
    text = page(read(plans[words]), PRICES)
    found = Page(text)  # elements close in order
    assert [name for _, name in found.named("h2")] == [
        "Mesh", "Stages", "Cuts", "Predicted time", "How good it is", "Sources",
    ]  # fmt: skip
    assert not re.search(r"\b(?:src|href|onload|onclick)=|https?:|url\(|@import|<script", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "@media print" in text


def test_a_plan_made_just_now_has_the_same_page(plans: dict[tuple[str, ...], Path], tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    assert run(["plan", *DENSE, "--html", str(target)]) == 0
    seconds = re.compile(r"(?:, |in |>)\d+\.\d\d s\b")
    assert seconds.sub("", target.read_text(encoding="utf-8")) == seconds.sub("", page(read(plans[DENSE]), PRICES))


def test_the_mesh_shows_whose_part_every_gpu_has(plans: dict[tuple[str, ...], Path]) -> None:
    plan = read(plans[DENSE])
    picture = Page(mesh_picture(plan, PRICES))
    drawn = {int(own["data-device"]): text for own, text in picture.named("g") if "data-device" in own}
    assert sorted(drawn) == list(range(16))
    titles = [text for _, text in picture.named("title")]
    for number, stage in enumerate(plan.stages):
        for rank, device in enumerate(stage.devices):
            assert f"GPU {device}: replica 0, stage {number}, rank {rank} of {plan.tensor}" in titles
    words = " ".join(text for _, text in picture.named("text"))
    assert "inside: 360 GB/s, from 10 us" in words and "50 GB/s" in words and "s1 to s2" in words
    assert len(picture.named("rect", "group")) == plan.pipeline


def test_gpus_without_a_part_are_idle(plans: dict[tuple[str, ...], Path]) -> None:
    plan = replace(read(plans[MIXTURE]), data=1, pipeline=1, tensor=5, expert=1, idle=2)
    picture = Page(mesh_picture(plan, PRICES))
    assert [text for _, text in picture.named("text")].count("idle") == 2
    assert set(seats(axes_of(plan), 7)) == set(range(5))


def test_axes_say_where_they_stand_and_what_passes(plans: dict[tuple[str, ...], Path]) -> None:
    plan = read(plans[DENSE])
    found = Page(page(plan, PRICES))
    assert found.row("tensor")[1:4] == ["4", "4 side by side in a node", "links of a node"]
    where = "2 boundaries inside a node, 1 boundary between nodes"
    assert found.row("pipeline", "4")[2:4] == [where, "links of a node and links between nodes"]
    sums = sum(part.seconds for part in plan.times if part.kind == "sums" and part.name.startswith("decode."))
    assert found.row("tensor")[4].startswith(f"sums: {sums * 1e3:.3f} ms of decode")
    apart = Page(page(replace(plan, data=2, expert=2, pipeline=2, stages=plan.stages[:2]), PRICES))
    assert apart.row("expert", "2 replicas x 4")[1:4] == [
        "2 replicas x 4",
        "4 + 4 in 2 nodes",
        "links of nodes and between",
    ]


def test_a_large_mesh_is_drawn_in_part(plans: dict[tuple[str, ...], Path]) -> None:
    plan = replace(read(plans[DENSE]), mesh="2048x8", data=1024)
    text = page(plan, PRICES)
    assert f"{2048 - MOST_NODES} more nodes go on in the same order" in text
    assert len(Page(text).named("g")) == 8 * MOST_NODES
    assert len(text) < 200_000


def test_bandwidths_are_those_that_the_plan_was_priced_with(plans: dict[tuple[str, ...], Path]) -> None:
    plan = read(plans[DENSE])
    assert "360 GB/s" in page(plan, PRICES)
    assert "GB/s, from" not in page(replace(plan, links="mine.json"), PRICES)


def test_bars_of_bytes_are_as_long_as_the_share_of_the_room(plans: dict[tuple[str, ...], Path]) -> None:
    plan = read(plans[DENSE])
    memory = plan.stages[0].memory[0]
    found = Page(page(plan, PRICES))
    bars = re.search(r"<h3>Bytes a rank</h3>.*?<tbody>(.*?)</tbody>", page(plan, PRICES), re.DOTALL)
    assert bars is not None
    first = re.search(r"<svg.*?</svg>", bars[1])
    assert first is not None
    lengths = [float(width) for width in re.findall(r'width="([\d.]+)" height="8"', first[0])]
    pieces = (memory.weights, memory.kv, memory.activations, memory.logits, memory.buffers)
    assert lengths == pytest.approx([300 * piece / memory.room for piece in pieces], abs=0.006)
    row = next(cells for cells in found.rows if cells[:2] == ["0", "0-3"])
    assert row[-1] == f"{memory.total / memory.room:.0%}"


def test_slices_are_written_rank_by_rank(plans: dict[tuple[str, ...], Path]) -> None:
    plan = read(plans[MIXTURE])
    found = Page(page(plan, PRICES))
    assert [text for _, text in found.named("span", "name")] == [cut.module for cut in plan.cuts]
    start = next(number for number, cells in enumerate(found.rows) if cells[-1:] == ["of each rank, in order"])
    cut = [0, 0]
    for row, one in zip(found.rows[start + 1 :], plan.cuts, strict=False):
        for piece in one.slices:
            span = (piece.rows or (None,))[0] or piece.columns or piece.experts
            cut[span is not None] += 1
            assert span is None or f"{span[0]}-{span[1]}" in row[-1], one.module
    assert all(cut)


def test_slices_are_drawn_along_what_is_cut(plans: dict[tuple[str, ...], Path]) -> None:
    text = page(read(plans[DENSE]), PRICES)
    pictures = {words: svg for svg, words in re.findall(r"(<svg[^>]*><title>([^<]*)</title>.*?</svg>)", text)}
    rows = pictures["model.layers.{layer}.self_attn.q_proj: rows"]
    columns = pictures["model.layers.{layer}.self_attn.o_proj: columns"]
    assert re.findall(r'width="([\d.]+)" height="([\d.]+)"', rows) == [("60", "5")] * 4
    assert re.findall(r'width="([\d.]+)" height="([\d.]+)"', columns) == [("15", "20")] * 4
    assert re.findall(r'width="(\d+)"', pictures["model.embed_tokens: all on every rank"]) == ["60"]


def test_parts_of_the_time_fill_their_bar(plans: dict[tuple[str, ...], Path]) -> None:
    text = page(read(plans[DENSE]), PRICES)
    part = text[text.index("<h2>Predicted time") :]
    for bar in re.findall(r"<svg.*?</svg>", part[: part.index("<h2>How good")]):
        lengths = [float(width) for width in re.findall(r'width="([\d.]+)" height="8"', bar)]
        if lengths:
            assert sum(lengths) == pytest.approx(300, abs=0.05)


def test_text_of_a_plan_is_no_markup(plans: dict[tuple[str, ...], Path]) -> None:
    plan: Plan = replace(read(plans[DENSE]), model="<b>model</b>", notes=("a < b",))
    text = page(plan, PRICES)
    assert "<b>model</b>" not in text and "&lt;b&gt;model&lt;/b&gt;" in text and "a &lt; b" in text


def test_a_page_that_cannot_be_written_is_one_line(
    plans: dict[tuple[str, ...], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert run(["plan", "--from", str(plans[DENSE]), "--html", str(tmp_path / "file" / "page.html")]) != 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "cannot be written" in captured.err and not captured.out
