"""`tersor bench linear`: shapes, contenders, rows, table, picture and the command, without a GPU."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tersor import ops
from tersor.bench import contenders, linear, report, shapes, timing
from tersor.bench.contenders import Calls, Contender, UnfitError
from tersor.bench.linear import Row, Skipped
from tersor.bench.shapes import Shape, resolve
from tersor.cli import bench as cli
from tersor.compress import quantize_rtn
from tersor.errors import FormatError, InputError, OutputError, UnsupportedError
from tersor.formats import get_scheme
from tersor.layouts import PackedWeight
from tersor.ops import mode

ROOT = Path(__file__).resolve().parents[2]
FP6 = get_scheme("fp6_e3m2")


def sizes(words: Sequence[str]) -> dict[str, str]:
    """Shapes as name -> sizes."""
    return {shape.name: str(shape) for shape in resolve(words)}


def test_shapes_of_named_models() -> None:
    assert list(sizes(["llama-2-70b"]).values()) == ["10240x8192", "8192x8192", "57344x8192", "8192x28672"]
    assert sizes(["Llama-3-8B"]) == {
        "llama-3-8b qkv_proj": "6144x4096",
        "llama-3-8b o_proj": "4096x4096",
        "llama-3-8b gate_up_proj": "28672x4096",
        "llama-3-8b down_proj": "4096x14336",
    }
    assert list(sizes(["opt-30b"]).values()) == ["21504x7168", "7168x7168", "28672x7168", "7168x28672"]
    assert list(sizes(["qwen3-32b"]).values()) == ["10240x5120", "5120x8192", "51200x5120", "5120x25600"]
    for name, geometry in shapes.MODELS.items():
        assert geometry.heads % geometry.kv_heads == 0, name
        assert {ic % 128 for _, ic in geometry.linears().values()} == {0}, name


def test_equal_sizes_are_one_shape_with_all_its_names() -> None:
    found = resolve(["llama-3-8b", "mistral-7b", "4096x4096", "100x7"])
    assert len(found) == 5
    assert found[1] == Shape(4096, 4096, "llama-3-8b o_proj, mistral-7b o_proj")
    assert found[-1] == Shape(100, 7)


def test_shapes_of_a_folder() -> None:
    assert sizes([str(ROOT / "examples" / "tiny-lm")]) == {
        "tiny-lm qkv_proj": "512x256",
        "tiny-lm o_proj": "256x256",
        "tiny-lm gate_up_proj": "1280x256",
        "tiny-lm down_proj": "256x640",
    }


def test_projections_are_joined_only_where_they_read_the_same() -> None:
    linears = {"a.q_proj": (8, 4), "a.k_proj": (4, 4), "a.v_proj": (4, 4), "b.gate_proj": (6, 4), "b.up_proj": (6, 5)}
    assert shapes.joined(linears) == [("qkv_proj", (16, 4)), ("gate_proj", (6, 4)), ("up_proj", (6, 5))]
    assert shapes.joined({"x.fc": (3, 2), "y.fc": (3, 2), "z.fc": (2, 3)}) == [("fc", (3, 2)), ("fc", (2, 3))]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("llama-3-8", "no shapes for 'llama-3-8', did you mean 'llama-3-8b'?"),
        ("0x8", "output and input channels are at least 1"),
        ("8x", "no shapes for '8x'"),
        ("docs", "has no config.json"),
    ],
)
def test_words_that_are_no_shapes(word: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError) as caught:
        resolve([word])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_are_read_strictly() -> None:
    assert cli.numbers("--n", "16,1,16, 8") == [16, 1, 8]
    for text in ("", "1,,2", "0", "-1", "many"):
        with pytest.raises(InputError, match="--n"):
            cli.numbers("--n", text)
    assert [
        contenders.label(s) for s in cli.schemes(["fp6_e2m3", "int4:g128", "mxfp6_e2m3", "fp6"], [Shape(8, 256)])
    ] == [
        "fp6_e2m3",
        "int4:g128",
        "mxfp6_e2m3",
    ]
    with pytest.raises(FormatError, match="group size 128 does not divide the 200"):
        cli.schemes(["int4:g128"], [Shape(8, 256), Shape(8, 200)])
    with pytest.raises(FormatError, match="--format fp9"):
        cli.schemes(["fp9"], [])


def test_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    assert contenders.parse_rivals(None) == ("cublas", "fp8")
    assert contenders.parse_rivals("none") == ()
    assert contenders.parse_rivals("fp8, cublas") == ("fp8", "cublas")
    with pytest.raises(InputError, match="did you mean 'cublas'"):
        contenders.parse_rivals("cublass")
    with pytest.raises(UnsupportedError, match="humming is not installed"):
        contenders.parse_rivals("humming")
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: object())
    assert contenders.parse_rivals(None) == ("cublas", "fp8", "humming")
    both = [FP6, get_scheme("int4", 128)]
    found = contenders.contenders(both, torch.float16, ("pdl", "plain"), ("cublas", "fp8", "humming"))
    assert [(one.name, one.chains) for one in found] == [
        ("fp6_e3m2", ("pdl", "plain")),
        ("int4:g128", ("pdl", "plain")),
        ("cublas", ("plain",)),
        ("fp8", ("plain",)),
        ("humming fp6_e3m2", ("plain",)),
        ("humming int4:g128", ("plain",)),
    ]
    assert [one.weight_bytes(8192, 4096) for one in found[::2]] == [25182208, 67108864, 25182208]


def test_another_packages_error_is_a_reason() -> None:
    def broken() -> None:
        raise RuntimeError("no\nkernel")

    with pytest.raises(UnfitError, match="RuntimeError: no kernel"):
        contenders.foreign(broken)


@pytest.mark.parametrize(("oc", "ic"), [(32, 32), (48, 32)])
def test_a_chain_hands_outputs_on_where_sizes_allow(oc: int, ic: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [PackedWeight.from_encoded(quantize_rtn(torch.randn(oc, ic), FP6)) for _ in range(10)]
    x = torch.randn(2, ic)
    seen: list[tuple[torch.Tensor, bool]] = []
    real = ops.linear

    def spy(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        y = real(x, weight)
        seen.append((x, mode.current().early))
        outputs.append(y)
        return y

    outputs: list[torch.Tensor] = []
    monkeypatch.setattr(ops, "linear", spy)
    for _ in range(2):  # once before the capture and once in it
        for call in contenders.chained(weights, x, early=False):
            call()
    assert [early for _, early in seen] == [False] * 20
    assert mode.current().early
    for index, (source, _) in enumerate(seen):
        handed_on = oc == ic and index % 10 % 8
        assert source is (outputs[index - 1] if handed_on else x), index


class Clock:
    """Time that passes where a graph is replayed, 8 ms each, by a stand-in for what timing uses of torch and time."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.replays = 0
        self.recorded: list[int] = []
        self.device = str
        self.cuda = SimpleNamespace(
            Stream=lambda device: None,
            current_device=lambda: 0,
            synchronize=lambda: None,
            CUDAGraph=lambda: SimpleNamespace(replay=self.replay),
            Event=lambda enable_timing: SimpleNamespace(
                record=lambda: self.recorded.append(self.replays),
                synchronize=lambda: None,
                elapsed_time=lambda end: 8.0,
            ),
        )

    def replay(self) -> None:
        self.replays += 1
        self.seconds += 0.008

    def perf_counter(self) -> float:
        return self.seconds


