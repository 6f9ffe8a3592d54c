"""Layers that stream to a GPU: the bits of those that stay, in graphs and without, and most of the link's bandwidth."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_decoders import CONFIGS, config_of

import tersor
from tersor.bench import latency
from tersor.cli import main
from tersor.convert import quantize
from tersor.engine.request import Row, Step
from tersor.engine.runner import Runner
from tersor.engine.sampler import Sampler
from tersor.errors import TersorError
from tersor.formats import get_scheme
from tersor.models.random import random_decoder
from tersor.models.reading import Reading
from tersor.models.streamed import Offload
from tersor.offload import pinned
from tersor.offload.disk import DiskStore
from tersor.offload.host import HostStore
from tersor.offload.image import Image

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"
PROMPTS = ["def read_file(path):\n", "import os\n", "The first rule", "x", "class Reader:\n"]
GREEDY = tersor.SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
SAMPLED = tersor.SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, seed=5, ignore_eos=True)
WAYS: list[dict[str, Any]] = [
    {"offload": "host", "resident_layers": 0},
    {"offload": "host", "resident_layers": 1},
    {"offload": "host", "resident_layers": 0, "cuda_graph": False},
    {"offload": "disk", "resident_layers": 0},
    {"offload": "disk", "resident_layers": 1, "cuda_graph": False},
    {"offload": "host"},
]


@pytest.fixture(scope="module", params=["bfloat16", "fp6_e3m2", "int4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as it is, and compressed."""
    if request.param == "bfloat16":
        return TINY
    path = tmp_path_factory.mktemp("packed") / request.param
    quantize(TINY, path, format=request.param)
    return path


def drawn(model: Path, params: tersor.SamplingParams, **options: Any) -> list[list[int]]:
    engine = tersor.LLM(model, kv_bytes=64 << 20, max_rows=16, max_step_tokens=256, max_length=256, **options)
    found = [engine.generate(PROMPTS[:count], params) for count in (1, 3, 5)]
    engine.close()
    return [output.outputs[0].token_ids for outputs in found for output in outputs]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values())))
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_engine_draws_the_tokens_of_one_that_stays(
    model: Path, way: dict[str, Any], params: tersor.SamplingParams, tmp_path: Path
) -> None:
    graphs = {"cuda_graph": way["cuda_graph"]} if "cuda_graph" in way else {}
    folder = {"offload_directory": str(tmp_path)} if way["offload"] == "disk" else {}
    wanted = drawn(model, params, **graphs)
    assert drawn(model, params, **way, **folder) == wanted
    assert not list(tmp_path.iterdir())


def pages(decoder: Any, steps: Callable[[Runner], None], graphs: bool) -> list[torch.Tensor]:
    """Return all keys and values that steps of a decoder leave, and the tokens that they drew."""
    runner = Runner(decoder, Sampler(9, decoder.config.vocabulary, decoder.device), max_rows=8, max_length=192)
    runner.allocate(latency.pages_for([8], [192]))
    if graphs:
        runner.capture()
    torch.manual_seed(0)
    latency.fill(runner.caches)
    steps(runner)
    torch.cuda.synchronize()
    return [cache.pages[1:].clone() for cache in runner.caches]  # the first one is for padding


def steps(tokens: list[list[int]]) -> Callable[[Runner], None]:
    """Return what launches steps of several sizes, each before the one ahead of it is read."""

    def run(runner: Runner) -> None:
        under_way: list[Any] = []
        for turn, batch in enumerate((1, 3, 8, 8, 2, 5, 1, 1)):
            step = latency.decoding(batch, 100 + turn, 64)
            if turn == 3:  # a prompt among them, which is no graph
                row = Row(step.rows[0].request, 20, 60, 1, True)
                step = Step(rows=[row], tokens=60, drawing=[row], grown=step.grown)
            under_way.append(runner.launch(step))
            if len(under_way) > 1:
                tokens.append(under_way.pop(0).tokens())
        tokens.append(under_way.pop().tokens())

    return run


CASES = [(name, scheme, None) for name in CONFIGS for scheme in ("fp6_e3m2", None)]
CASES += [("llama", "fp6_e3m2", 0.5), ("llama", None, 0.7)]


