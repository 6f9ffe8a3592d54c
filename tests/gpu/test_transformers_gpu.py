"""Compressed models on a GPU: kernel layouts in memory, the stored stream on disk, graphs, compilation, experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"
PROMPT = list(range(100, 117))


def layers(model: Any) -> dict[str, Any]:
    from tersor.nn import PackedLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k].cpu(), b[k].cpu()) for k in a)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 0.05) -> bool:
    return float((a.float().cpu() - b.float().cpu()).abs().max()) < tolerance * float(b.abs().max())


def load(directory: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    import tersor  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(directory, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tersor import quantize

    packed = tmp_path_factory.mktemp("tiny") / "packed"
    quantize(TINY, packed, overrides=["down_proj=int4:g128", "k_proj=fp5_e2m2:g64:bfloat16"])
    return packed


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([PROMPT], device="cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_lie_in_kernel_layouts_and_are_saved_as_the_stream(
    tiny: Path, dtype: torch.dtype, tmp_path: Path, ids: torch.Tensor
) -> None:
    model = load(tiny, dtype=dtype, device_map="cuda")
    wanted = "tiles_" + str(dtype).removeprefix("torch.")
    assert {layer.layout for layer in layers(model).values()} == {wanted}
    on_cpu = load(tiny, dtype=torch.float32)
    assert same(
        {k: v for k, v in model.state_dict().items() if ".weight_" in k},
        {k: v for k, v in on_cpu.state_dict().items() if ".weight_" in k},
    )
    with torch.no_grad():
        assert close(model(ids).logits, on_cpu(ids.cpu()).logits)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.save_pretrained(tmp_path / "again")
    largest = max(layer.packed_weight().nbytes for layer in layers(model).values())
    assert torch.cuda.max_memory_allocated() - before < 40 * largest
    stored, again = tensors(tiny), tensors(tmp_path / "again")
    assert all(torch.equal(stored[key], again[key]) for key in stored if ".weight_" in key)
    assert stored.keys() == again.keys()
    assert {layer.layout for layer in layers(model).values()} == {wanted}


def test_a_model_moves_to_the_gpu_and_back(tiny: Path, ids: torch.Tensor) -> None:
    model = load(tiny, dtype=torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(ids.cpu()).logits
        model.to("cuda")
        assert {layer.layout for layer in layers(model).values()} == {"tiles_bfloat16"}
        assert close(model(ids).logits, expected)
        model.to(torch.float16)
        assert close(model(ids).logits, expected)
        assert {layer.layout for layer in layers(model).values()} == {"tiles_float16"}
        model.to(device="cpu", dtype=torch.bfloat16)
        assert {layer.layout for layer in layers(model).values()} == {"stream"}
        assert close(model(ids.cpu()).logits, expected)
    # What is plain was rounded to float16 on the way; packed codes and scales are what they were.
    after = model.state_dict()
    assert same(
        {k: v for k, v in after.items() if ".weight_" in k}, {k: v for k, v in before.items() if ".weight_" in k}
    )


def test_compressing_while_loading_on_the_gpu_gives_the_same_bytes(tiny: Path) -> None:
    import tersor

    config = tersor.TersorConfig(overrides={"down_proj": "int4:g128", "k_proj": "fp5_e2m2:g64:bfloat16"})
    model = load(TINY, quantization_config=config, device_map="cuda")
    assert same(model.state_dict(), load(tiny).state_dict())
    assert {layer.layout for layer in layers(model).values()} == {"tiles_bfloat16"}


def captured(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Capture a forward, after two that warm it up on another stream; return the graph and where its logits come."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            model(ids, use_cache=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(ids, use_cache=False).logits
    return graph, logits


@pytest.mark.parametrize("tokens", [1, 17, 200])
def test_a_graph_replays_a_forward(tiny: Path, tokens: int) -> None:
    model = load(tiny, dtype=torch.float16, device_map="cuda")
    ids = torch.randint(0, 8000, (1, tokens), device="cuda")
    with torch.no_grad():
        graph, logits = captured(model, ids)
        ids.copy_(torch.randint(0, 8000, (1, tokens), device="cuda"))
        graph.replay()
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits)


def test_a_layer_compiles_in_one_graph(tiny: Path, ids: torch.Tensor) -> None:
    model = load(tiny, dtype=torch.float16, device_map="cuda")
    mlp = model.model.layers[0].mlp
    x = torch.randn(5, 256, dtype=torch.float16, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(mlp, fullgraph=True)(x), mlp(x), rtol=1e-2, atol=1e-2)


def test_copies_on_the_gpu(tiny: Path, ids: torch.Tensor) -> None:
    model = load(tiny, dtype=torch.float16, device_map="cuda")
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)
    assert same(other.state_dict(), model.state_dict())
    other.load_state_dict(load(tiny, dtype=torch.float16).state_dict())
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_generate_with_a_static_cache(tiny: Path, ids: torch.Tensor) -> None:
    model = load(tiny, dtype=torch.float16, device_map="cuda")
    options = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    dynamic = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), dynamic)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts(name: str, tmp_path: Path, ids: torch.Tensor) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    import tersor
    from tersor.nn import PackedStack

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "plain")
    tersor.quantize(tmp_path / "plain", tmp_path / "packed")
    model = load(tmp_path / "packed", device_map="cuda")
    stacks = [module for module in model.modules() if isinstance(module, PackedStack)]
    assert len(stacks) == 4 and {stack.layout for stack in stacks} == {"tiles_float16"}
    with torch.no_grad():
        assert close(model(ids).logits, load(tmp_path / "packed", dtype=torch.float32)(ids.cpu()).logits)
    model.save_pretrained(tmp_path / "again")
    again, before = tensors(tmp_path / "again"), tensors(tmp_path / "packed")
    assert again.keys() == before.keys()
    norms = {key for key in before if "norm" in key}  # gpt-oss keeps them in float32
    assert same(*({key: found[key] for key in found.keys() - norms} for found in (again, before)))


def test_a_packed_embedding_and_the_head_tied_to_it(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    import tersor

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "plain")
    tersor.quantize(tmp_path / "plain", tmp_path / "packed", overrides=["embed_tokens=fp6_e3m2"])
    model = load(tmp_path / "packed", device_map="cuda")
    embedding, head = model.model.embed_tokens, model.lm_head
    assert (embedding.layout, head.layout) == ("stream", "tiles_float16")
    assert torch.equal(embedding.weight, head.weight)
    ids = torch.tensor([PROMPT], device="cuda")
    with torch.no_grad():
        graph, logits = captured(model, ids)
        ids.copy_(ids.flip(1))
        graph.replay()
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits)
        assert close(logits, load(tmp_path / "packed", dtype=torch.float32)(ids.cpu()).logits)
    model.save_pretrained(tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tensors(tmp_path / "packed"))
    model.to("cpu")
    assert head.layout == "stream"
    assert head.weight_packed.data_ptr() == embedding.weight_packed.data_ptr()
