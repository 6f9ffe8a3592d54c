"""An engine whose layers stream draws the tokens of one whose layers stay; what cannot be is said in a line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import own_code, tiny_lm
from helpers.small_decoders import config_of

import tersor
from tersor import one_prompt
from tersor.cli import main
from tersor.engine import Sampling, graphs, offloading
from tersor.engine import build as building
from tersor.engine.config import EngineConfig
from tersor.engine.offloading import offload_of
from tersor.errors import InputError, UnsupportedError
from tersor.models.streamed import Offload
from tersor.one_prompt import Asked
from tersor.ops.collective import ALONE

PROMPTS = ["def read_file(path):\n", "import os\n", "The first rule", "x"]
GREEDY = tersor.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def tokens(model: tersor.LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in model.generate(PROMPTS, GREEDY)]


def streaming(monkeypatch: pytest.MonkeyPatch, directory: Path | None, resident: int = 1) -> tersor.LLM:
    """Return an engine on the CPU whose layers stream all the same."""
    away = Offload(lambda layers, outside: resident, directory)
    monkeypatch.setattr(building, "offload_of", lambda *arguments: away)
    offload = "host" if directory is None else "disk"
    return tersor.LLM(tiny_lm.TINY, tokenizer=tiny_lm.tokenizer(), device="cpu", offload=offload)


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    """Tokens of a model whose layers all stay."""
    return tokens(tersor.LLM(tiny_lm.TINY, tokenizer=tiny_lm.tokenizer(), device="cpu"))


def test_tokens_are_those_of_a_model_that_stays(
    wanted: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in (None, tmp_path):
        model = streaming(monkeypatch, directory)
        assert tokens(model) == wanted
        assert model.runner.decoder.streamed is not None


def test_steps_that_read_a_disk_are_read_before_the_next_is_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory, ahead in ((None, 2), (tmp_path, 1)):
        model = streaming(monkeypatch, directory)
        launch, under_way, most = model.runner.launch, [0], [0]

        def launched(*arguments: Any, launch: Any = launch, under_way: Any = under_way, most: Any = most) -> Any:
            one = launch(*arguments)
            read, under_way[0] = one.tokens, under_way[0] + 1
            most[0] = max(most[0], under_way[0])

            def done() -> Any:
                under_way[0] -= 1
                return read()

            class Watched:
                tokens = staticmethod(done)

                def __getattr__(self, name: str) -> Any:
                    return getattr(one, name)

            return Watched()

        monkeypatch.setattr(model.runner, "launch", launched)
        model.generate("import os\n", GREEDY)
        assert most[0] == ahead and under_way[0] == 0


def test_a_step_that_is_repeated_instead_of_captured_draws_the_same_tokens(
    wanted: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streaming(monkeypatch, tmp_path)
    assert model.runner.repeats
    model.runner.capture([1, 2, 8])
    replays: list[int] = []
    for size, step in model.runner.graphs.items():
        decode = step.decode  # type: ignore[union-attr]

        def counted(views: Any, rows: int, given: Any, decode: Any = decode, size: int = size) -> Any:
            replays.append(size)
            return decode(views, rows, given)

        step.decode = counted  # type: ignore[union-attr]
    assert tokens(model) == wanted
    assert set(replays) == {8} and len(replays) >= 10


def test_a_disk_is_a_reason_for_no_graph_and_steps_are_as_large_as_if_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner: Any = SimpleNamespace(device=torch.device("cuda"), everyone=ALONE, eager_reason="", repeats=True)
    monkeypatch.setattr(graphs, "_waits", lambda runner: "")
    assert graphs.captures(runner, EngineConfig())
    assert runner.eager_reason == "the host reads weights from a disk in every step"
    with pytest.raises(UnsupportedError, match="no CUDA graph for this model: the host reads weights from a disk"):
        graphs.captures(runner, EngineConfig(cuda_graph=True))
    assert not graphs.captures(runner, EngineConfig(cuda_graph=False))
    assert runner.eager_reason == "not asked for"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "hots"}, "offload 'hots', did you mean 'host'?: use host or disk"),
        ({"resident_layers": 3}, "resident_layers is 3: it goes with offload"),
        ({"offload": "host", "resident_layers": -1}, "resident_layers is -1: it must be at least 0"),
        ({"offload": "host", "offload_directory": "x"}, "offload_directory is 'x': it goes with offload disk"),
        ({"offload": "disk", "tensor_parallel": 2}, "offload is disk, and tensor_parallel is 2: weights stream to one"),
    ],
)
def test_options_that_do_not_fit_together_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        EngineConfig(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_on_a_cpu_there_is_nothing_to_offload_from() -> None:
    with pytest.raises(UnsupportedError, match="offload is host, and the model is on cpu: it is for a GPU"):
        tersor.LLM(tiny_lm.TINY, tokenizer=tiny_lm.tokenizer(), device="cpu", offload="host")


@pytest.mark.parametrize("verb", ["generate", "serve", "batch"])
def test_verbs_say_so_in_a_line(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "in.jsonl"
    body = '{"model": "m", "prompt": "a", "max_tokens": 2}'
    lines.write_text(f'{{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {body}}}\n')
    words = {
        "generate": [str(tiny_lm.TINY), "--prompt", "a"],
        "serve": [str(tiny_lm.TINY), "--port", "0"],
        "batch": ["-m", str(tiny_lm.TINY), "-i", str(lines), "-o", str(tmp_path / "out.jsonl")],
    }[verb]
    assert main.run([verb, *words, "--device", "cpu", "--offload", "disk", "--offload-directory", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert shown == "tersor: offload is disk, and the model is on cpu: it is for a GPU\n"
    assert main.run([verb, *words, "--device", "cpu", "--offload", "dsik"]) == 2
    assert capsys.readouterr().err == "tersor: offload 'dsik', did you mean 'disk'?: use host or disk\n"


def test_what_runs_through_transformers_is_not_offloaded(tmp_path: Path) -> None:
    model = tiny_lm.copy(tmp_path / "own")
    own_code.edit(model / "config.json", {"architectures": ["SomeoneElsesForCausalLM"]})
    asked = Asked(
        prompt=[1], sampling=Sampling(max_new_tokens=1), device=torch.device("cpu"), ranks=EngineConfig(offload="host")
    )
    with pytest.raises(UnsupportedError, match=r"offload is host, and SomeoneElses.* runs through transformers"):
        one_prompt.ready(model, tiny_lm.tokenizer(), asked)


class Gpu:
    """A GPU of which there are numbers alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> None:
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))