def test_a_graph_is_warm_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(), []
    monkeypatch.setattr(timing, "torch", clock)
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(timing, "capturing", lambda graph, device: contextlib.nullcontext())
    monkeypatch.setattr(timing, "beside", lambda side: contextlib.nullcontext())
    timing._side_stream.cache_clear()
    assert timing.graph_microseconds([lambda: calls.append(1)] * 4, replays=3) == 2000
    timing._side_stream.cache_clear()
    assert len(calls) == 8
    assert clock.recorded == [3, 4, 4, 5, 5, 6]  # 20 ms take 3 replays of 8 ms


def test_enough_copies() -> None:
    assert timing.copies(12 << 20) == 59
    assert timing.copies(5 << 30) == 2


def fake(
    name: str, chains: tuple[str, ...], time: float, refuses: Callable[[int], bool] = lambda n: False
) -> Contender:
    """A contender whose one call is its time; it has no weights above 1000 channels."""

    def build(oc: int, ic: int) -> Callable[[int, str], Calls]:
        if oc > 1000:
            raise UnfitError("too tall")

        def schedule(n: int, chain: str) -> Calls:
            def call() -> float:
                if refuses(n):
                    raise UnfitError("too few tokens")
                return time * n * (2 if chain == "plain" else 1)

            return [call]

        return schedule

    return Contender(name=name, chains=chains, weight_bytes=lambda oc, ic: oc * ic, build=build)