@pytest.mark.parametrize(("name", "scheme", "sparsity"), CASES)
@pytest.mark.parametrize("where", ["host", "disk"])
def test_keys_values_and_tokens_have_the_same_bits(
    name: str, scheme: str | None, sparsity: float | None, where: str, tmp_path: Path
) -> None:
    few = config_of(name)
    config = replace(few, layers=(*few.layers, *few.layers, few.layers[-1]))
    format = None if scheme is None else get_scheme(scheme)

    def made(offload: Offload | None) -> Any:
        return random_decoder(config, format, "cuda", torch.bfloat16, sparsity=sparsity, offload=offload)

    stays = made(None)
    graphs = not stays.waits and sparsity is None
    for captured in {False, graphs}:
        first: list[list[int]] = []
        wanted = pages(stays, steps(first), captured)
        for resident in (0, 1, 2):
            streams = made(Offload(lambda *_, n=resident: n, tmp_path if where == "disk" else None))  # type: ignore[misc]
            assert len(streams.streamed.layers) == len(config.layers) - resident
            second: list[list[int]] = []
            found = pages(streams, steps(second), captured)
            assert second == first
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_pinned_memory_is_as_large_as_asked_for_and_goes_with_its_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, unregister = [], pinned._unregister

    def watched(address: int, *rest: Any) -> None:
        let_go.append(address)
        unregister(address, *rest)

    monkeypatch.setattr(pinned, "_unregister", watched)
    memory = pinned.allocate(3 * 4096, torch.device("cuda", 0))
    assert memory.numel() == 3 * 4096 and memory.is_pinned() and memory[4096:].is_pinned()
    address = memory.data_ptr()
    del memory
    gc.collect()
    assert let_go == [address]
    torch.ones(1, device="cuda").add_(1)  # no error is left behind


def test_memory_that_the_driver_refuses_leaves_no_error_to_whoever_launches_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = torch.cuda.cudart()

    class Refusing:
        @staticmethod
        def cudaHostRegister(address: int, nbytes: int, flags: int) -> int:
            return int(runtime.cudaHostRegister(0, nbytes, flags))

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Refusing)
    with pytest.raises(TersorError, match="cudaHostRegister: error"):
        pinned.allocate(4096, torch.device("cuda", 0))
    assert torch.ones(3, device="cuda").add(1).tolist() == [2, 2, 2]


def test_too_little_memory_of_the_host_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "available", lambda: 1000)
    with pytest.raises(TersorError, match="GB of pinned host memory are needed"):
        tersor.LLM(TINY, offload="host", resident_layers=0)


@pytest.mark.alone
@pytest.mark.parametrize("format", ["16bit", "fp6_e3m2"])
def test_steps_reach_most_of_the_links_bandwidth(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--offload", "host", "--resident-layers", "0", "--format", format, "--batch", "1,8", "--steps", "4"]
    assert main.run(["bench", "latency", "llama-2-7b", *words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    for row in rows:
        share = latency.link_share(row)
        print(f"{format}, {row['batch']} rows: {row['milliseconds']:.1f} ms, {share:.2f} of the link")
        assert share is not None and share >= 0.85 and row["cuda_graph"]


def test_a_disk_is_read_at_most_of_its_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--offload", "disk", "--offload-directory", str(tmp_path), "--resident-layers", "16", "--steps", "2"]
    assert main.run(["bench", "latency", "llama-2-7b", *words, "--batch", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    share = latency.link_share(row)
    assert share is not None and share > 0.5 and not row["cuda_graph"] and row["streamed_bytes"] > 1e9
    print(f"{row['milliseconds']:.1f} ms a step, {share:.2f} of the disk")


LATE = 1 << 28
"""Cycles of a GPU, a tenth of a second, behind which a stream gives what it is to give."""


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_images_hold_what_the_stream_of_the_caller_is_still_to_make(kind: str, tmp_path: Path) -> None:
    store = store_of(kind, tmp_path)
    made = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    image = Image.of([made])
    slot = torch.zeros(image.nbytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LATE)
        made.fill_(7)
        store.add(image, [made])
        store.serve([slot])
        store.wait(store.load(0, 0))  # type: ignore[arg-type]
        found = slot.cpu()
    assert bool((found == 7).all())


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_slot_that_nobody_has_any_more_is_not_others_before_its_copy_came(kind: str, tmp_path: Path) -> None:
    store = store_of(kind, tmp_path)
    made = torch.full((1 << 24,), 7, dtype=torch.uint8, device="cuda")
    image = Image.of([made])
    store.add(image, [made])
    slots = [torch.zeros(image.nbytes, dtype=torch.uint8, device="cuda")]
    store.serve(slots)
    torch.cuda.synchronize()
    with torch.cuda.stream(store._link._stream):
        torch.cuda._sleep(LATE)
    mark: Any = store.load(0, 0)
    if kind == "disk":
        mark.issued.wait()
        mark.into = None
    slots.clear()
    store._slots = ()
    other = torch.full((image.nbytes,), 1, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    assert bool((other == 1).all())


def test_threads_that_read_a_model_launch_on_the_stream_of_who_asks() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), Reading(torch.device("cuda")) as reading:
        assert reading.each(lambda _: torch.cuda.current_stream() == stream, range(64)) == [True] * 64


def store_of(kind: str, folder: Path) -> HostStore | DiskStore:
    return HostStore(torch.device("cuda")) if kind == "host" else DiskStore(folder, torch.device("cuda"), buffers=3)
