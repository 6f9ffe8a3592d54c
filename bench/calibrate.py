"""Time calibrated quantisation of a model of random weights, block by block: what a whole model would take.

    python bench/calibrate.py                                            # four layers of Llama-3-8B
    python bench/calibrate.py --geometry llama-3-70b --layers 1 --paths high
    python bench/calibrate.py --paths mix --layers 2
    python bench/calibrate.py --paths normal,outliers,pruned --layers 2 --output calibrate_masks_h200

A checkpoint of random weights with a few layers of the geometry is written first, and a text of random words. Then
`tersor.quantize` runs as each path says: `normal` is `--algorithm gptq`, `high` has `--effort high` beside it, `mix`
is the search for a mix, round to nearest beneath it. `outliers` has 0.5 % of them beside `normal`'s codes, and
`pruned` is `tersor.prune` with half of the weights and six bits: weights with a mask, both of them. The clock is read
whenever a block has passed through one of the phases: `forward` and `backward` (of `mix` with the scores), which go
ahead, and `codes`, which is what `gptq` alone takes. A whole model takes what a block took of each phase, the median
of all but the first (which compiles kernels), times its blocks, and once what it takes to read the text and to begin,
and to go through the output head. Writing the checkpoint is `writing`, and in no sum: it is the same without
calibration. GPU memory is the most that torch held for tensors, host memory the most that the process had since it
started, so that paths are run from the smallest to the largest. With `--device cpu` a tiny geometry runs through the
same code and nothing is written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import geometries
import results_file
import torch

import tersor
from tersor.bench import random_checkpoint
from tersor.convert.calibrate.store import LOG_NAME
from tersor.models import geometries as known

PATHS: dict[str, dict[str, Any]] = {
    "normal": {"algorithm": "gptq"},
    "mix": {"algorithm": "rtn", "target_bits": 4.5},
    "high": {"algorithm": "gptq", "effort": "high"},
    "outliers": {"algorithm": "gptq", "outliers": "0.5%"},
    "pruned": {"sparsity": 0.5, "values": "fp6"},
}
PHASES = {
    **dict.fromkeys(("normal", "outliers", "pruned"), ("codes",)),
    "mix": ("forward", "backward"),
    "high": ("forward", "backward", "codes"),
}
"""What every block passes through, in order; the first block needs no gradient, and passes through `backward` in a mix
alone."""
USUAL = ("normal", "mix", "high")
"""Paths that are run if none is named."""
_WORDS = 8192
_CALIBRATED = ("calibration", "scores of output features")
"""What progress is called while a model is calibrated."""


def main(words: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse the command line, measure, print, write the results, and return a row a path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="llama-3-8b", choices=["llama-3-8b", "llama-3-70b"])
    parser.add_argument("--layers", type=int, default=4, help="decoder blocks of the checkpoint")
    parser.add_argument("--paths", default=",".join(USUAL), help=f"of {', '.join(PATHS)}, separated by commas")
    parser.add_argument("--format", default="uint4", help="of the weights, where there is no mix")
    parser.add_argument("--group-size", type=int, default=128, help="0 for one scale a row")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--window", type=int, default=2048, help="tokens")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: for temporary files")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", default="calibrate_h200", help="name of the file under bench/results")
    given = parser.parse_args(words)
    unknown = [path for path in given.paths.split(",") if path not in PATHS]
    if unknown or given.layers < 1:
        parser.error(f"--paths takes {', '.join(PATHS)}, and --layers numbers from 1 on")
    on_gpu = given.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("no CUDA device here: --device cpu runs a tiny geometry through the same code")
    whole = known.config_json(given.geometry)
    blocks = whole["num_hidden_layers"]
    config = {**whole, **({} if on_gpu else geometries.TINY[geometries.LLAMA]), "num_hidden_layers": given.layers}
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        started = time.perf_counter()
        write(config, folder, given)
        print(f"a checkpoint of {given.layers} layers written in {time.perf_counter() - started:.1f} s", flush=True)
        for path in (path for path in PATHS if path in given.paths.split(",")):
            rows.append({"path": path, **timed(path, folder, blocks, given)})
            print("\n".join(lines(rows[-1], blocks)), flush=True)
    if on_gpu:
        fields = ("geometry", "layers", "format", "group_size", "windows", "window")
        found = {**{field: getattr(given, field) for field in fields}, "blocks": blocks, "rows": rows}
        print(f"written to {results_file.write(given.output, found)}")
    return rows


def write(config: dict[str, Any], folder: Path, given: argparse.Namespace) -> None:
    """Write a checkpoint of random weights to `model`, with a tokenizer of numbered words, and a text of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model, count = folder / "model", min(_WORDS, config["vocab_size"])
    model.mkdir()
    random_checkpoint.write(config, given.window, model, torch.bfloat16, torch.device(given.device))
    tokenizer = Tokenizer(models.WordLevel({f"t{number}": number for number in range(count)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1").save_pretrained(model)
    draw = random.Random(0)
    text = " ".join(f"t{draw.randrange(2, count)}" for _ in range(given.windows * given.window + 1))
    (folder / "text.txt").write_text(text, encoding="utf-8")


def timed(path: str, folder: Path, blocks: int, given: argparse.Namespace) -> dict[str, Any]:
    """Compress the checkpoint as a path says, and return what it took."""
    options = dict(PATHS[path])
    prunes = "sparsity" in options
    if "target_bits" not in options and not prunes:
        options |= {"format": given.format, "group_size": given.group_size or None}
    clock = [time.perf_counter()]

    def progress(done: int, total: int, name: str) -> None:
        if name in _CALIBRATED or len(clock) == 1:
            clock.append(time.perf_counter())

    if given.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    (tersor.prune if prunes else tersor.quantize)(
        folder / "model",
        folder / "out",
        calibration=folder / "text.txt",
        calibration_tokens=given.windows * given.window,
        calibration_window=given.window,
        device=given.device,
        progress=progress,
        **options,
    )
    if given.device == "cuda":
        torch.cuda.synchronize()
    end = time.perf_counter()
    log = folder / "out" / LOG_NAME
    layers = json.loads(log.read_text())["layers"] if log.exists() else []
    shutil.rmtree(folder / "out")
    row = summed(path, clock, given.layers, blocks)
    return {
        **row,
        "writing": round(end - clock[-1], 2),
        "gpu_bytes": torch.cuda.max_memory_allocated() if given.device == "cuda" else 0,
        "host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "codes_by_layer": {
            line["layer"].rpartition(".")[2]: line["seconds"] for line in layers if line["block"] == given.layers - 1
        },
    }


def summed(path: str, clock: list[float], layers: int, blocks: int) -> dict[str, Any]:
    """Return the seconds of each phase, of a block and in a whole model.

    Args:
        path: a key of `PATHS`.
        clock: read at the start and at every report of progress.
        layers, blocks: of the checkpoint, and of the whole model.
    """
    begin, *steps = (after - before for before, after in itertools.pairwise(clock))
    phases: dict[str, list[float]] = {}
    for phase in PHASES[path]:
        count = layers - 1 if (path, phase) == ("high", "backward") else layers
        phases[phase], steps = steps[:count], steps[count:]
    if steps:
        raise SystemExit(f"calibrate.py: {len(steps)} reports of progress belong to no phase")
    of_block = {phase: statistics.median(some[1:] or some or [0.0]) for phase, some in phases.items()}
    once = begin + sum(max(0.0, some[0] - of_block[phase]) for phase, some in phases.items() if some)
    return {
        "seconds": {phase: [round(one, 3) for one in some] for phase, some in phases.items()},
        "of_block": {phase: round(one, 3) for phase, one in of_block.items()},
        "once": round(once, 2),
        "whole": round(once + blocks * sum(of_block.values()), 1),
    }


def lines(row: dict[str, Any], blocks: int) -> list[str]:
    """Return what is printed of a path."""
    phases = ", ".join(f"{phase} {one:.2f}" for phase, one in row["of_block"].items())
    minutes = f"{blocks} blocks {row['whole'] / 60:.1f} minutes (once: {row['once']} s)"
    found = [
        f"{row['path']}: a block takes {phases} s; {minutes}",
        f"  GPU {row['gpu_bytes'] / 1e9:.1f} GB, host {row['host_bytes'] / 1e9:.1f} GB, writing {row['writing']} s",
    ]
    found += [f"  {phase}: {' '.join(f'{one:.2f}' for one in some)}" for phase, some in row["seconds"].items()]
    if row["codes_by_layer"]:
        found.append("  codes of the last block: " + " ".join(f"{k} {v:.2f}" for k, v in row["codes_by_layer"].items()))
    return found


if __name__ == "__main__":
    main()