def clock(calls: Calls) -> Any:
    """A clock that believes what it is told."""
    return calls[0]()


def test_the_first_time_after_weights_are_made_is_thrown_away() -> None:
    timed: list[float] = []

    def slow_at_first(calls: Calls) -> float:
        timed.append(clock(calls))
        return 100.0 if len(timed) == 1 else timed[-1]

    ((first, second),) = linear.measure([Shape(8, 8)], [1, 2], [fake("fp8", ("plain",), 1.0)], slow_at_first)
    assert isinstance(first, Row) and isinstance(second, Row)
    assert (first.microseconds, second.microseconds) == (2.0, 4.0)
    assert timed == [2.0, 2.0, 4.0]


def test_rows_come_in_order_and_refusals_are_kept() -> None:
    runners = [fake("fp6_e3m2", ("pdl", "plain"), 1.0), fake("fp8", ("plain",), 0.5, lambda n: n < 4)]
    steps: list[tuple[int, int]] = []
    found = list(
        linear.measure(
            [Shape(100, 200, "a"), Shape(2000, 3)],
            [1, 4],
            runners,
            clock,
            lambda done, total: steps.append((done, total)),
        )
    )
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    first, second = found
    assert [(row.kernel, row.chain, row.n, row.microseconds) for row in first if isinstance(row, Row)] == [
        ("fp6_e3m2", "pdl", 1, 1.0),
        ("fp6_e3m2", "plain", 1, 2.0),
        ("fp6_e3m2", "pdl", 4, 4.0),
        ("fp6_e3m2", "plain", 4, 8.0),
        ("fp8", "plain", 4, 4.0),
    ]
    assert first[4] == Skipped(kernel="fp8", oc=100, ic=200, n=1, why="too few tokens")
    assert second == [Skipped(kernel=name, oc=2000, ic=3, n=None, why="too tall") for name in ("fp6_e3m2", "fp8")]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A result of made-up times for one weight of 40 MB, a memory of 4 TB/s."""
    monkeypatch.setattr(report, "environment", lambda: {**FACTS})
    times = {
        ("fp6_e3m2", "pdl"): 12.5,
        ("fp6_e3m2", "plain"): 16.0,
        ("cublas", "plain"): 40.0,
        ("fp8", "plain"): 20.0,
        ("humming fp6_e3m2", "plain"): 25.0,
    }
    rows: list[Row | Skipped] = [
        Row(
            name="m o_proj",
            oc=8000,
            ic=5000,
            n=n,
            kernel=kernel,
            chain=chain,
            microseconds=time * n,
            weight_bytes=40_000_000,
        )
        for n in (1, 2)
        for (kernel, chain), time in times.items()
        if (kernel, n) != ("humming fp6_e3m2", 2)
    ]
    rows.append(Skipped(kernel="humming fp6_e3m2", oc=8000, ic=5000, n=2, why="it says no"))
    return linear.result(rows, dtype="float16", read_bandwidth=4e12)


FACTS = {
    "commit": "abc1234",
    "tersor": "0.1.0",
    "torch": "2.11.0",
    "cuda": "13.0",
    "driver": "580.1",
    "date": "2026-11-20",
    "gpu": "NVIDIA H200",
    "multiprocessors": 132,
}


def check_schema(result: dict[str, Any]) -> None:
    """Hold a result to what the documentation of `bench.linear` says."""
    assert list(result) == ["kind", "version", "environment", "method", "dtype", "read_bandwidth", "rows", "skipped"]
    assert (result["kind"], result["version"]) == (linear.KIND, linear.VERSION)
    assert set(result["environment"]) == set(FACTS)
    assert result["dtype"] in ("float16", "bfloat16")
    assert 1e11 < result["read_bandwidth"] < 1e14
    assert result["rows"]
    kinds = {"name": str, "oc": int, "ic": int, "n": int, "kernel": str, "chain": str, "weight_bytes": int}
    for row in result["rows"]:
        assert set(row) == {*kinds, "microseconds"}
        assert all(type(row[key]) is kind for key, kind in kinds.items())
        assert row["microseconds"] > 0
        assert row["chain"] in ("plain", "pdl")
    for row in result["skipped"]:
        assert set(row) == {"kernel", "oc", "ic", "n", "why"}


def test_the_schema(measured: dict[str, Any]) -> None:
    check_schema(json.loads(report.text(measured)))
    for path in (ROOT / "bench" / "results").glob("linear_*.json"):
        check_schema(json.loads(path.read_text(encoding="utf-8")))


def test_the_table(measured: dict[str, Any]) -> None:
    headings, cells = linear.columns(measured)
    assert headings == ["weight", "N", "kernel", "us", "GB/s", "of roofline", "x cuBLAS", "x FP8", "x humming"]
    weight = "m o_proj 8000x5000"
    assert cells[0] == [weight, "1", "fp6_e3m2, pdl", "12.5", "3200", "80 %", "3.20", "1.60", "2.00"]
    assert cells[1][2:] == ["fp6_e3m2", "16.0", "2500", "62 %", "2.50", "1.25", "1.56"]
    assert cells[2][2:] == ["cublas", "40.0", "1000", "25 %", "1.00", "0.50", "-"]
    assert cells[5][6:] == ["3.20", "1.60", "-"]
    alone = {**measured, "rows": measured["rows"][:2]}
    assert linear.columns(alone)[0][-1] == "of roofline"


def test_results_are_one_row_a_line(measured: dict[str, Any], tmp_path: Path) -> None:
    text = report.text(measured)
    assert json.loads(text) == measured
    assert sum('"microseconds"' in line for line in text.splitlines()) == len(measured["rows"]) == 9
    path = tmp_path / "new" / "linear.json"
    report.write(path, text)
    assert path.read_text() == text
    assert [item.name for item in path.parent.iterdir()] == ["linear.json"]
    with pytest.raises(OutputError, match="cannot be written"):
        report.write(path / "below.json", text)


def test_the_commit_is_that_of_a_checkout_only(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").touch()
    assert report.commit(tmp_path) == "unknown"
    facts = report.environment()
    assert {"commit", "tersor", "torch", "cuda", "driver", "date"} <= set(facts)
    assert len(facts["date"]) == 10


def test_a_result_is_shown(measured: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from tersor.cli.bench_linear import show

    show(measured, json=False)
    captured = capsys.readouterr()
    assert captured.out.startswith("NVIDIA H200, float16 activations; a large read reaches 4.00 TB/s\n")
    assert "fp6_e3m2, pdl  12.5  3200" in captured.out
    assert captured.err == "humming fp6_e3m2 is not timed at 8000x5000, 2 tokens: it says no\n"
    show(measured, json=True)
    check_schema(json.loads(capsys.readouterr().out))
