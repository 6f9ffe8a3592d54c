"""vLLM beside Tersor: what is asked of a pretended one in a process of its own, and which rows its answers become."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.usage import refused_in_one_line

from tersor.bench import latency, random_checkpoint, shapes, throughput, timing, workloads
from tersor.bench.vllm import rows, variants
from tersor.bench.vllm.variants import Variant
from tersor.cli import bench
from tersor.cli.main import run
from tersor.engine.config import EngineConfig
from tersor.formats import get_scheme
from tersor.models import DecoderConfig, random
from tersor.models.geometries import GEOMETRIES, geometry

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "quantization_config": {"quant_method": "tersor"},
}
FAKE = Path(__file__).resolve().parents[1] / "helpers" / "fake_vllm.py"
"""Not imported: it has a clock of its own."""
PLAIN = Variant(format="vllm 16bit")
Asked = Callable[[], list[dict[str, Any]]]


def _faulty(fault: str) -> Variant:
    return Variant(format="vllm", options={"quantization": fault})


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Put a vLLM and a humming on the path; the call returns what was asked of vLLM, in order."""
    place = tmp_path / "installed"
    for name in ("vllm", "humming"):
        (place / name).mkdir(parents=True)
        about = place / f"{name}-0.26.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.26.0\n")
    shutil.copy(FAKE, place / "vllm" / "__init__.py")
    (place / "humming" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for name in [name for name in os.environ if name.startswith(("VLLM_", "CUDA_VISIBLE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(random_checkpoint, "MEMORY", tmp_path / "no memory")
    return lambda: [json.loads(line) for line in (place / "vllm" / "asked.jsonl").read_text().splitlines()]


def test_a_step_is_what_more_tokens_take_and_rows_that_do_not_fit_are_not_timed(asked: Asked, tmp_path: Path) -> None:
    found = list(rows.latencies([PLAIN], TINY, "tiny", [1, 4], [100, 300], 8, kv_dtype="fp8", cuda_graph=False))
    times = [row for row in found if isinstance(row, latency.Latency)]
    assert [(row.format, row.context, row.batch) for row in times] == [
        ("vllm 16bit", 100, 1),
        ("vllm 16bit", 100, 4),
        ("vllm 16bit", 300, 1),
    ]
    assert [row.milliseconds for row in times] == pytest.approx([2.1, 2.4, 2.1])
    assert all(row.weight_bytes is None and row.kv_bytes is None and not row.cuda_graph for row in times)
    (skipped,) = (row for row in found if isinstance(row, latency.Skipped))
    assert skipped.what == "4 rows of 300 tokens" and "hold 1000 tokens, and the rows have 1220" in skipped.why
    start, *runs = asked()
    folder = start["llm"].pop("model")
    assert start["llm"] == {
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "seed": 0,
        "max_model_len": 309,
        "dtype": "float16",
        "kv_cache_dtype": "fp8",
        "max_num_seqs": 4,
        "gpu_memory_utilization": 0.9,
        "enforce_eager": True,
        "load_format": "tersor_random",
    }
    assert start["environment"] == {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    assert "quantization_config" not in start["config"] and start["config"]["max_position_embeddings"] == 309
    assert len(runs) == 3 * 7 and [len(run["prompts"]) for run in runs[::7]] == [1, 4, 1]
    assert [run["params"][0]["max_tokens"] for run in runs[:7]] == [9, 9, 1, 9, 1, 9, 1]
    assert all(run["params"][0]["temperature"] == 0 and run["params"][0]["ignore_eos"] for run in runs)
    assert {len(prompt) for run in runs[7:14] for prompt in run["prompts"]} == {96}
    assert len({tuple(prompt) for prompt in runs[7]["prompts"]}) == 4 and runs[7]["prompts"] == runs[13]["prompts"]
    assert not Path(folder).exists() and not list(tmp_path.glob("tersor-*"))


def test_a_workload_is_answered_with_the_same_tokens_in_every_order_with_empty_pages(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    load = workloads.make("micro", requests=12, vocabulary=300, prefix=32, own=10, output=3, members=4)
    engine = EngineConfig(max_rows=7, max_step_tokens=64, memory=0.5, kv_bytes=4096)
    found = list(rows.throughputs([PLAIN], TINY, "tiny", [load], ["sorted", "shuffled"], engine, gpu=1))
    times = [row for row in found if isinstance(row, throughput.Throughput)]
    assert [(row.order, row.requests, row.prompt_tokens, row.output_tokens) for row in times] == [
        ("sorted", 12, 504, 36),
        ("shuffled", 12, 504, 36),
    ]
    assert [row.reuse for row in times] == [pytest.approx(9 * 32 / 504)] * 2  # nothing is left of the run before
    assert times[0].optimum == throughput.optimum(load) and times[0].steps is None
    assert [row.seconds for row in times] == pytest.approx([3 * 3.2e-3] * 2)
    start, *runs = asked()
    assert (start["llm"]["max_num_seqs"], start["llm"]["max_num_batched_tokens"]) == (7, 64)
    assert (start["llm"]["gpu_memory_utilization"], start["llm"]["kv_cache_memory_bytes"]) == (0.5, 4096)
    assert start["llm"]["max_model_len"] == throughput.context_of(load)
    assert start["environment"]["CUDA_VISIBLE_DEVICES"] == "6"  # the second of those
    prompts = [prompt.tolist() for prompt in load.prompts]
    warm = prompts[: throughput.WARM]
    assert [run["prompts"] for run in runs] == [warm, sorted(prompts), warm, prompts]
    assert {one["max_tokens"] for one in runs[3]["params"]} == {3}


def test_outputs_of_a_workload_stay_with_their_prompts(asked: Asked) -> None:
    load = workloads.make("snippet", requests=9, vocabulary=300, prefix=20, own=5, output=9, members=2)
    list(rows.throughputs([PLAIN], TINY, "tiny", [load], ["sorted"], EngineConfig()))
    (run,) = asked()[2:]
    lengths = {tuple(prompt.tolist()): int(output) for prompt, output in zip(load.prompts, load.outputs, strict=True)}
    assert [one["max_tokens"] for one in run["params"]] == [lengths[tuple(prompt)] for prompt in run["prompts"]]
    assert len(set(lengths.values())) > 1


def test_several_answers_to_a_prompt_are_one_request(asked: Asked) -> None:
    load = workloads.make("sampling", requests=2, vocabulary=300, prompt=40, output=4, samples=3)
    (row,) = rows.throughputs([PLAIN], TINY, "tiny", [load], ["shuffled"], EngineConfig())
    assert isinstance(row, throughput.Throughput) and row.reuse is None
    assert row.output_tokens == 3 * int(load.outputs.sum())
    assert all(one["n"] == 3 and one["temperature"] == 1 for one in asked()[2]["params"])


@pytest.mark.parametrize(
    ("name", "activations", "format", "quantization", "variables"),
    [
        ("vllm:fp8", "16bit", "vllm fp8", "fp8", {}),
        (
            "vllm:humming",
            "16bit",
            "vllm humming fp6_e3m2",
            "humming",
            {"VLLM_HUMMING_ONLINE_QUANT_CONFIG": '{"dtype": "float6e3m2"}'},
        ),
        (
            "vllm:humming",
            "fp8",
            "vllm humming fp6_e3m2:a8",
            "humming",
            {
                "VLLM_HUMMING_ONLINE_QUANT_CONFIG": '{"dtype": "float6e3m2"}',
                "VLLM_HUMMING_INPUT_QUANT_CONFIG": '{"dtype": "float8e4m3"}',
            },
        ),
        (
            "vllm:tersor",
            "fp8",
            "vllm tersor fp6_e3m2:a8",
            "tersor",
            {"TERSOR_VLLM_FORMAT": "fp6_e3m2:row:float16", "TERSOR_VLLM_ACTIVATIONS": "fp8"},
        ),
    ],
)
def test_vllm_makes_its_weights_in_the_format_that_a_name_says(
    name: str, activations: str, format: str, quantization: str, variables: dict[str, str], asked: Asked
) -> None:
    (variant,) = variants.variants(variants.named(name), [get_scheme("fp6_e3m2"), None], activations)
    (row,) = rows.latencies([variant], TINY, "tiny", [1], [20], 2)
    assert row.format == format
    start = asked()[0]
    assert start["llm"]["quantization"] == quantization
    assert variables.items() <= start["environment"].items()


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("refused", "ValueError: no such format says vLLM (its words: "),
        ("crashed", "its process ended with status 3 (its words: "),
        ("short", "RuntimeError: 2 tokens were drawn, expected 3 (its words: "),
    ],
)
def test_what_vllm_does_not_run_is_said_in_a_line_with_the_place_of_its_words(
    fault: str, why: str, asked: Asked, tmp_path: Path
) -> None:
    row, after = rows.latencies([_faulty(fault), PLAIN], TINY, "tiny", [1], [20], 2)
    assert isinstance(row, latency.Skipped) and row.why.startswith(why)
    assert isinstance(after, latency.Latency)  # what failed took the weights of nobody
    assert not list(tmp_path.glob("tersor-random-*"))
    words = Path(row.why.removeprefix(why).removesuffix(")")).read_text()
    assert "INFO: vLLM says much" in words and "and its libraries do" in words


def test_vllm_ends_with_who_asked_it(asked: Asked) -> None:
    times = rows.latencies([_faulty("slow")], TINY, "tiny", [1, 2], [20], 2)
    next(times)
    assert Path(asked()[0]["llm"]["model"]).exists()
    times.close()
    assert not Path(asked()[0]["llm"]["model"]).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(asked()[0]["pid"], 0)


def test_prompts_are_timed_with_nothing_of_them_in_pages(asked: Asked) -> None:
    found = list(rows.latencies([PLAIN], TINY, "tiny", [1], [20], 2, prefill=4096))
    (prefill,) = (row for row in found if isinstance(row, latency.Prefill))
    assert (prefill.prompts, prefill.prompt_tokens, prefill.format) == (8, 4096, "vllm 16bit")
    assert prefill.tokens_per_second == pytest.approx(8 * 4096 / 2.8e-3)
    start, *runs = asked()
    assert start["llm"]["max_model_len"] == 4097
    prompts = [tuple(prompt) for run in runs[:4] for prompt in run["prompts"]]
    assert len(set(prompts)) == 4 * 8 and {len(prompt) for prompt in prompts} == {4096}
    assert {one["max_tokens"] for run in runs[:4] for one in run["params"]} == {1} and len(runs[4]["prompts"]) == 1


def test_graphs_are_those_of_the_rows_that_are_timed(asked: Asked) -> None:
    list(rows.latencies([PLAIN], TINY, "tiny", [4, 1, 4], [100], 8))
    assert asked()[0]["llm"]["compilation_config"] == {"cudagraph_capture_sizes": [1, 4]}


def test_the_same_weights_like_those_of_tersor_are_loaded_in_every_format(asked: Asked) -> None:
    both = variants.variants(variants.named("vllm,vllm:fp8"), [])
    assert len(list(rows.latencies(both, {**TINY, "tie_word_embeddings": False}, "tiny", [1], [20], 2))) == 2
    first, second = (one for one in asked() if "llm" in one)
    assert first["llm"]["model"] == second["llm"]["model"] and first["weights"] == second["weights"]
    assert first["config"]["dtype"] == "float16"
    spreads = {}
    for name, (dtype, shape, mean, spread) in first["weights"].items():
        assert dtype == "float16"
        own = 8.0 if name == "model.embed_tokens.weight" else 0.0 if len(shape) == 1 else 0.02
        assert (mean, spread) == (pytest.approx(float(len(shape) == 1), abs=0.1 * own), pytest.approx(own, rel=0.1)), (
            name
        )
        spreads[name] = shape
    layer = "model.layers.0."
    assert spreads == {
        "model.embed_tokens.weight": [300, 32],
        **{f"{layer}self_attn.{part}_proj.weight": [32, 32] for part in "qkvo"},
        **{f"{layer}mlp.{part}_proj.weight": [64, 32] for part in ("gate", "up")},
        f"{layer}mlp.down_proj.weight": [32, 64],
        **{f"{layer}{part}_layernorm.weight": [32] for part in ("input", "post_attention")},
        "model.norm.weight": [32],
        "lm_head.weight": [300, 32],
    }


def test_transformers_reads_every_geometry_as_it_is_described(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for name, config in GEOMETRIES.items():
        (tmp_path / "config.json").write_text(json.dumps(random_checkpoint.described(config, 64)))
        read = AutoConfig.from_pretrained(tmp_path).to_dict()
        found, known = DecoderConfig.from_dict(read), geometry(name)
        assert (found.layers, found.hidden, found.ffn, found.vocabulary, found.tied, found.norm, found.context) == (
            *(known.layers, known.hidden, known.ffn, known.vocabulary, known.tied, known.norm, known.context),
        )


def test_the_verb_times_vllm_first_and_shows_both(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = random.random_decoder
    started: list[int] = []

    def small(name: str, scheme: Any, device: str, dtype: torch.dtype, **own: Any) -> Any:
        started.append(len(asked()))
        return made(DecoderConfig.from_dict(TINY), scheme, "cpu", torch.float32, **own)

    monkeypatch.setattr(latency, "random_decoder", small)
    assert "llama-3-8b" in shapes.MODELS  # which are read once: ahead of the change
    monkeypatch.setitem(GEOMETRIES, "llama-3-8b", TINY)
    monkeypatch.setattr(bench, "need_gpu", lambda instead: None)
    monkeypatch.setattr(timing, "read_bandwidth", lambda: 1e12)
    cells = ["--batch", "1,2", "--context", "32", "--steps", "2", "--cuda-graph", "off"]
    path = tmp_path / "found.json"
    cells += ["--against", "vllm,vllm:fp8", "--prefill", "32"]
    words = ["bench", "latency", *cells, "-o", str(path), "--json"]
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    formats = ["fp6_e3m2", "fp6_e3m2", "vllm 16bit", "vllm 16bit", "vllm fp8", "vllm fp8"]
    assert [row["format"] for row in found["rows"]] == formats
    assert found["environment"]["vllm"] == "0.26.0" and "vLLM" in found["method"]
    assert started == [len(asked())]
    assert asked()[0]["config"]["hidden_size"] == 32
    assert run(["bench", "latency", "--from", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "vllm fp8" in shown and "2.200" in shown
    assert shown.count(" tokens a second of 1024 prompts of 32 tokens") == 2


def test_the_verb_of_workloads_shows_vllm_beside_tersor(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tersor.cli import bench_throughput

    monkeypatch.setattr(bench_throughput, "_device", lambda config, rivals: torch.device("cpu"))
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    sizes = [word for size in ("prefix=128", "own=20", "output=4", "members=4") for word in ("--size", size)]
    options = ["--requests", "8", "--kv-bytes", "1000000", "--order", "planned,shuffled", *sizes]
    path = tmp_path / "found.json"
    words = ["bench", "throughput", str(tmp_path), *options, "--against", "vllm:humming,vllm", "-o", str(path)]
    threads = torch.get_num_threads()
    assert run(words) == 0
    torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    assert [(row["format"], row["order"]) for row in found["rows"]] == [
        ("fp6_e3m2", "planned"),
        ("fp6_e3m2", "shuffled"),
        ("vllm humming fp6_e3m2", "shuffled"),
        ("vllm 16bit", "shuffled"),
    ]
    assert found["environment"]["vllm"] == "0.26.0" and not list(tmp_path.glob("tersor-random-*"))
    shown = capsys.readouterr().out
    assert run(["bench", "throughput", "--from", str(path)]) == 0
    assert capsys.readouterr().out in shown and "vllm humming fp6_e3m2" in shown


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["latency", "--against", "vlm"], 2, "did you mean 'vllm'?"),
        (["latency", "--against", "vllm"], 1, "timing needs a CUDA device"),
        (["latency", "--prefill", "512"], 2, "--prefill is timed of rivals: name one in --against"),
        (["latency", "--against", "vllm:humming", "--format", "16bit"], 2, "--format names none but 16bit"),
        (["throughput", "--against", "vllm"], 1, "timing needs a CUDA device"),
        (["throughput", "--against", "vllm", "--device", "cpu"], 2, "leave out --device cpu"),
        (["throughput", "--against", "vllm", "--order", "planned"], 2, "runs requests sorted or shuffled"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(
    words: list[str],
    status: int,
    message: str,
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused_in_one_line(["bench", *words], status, message, monkeypatch, capsys)


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "vllm.md").read_text()
COMMANDS = re.findall(r"^ {4}tersor (bench .*)$", PAGE.replace("\\\n", ""), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_are_understood(
    command: str, asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(COMMANDS) == 3
    refused_in_one_line(command.split(), 1, "timing needs a CUDA device", monkeypatch, capsys)


@pytest.mark.parametrize("verb", ["latency", "throughput"])
def test_where_vllm_is_not_installed_one_line_says_so(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "vllm is not installed, so it cannot be timed: pip install vllm"
    refused_in_one_line(["bench", verb, "--against", "vllm"], 1, message, monkeypatch, capsys)
