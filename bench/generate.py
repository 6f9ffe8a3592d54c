"""Time single-stream decoding of a Llama-3-8B geometry: 16-bit weights against packed ones, both as CUDA graphs.

    python bench/generate.py
    python bench/generate.py --layers 4 --formats fp6_e3m2,int4

The weights are random and made on the GPU (nothing is downloaded); time does not depend on them. A token's time is
the wall clock of the loop `tersor generate` runs, a step under way while the host waits for the token before it.
`roof` is the time to read the weights once at the read bandwidth measured in the same run. The eager rows launch the
same step one kernel at a time. With `--device cpu` a tiny geometry runs through the same code and nothing is written.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import results_file
import torch
from torch import nn

from tersor.bench import timing
from tersor.compress import quantize_rtn
from tersor.engine import Sampling
from tersor.formats import Scheme, dtype_name, get_scheme
from tersor.integrations.transformers.decode import Decoder
from tersor.layouts import PackedWeight
from tersor.nn import PackedLinear

LLAMA_3_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}


def main() -> None:
    """Parse the command line, measure, print a line a row and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="decoder layers; default: those of the geometry")
    parser.add_argument("--formats", default="fp6_e3m2", help="formats, separated by commas")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=128, help="tokens in a timed run; the median of 3 runs counts")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", default="generate_h200", help="name of the file under bench/results")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("no CUDA device here: --device cpu runs a tiny geometry through the same code")
    geometry = dict(LLAMA_3_8B if on_gpu else TINY)
    if arguments.layers is not None:
        geometry["num_hidden_layers"] = arguments.layers
    dtype = getattr(torch, arguments.dtype) if on_gpu else torch.float32
    schemes = [None, *(get_scheme(name) for name in arguments.formats.split(","))]
    bandwidth = timing.read_bandwidth() if on_gpu else None
    rows: list[dict[str, Any]] = []
    for scheme in schemes:
        model = build(geometry, scheme, arguments.device, dtype)
        for use_graph in (True, False) if on_gpu else (False,):
            row = measure(model, arguments.prompt_tokens, arguments.steps if use_graph else 16, use_graph)
            row = {"weights": dtype_name(dtype) if scheme is None else scheme.key(), **row}
            if bandwidth is not None:
                row["roof_ms"] = round(row["read_bytes"] / bandwidth * 1e3, 3)
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        del model
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    if not on_gpu:
        return
    path = results_file.write(
        arguments.output,
        {
            "geometry": geometry,
            "dtype": arguments.dtype,
            "prompt_tokens": arguments.prompt_tokens,
            "steps": arguments.steps,
            "read_bandwidth": bandwidth,
            "transformers": _transformers_version(),
            "rows": rows,
        },
    )
    print(f"written to {path}")


def build(geometry: dict[str, int], scheme: Scheme | None, device: str, dtype: torch.dtype) -> Any:
    """Make a Llama with random weights on `device`; with a scheme its linears but the head are packed, one by one."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**geometry, rope_theta=500000.0, tie_word_embeddings=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if scheme is None:
        return model
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            encoded = quantize_rtn(module.weight.detach(), scheme)
            packed = PackedLinear.from_packed(PackedWeight.from_encoded(encoded), dtype=dtype)
            model.model.set_submodule(name, packed)
    return model


def measure(model: Any, prompt_tokens: int, steps: int, use_graph: bool) -> dict[str, Any]:
    """Time decode steps after a prompt of random tokens."""
    options = Sampling(temperature=0.0, max_new_tokens=1).resolved(model.generation_config)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (prompt_tokens,), generator=generator).tolist()
    decoder = Decoder(model, options, prompt_tokens + 3 * steps + 3, use_graph)
    decoder.prefill(prompt, None)
    decoder.step()
    times = [run(decoder, steps) for _ in range(3)]
    seconds = statistics.median(times) / steps
    embeddings = model.get_input_embeddings().weight
    tensors = [*model.parameters(), *model.buffers()]
    weight_bytes = sum(tensor.nbytes for tensor in tensors)
    return {
        "cuda_graph": use_graph,
        "tokens_per_second": round(1 / seconds, 1),
        "ms_per_token": round(seconds * 1e3, 3),
        "weight_bytes": weight_bytes,
        "read_bytes": weight_bytes - embeddings.nbytes,
        "cache_tokens": decoder.length,
        "capture_seconds": round(decoder.capture_seconds, 2),
    }


def run(decoder: Decoder, steps: int) -> float:
    """Return the seconds that `steps` tokens take, from a token on the host to the last one there."""
    before = decoder.publish()
    decoder.fetch(before)
    start = time.perf_counter()
    for _ in range(steps):
        decoder.step()
        token = decoder.publish()
        decoder.fetch(before)
        before = token
    decoder.fetch(before)
    return time.perf_counter() - start


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


if __name__ == "__main__":
    main()
