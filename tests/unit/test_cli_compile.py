"""`tersor compile`: every kernel that a compressed model needs, once, for a chip that need not be here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models, tiny_lm
from helpers.fakes import FakeGpu
from helpers.jit_kernels import axpy
from safetensors.torch import save_file

from tersor import formats, ops
from tersor.cli.main import run
from tersor.errors import UnsupportedError
from tersor.formats import Activations
from tersor.hardware import CHIPS
from tersor.kernels.jit import KernelSource
from tersor.ops import warm

QUANTIZATION = {
    "quant_method": "tersor",
    "version": 1,
    "format": "fp6_e3m2",
    "overrides": {"down_proj": {"format": "int8", "group_size": 64}, "v_proj": {"format": "uint4"}},
}
CACHED = ("--chip", "NVIDIA H100", "--json")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, whatever the machine."""
    FakeGpu().install(monkeypatch)


def write_model(folder: Path, **config: Any) -> str:
    """Write a checkpoint with one small tensor and a config.json; return its path."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file({"model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    return str(folder)


def test_what_a_model_needs_is_compiled_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, torch.dtype, str]] = []

    def kernels_for(
        scheme: formats.Scheme, dtype: torch.dtype, chip: Any, activations: Activations, gated: bool
    ) -> list[KernelSource]:
        assert (activations, gated) == (Activations.NATIVE, False)
        asked.append((scheme.key(), dtype, chip.name))
        return [] if scheme.has_zero_point else [axpy(scheme.format.bits), axpy(0)]

    monkeypatch.setattr(warm, "kernels_for", kernels_for)
    model = write_model(tmp_path / "model", quantization_config=QUANTIZATION, dtype="bfloat16")
    assert run(["compile", model, *CACHED]) == 0
    first = json.loads(capsys.readouterr().out)
    assert asked == [
        ("fp6_e3m2:row:float16", torch.bfloat16, "NVIDIA H100"),
        ("int8:g64:float16", torch.bfloat16, "NVIDIA H100"),
        ("uint4:row:float16", torch.bfloat16, "NVIDIA H100"),
    ]
    assert (first["model"], first["dtypes"], first["schemes"][1]) == (model, ["bfloat16"], "int8:g64:float16")
    assert (first["kernels"], first["from_cache"], first["architectures"]) == (3, 0, ["sm_90a"])
    assert run(["compile", model, *CACHED]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["kernels"], again["from_cache"]) == (3, 3)
    assert run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cache"]["entries"] == 3
    assert run(["compile", model, "--chip", "h100"]) == 0
    assert f"{model}: 3 kernels for sm_90a, 3 of them there before; " in capsys.readouterr().out


def test_real_kernels_are_asked_for_in_both_dtypes_where_the_model_names_neither() -> None:
    schemes, dtypes = warm.needs({"quantization_config": {**QUANTIZATION, "overrides": {}}, "dtype": "float32"})
    assert dtypes == ["float16", "bfloat16"]
    names = [source.name for source in warm.sources(schemes, dtypes, CHIPS["NVIDIA A100"])]
    assert len(names) >= 4
    assert any("fp6_e3m2_float16" in name for name in names)
    assert any("fp6_e3m2_bfloat16" in name for name in names)


def test_a_mix_has_one_kernel_a_tile_and_no_dense_ones_of_its_levels() -> None:
    mix = formats.Mix((formats.get_scheme("uint4", 128), formats.get_scheme("int8")))
    for activations, count in ((Activations.NATIVE, 12), (Activations.INT8, 9)):
        found = list(warm.mixed_sources(mix, ["float16"], CHIPS["NVIDIA H100"], activations))
        assert len({source.name for source in found}) == len(found) <= count
        assert all("mixed_sm90_uint4_int8" in source.name or "quantize" in source.name for source in found)
    older = {source.name for source in warm.mixed_sources(mix, ["float16"], CHIPS["NVIDIA A100"])}
    assert older == {source.name for source in warm.sources(mix.levels, ["float16"], CHIPS["NVIDIA A100"])}
    config = {"quantization_config": QUANTIZATION}
    assert warm.kinds(config)[1] == [] and len(warm.kinds(config)[0]) == 3


def test_8_bit_activations_and_joined_layers_have_kernels_of_their_own() -> None:
    scheme, chip = formats.get_scheme("fp6_e3m2"), CHIPS["NVIDIA H100"]
    plain = {source.name for source in warm.sources([scheme], ["float16"], chip)}
    joined = {source.name for source in warm.sources([scheme], ["float16"], chip, fuse=True)}
    eight = {source.name for source in warm.sources([scheme], ["float16"], chip, Activations.E4M3)}
    assert plain < joined
    assert "tersor_quantize_activations_float16_fp8" in eight
    assert all("float8_e4m3fn" in name for name in eight if "linear" in name)


def test_the_experts_of_a_mixture_have_the_kernels_that_any_number_of_tokens_chooses() -> None:
    config = {"num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 512, "intermediate_size": 1024}
    names = ["model.layers.0.block_sparse_moe.experts.0.w1.weight_packed"]
    mixture = warm.mixture_of({**config, "hidden_act": "silu"}, names)
    assert mixture == warm.Mixture(experts=8, top_k=2, hidden=512, inner=1024, gate=ops.Gate.SILU)
    scheme, chip = formats.get_scheme("fp6_e3m2"), CHIPS["NVIDIA H200"]
    found = {source.name for source in mixture.sources([scheme], ["float16"], chip, Activations.NATIVE)}
    assert {"tersor_gather", "tersor_combine_experts_float16", "tersor_expert_tables_int64_8"} <= found
    assert any(name.endswith("_g1") for name in found) and any(name.endswith("_g0") for name in found)
    assert len(found) < 50
    eight = {source.name for source in mixture.sources([scheme], ["float16"], chip, Activations.E4M3)}
    assert "tersor_gather" not in eight and any("float8_e4m3fn" in name for name in eight)
    older = {source.name for source in mixture.sources([scheme], ["float16"], CHIPS["NVIDIA A100"], Activations.NATIVE)}
    assert "tersor_combine_experts_float16" in older and "tersor_gather" not in older
    assert {name[-2:] for name in older if "experts_sm80" in name} == {"g0", "g1"}
    assert not list(mixture.sources([scheme], ["float16"], CHIPS["NVIDIA A100"], Activations.E4M3))
    gpt_oss = warm.mixture_of({"text_config": {**config, "model_type": "gpt_oss"}}, names)
    assert gpt_oss is not None and gpt_oss.gate is ops.Gate.CLAMPED
    assert warm.mixture_of({**config, "hidden_act": "silu"}, ["model.layers.0.mlp.down_proj.weight_packed"]) is None
    assert warm.mixture_of({**config, "hidden_act": "relu"}, names) is None


def test_kernels_of_the_engine_with_the_same_options_are_among_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        warm, "compile_many", lambda sources, arch, on_done: compiled.extend(source.name for source in sources)
    )
    model = packed_models.compressed(tiny_lm.TINY, tmp_path / "model", format="fp6_e3m2")
    options = ["--kv-dtype", "fp8", "--dtype", "bfloat16", "--max-step-tokens", "64", "--tensor-parallel", "2"]
    assert run(["compile", str(model), "--chip", "h200", "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == len(compiled)
    for kernel in ("attention_decode", "attention_sm90_prefill", "rms_norm", "rows", "sampling_peaks", "all_reduce"):
        assert any(name.startswith(f"tersor_{kernel}") and "bfloat16" in name for name in compiled), kernel
    assert all(name.endswith("_e4m3") for name in compiled if "attention" in name)


def test_a_plain_model_has_kernels_in_the_engine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        warm, "compile_many", lambda sources, arch, on_done: compiled.extend(source.name for source in sources)
    )
    assert run(["compile", str(tiny_lm.TINY), "--chip", "h200", "--max-step-tokens", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schemes"] == []
    assert any("attention_decode" in name for name in compiled) and not any("linear" in name for name in compiled)


def test_what_the_engine_does_not_load_is_compiled_for_transformers_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "kernels_for", lambda *arguments: [axpy(0)])
    model = write_model(
        tmp_path / "model", quantization_config=QUANTIZATION, dtype="float16", architectures=["BloomForCausalLM"]
    )
    assert run(["compile", model, *CACHED]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == 1


def test_progress_starts_at_none_and_ends_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "kernels_for", lambda *arguments: [axpy(0), axpy(1)])
    model = write_model(tmp_path / "model", quantization_config={**QUANTIZATION, "overrides": {}}, dtype="float16")
    told: list[tuple[int, int]] = []
    chips = [CHIPS["NVIDIA H100"], CHIPS["NVIDIA H200"], CHIPS["NVIDIA A100"]]
    compiled = warm.compile_ahead(model, chips, progress=lambda *numbers: told.append(numbers))
    assert compiled.architectures == ["sm_80", "sm_90a"]
    assert (told[0], told[-1], len(told)) == ((0, 4), (4, 4), 5)


def test_8_bit_activations_are_refused_on_a_chip_without_kernels_for_them(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", quantization_config={**QUANTIZATION, "overrides": {}}, dtype="float16")
    with pytest.raises(UnsupportedError, match=r"8-bit activations need compute capability 9\.0: NVIDIA A100 has no"):
        warm.compile_ahead(model, [CHIPS["NVIDIA A100"]], activations="fp8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL", "--chip", "NVIDIA H10"], "unknown chip 'NVIDIA H10', did you mean 'NVIDIA H100'?"),
        (["MODEL"], "torch sees no GPU to compile for: name one with --chip (NVIDIA A100"),
        (["MODEL", "--chip", "h100", "--activations", "fp7"], "activations 'fp7', did you mean 'fp8'?"),
        (["PLAIN", "--chip", "h100"], "is not compressed and runs through transformers, so it needs no kernels"),
        (["no/such/folder/anywhere", "--chip", "h100"], "no directory no/such/folder/anywhere"),
        ([], "Missing argument 'MODEL'"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    models = {
        "MODEL": write_model(tmp_path / "model", quantization_config=QUANTIZATION),
        "PLAIN": write_model(tmp_path / "plain"),
    }
    assert run(["compile", *(models.get(argument, argument) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("tersor: ") and words.lower() in captured.err.lower()