def chosen(config: EngineConfig, layers: Sequence[int], outside: int) -> int:
    away = offload_of(config, config_of("llama"), torch.float16, torch.device("cuda", 0))
    assert away is not None
    return away.choose(layers, outside)


def test_layers_stay_as_the_memory_asks_unless_somebody_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, free=95 << 30, total=100 << 30)
    layers, outside = [1 << 30] * 100, 2 << 30
    assert offload_of(EngineConfig(), config_of("llama"), torch.float16, torch.device("cuda", 0)) is None
    most = chosen(EngineConfig(offload="host", kv_bytes=10 << 30), layers, outside)
    assert 65 <= most <= 72  # 85 GiB that may be taken, less pages, others, two buffers, a step and 3 %
    assert chosen(EngineConfig(offload="host", kv_bytes=10 << 30, memory=0.5), layers, outside) < most - 35
    assert chosen(EngineConfig(offload="host"), layers, outside) < most
    assert chosen(EngineConfig(offload="host", resident_layers=3), layers, outside) == 3
    assert chosen(EngineConfig(offload="host"), layers[:20], outside) == 20


def test_the_file_is_in_the_cache_unless_a_directory_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERSOR_CACHE_DIR", str(tmp_path))
    assert offloading.directory_of(EngineConfig(offload="host")) is None
    assert offloading.directory_of(EngineConfig(offload="disk")) == tmp_path / "offload"
    assert offloading.directory_of(EngineConfig(offload="disk", offload_directory="~/x")) == Path.home() / "x"


def documented() -> list[list[str]]:
    """Return the commands of the page on offloading, as their words."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "offloading.md").read_text(encoding="utf-8")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("    tersor ")]


def test_there_are_commands_of_every_verb_that_offloads() -> None:
    assert {words[0] for words in documented()} == {"generate", "batch", "serve", "bench"}


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_commands_of_the_page_are_understood_and_end_where_there_is_no_gpu(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = '{"model": "m", "prompt": "a", "max_tokens": 2}'
    (tmp_path / "in").write_text(f'{{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {body}}}\n')
    files = iter([str(tmp_path / "in"), str(tmp_path / "out")])
    meant = {"MODEL": str(tiny_lm.TINY), "DIR": str(tmp_path)}
    given = [next(files) if word == "FILE" else meant.get(word, word) for word in words]
    given += [] if words[0] == "bench" else ["--device", "cpu"]
    assert main.run(given) == (0 if torch.cuda.is_available() and words[0] == "bench" else 1)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert ("it is for a GPU" in line) != (words[0] == "bench" and "needs a" in line)
