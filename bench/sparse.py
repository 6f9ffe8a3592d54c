"""Time the kernel of pruned weights on a GPU, tile by tile, beside cuBLAS FP16, with every weight cold.

    python bench/sparse.py tiles     which tile is best: every tile, 50 and 80 %, 16 tokens
    python bench/sparse.py table     ratios to cuBLAS FP16 with the tiles named by --tile
    python bench/sparse.py shapes    the shapes of measured_h200.md and Flash-LLM's twelve
    python bench/sparse.py many      many tokens: tiles of 64 to 256 of them, and decoding for cuBLAS

Each product is checked against float32 once. Times are microseconds, medians of CUDA graphs with programmatic
dependence that walk over copies of the weight (`tersor.bench.timing`), beside what `tune.SparseCosts` predicts.
`--skewed` keeps, in every row, the weights of the largest magnitude times a channel's norm, which varies as in a
trained model. `--seconds` ends a run early, with what it has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator

import torch

from tersor.bench.timing import copies, graph_microseconds
from tersor.formats import get_scheme
from tersor.hardware import Chip, chip_named
from tersor.kernels.jit import arch_for, compile_many, module
from tersor.kernels.sparse import SparseLaunch, prepare_sparse, sparse_source
from tersor.kernels.tune import sparse as tune
from tersor.layouts import sparse_tiles
from tersor.layouts.sparse_packing import SparsePacking
from tersor.ops import decompressed
from tersor.ops.sparse_layout import problem_of

VALUES = ("float16", "fp8_e4m3", "fp8_e4m3:448", "fp6_e3m2", "int4", "int8")
"""Those with a colon have no code beyond a magnitude, so that they are converted (`SparsePacking.holding`)."""
MEASURED = ((28672, 7168), (7168, 28672), (8192, 8192))
FLASH = (
    (21504, 7168), (7168, 7168), (28672, 7168), (7168, 28672), (27648, 9216), (9216, 9216),
    (36864, 9216), (9216, 36864), (36864, 12288), (12288, 12288), (49152, 12288), (12288, 49152),
)  # fmt: skip
TILES = ((2, 1, 128), (4, 1, 64), (2, 2, 64), (2, 1, 64), (1, 2, 128), (1, 4, 64))
"""Row groups, CTAs of a multiprocessor, layers of a ring."""


def masks(oc: int, ic: int, sparsity: float, skewed: bool) -> torch.Tensor:
    """Return which weights are left, bool [oc, ic]."""
    torch.manual_seed(oc + ic)
    if not skewed:
        return torch.rand(oc, ic, device="cuda", dtype=torch.float16) >= sparsity
    norms = torch.exp(0.7 * torch.randn(ic, device="cuda"))
    kept = []
    for rows in torch.arange(oc).split(4096):
        score = torch.randn(len(rows), ic, device="cuda").abs() * norms
        kept.append(score >= score.kthvalue(max(1, round(sparsity * ic)), dim=1, keepdim=True).values)
    return torch.cat(kept)


def tiles_of(tokens: int, chip: Chip, bits: int) -> Iterator[tune.SparseTile]:
    """Yield the tiles that shared memory has room for, of many tokens those that take several in turn."""
    if tokens > tune.FEW:
        for width in tune.TOKENS:
            yield from tune.tiles(width, bits, chip) if width >= tune.FEW else ()
        return
    for row_groups, resident, layers in TILES:
        if bits == 16 and layers < 128 and resident * row_groups < 4:
            continue
        try:
            yield tune.tile_for(tokens, chip, row_groups=row_groups, resident=resident, layers=layers)
        except ValueError:
            continue


def packing_of(values: str, target: str) -> tuple[SparsePacking, torch.Tensor]:
    """Return the packing of plain numbers or of codes, and the codes there may be, uint8."""
    if values in ("float16", "bfloat16"):
        return SparsePacking.of(values, target), torch.empty(0, dtype=torch.uint8)
    name, _, largest = values.partition(":")
    scheme = get_scheme(name)
    numbers = scheme.format.values()
    codes = torch.arange(len(numbers)).to(torch.uint8)
    codes = codes[numbers.abs() <= float(largest or "inf")]
    return SparsePacking.holding(scheme, target, codes), codes


class Weight:
    """A pruned weight on the GPU, and copies of it, none of which stays in L2 until it is read again."""

    def __init__(self, kept: torch.Tensor, values: str, dtype: torch.dtype) -> None:
        """Lay random values out."""
        self.oc, self.ic = kept.shape
        self.packing, codes = packing_of(values, str(dtype).removeprefix("torch."))
        if self.packing.bits == 16:
            numbers = torch.randn(kept.shape, device="cuda", dtype=dtype)
            self.dense = numbers
        else:
            fmt = get_scheme(values.partition(":")[0]).format
            numbers = codes.cuda()[torch.randint(0, len(codes), kept.shape, device="cuda", dtype=torch.uint8).long()]
            self.dense = fmt.decode(numbers).to(dtype)
        self.dense = self.dense.masked_fill_(~kept, 0)
        packed = self.packing.pack(numbers)
        self.tiles = {}
        self.kept, self.numbers = kept, packed
        self.scale = torch.rand(self.oc, device="cuda") + 0.5

    def laid_out(self, places: int) -> list[sparse_tiles.SparseTiles]:
        """Return copies of the layout with so many places; those of another number are dropped."""
        if places not in self.tiles:
            least = tune.least_bytes(self.packing.bits, chip_named("H200"))
            first = sparse_tiles.pack(self.kept, self.numbers, places, least, self.packing.bytewise)
            count = copies(first.nbytes)
            tensors = [(first.mask, first.layers, first.starts, first.marks)]
            tensors += [tuple(one.clone() for one in tensors[0]) for _ in range(count - 1)]
            self.tiles = {
                places: [sparse_tiles.SparseTiles(first.shape, first.bits, first.four, *one) for one in tensors]
            }
        return self.tiles[places]


def launch_of(weight: Weight, config: tune.SparseConfig, n: int) -> SparseLaunch:
    """Return what launches a configuration."""
    function = module.get(sparse_source(weight.packing, config.tile), 0)
    return prepare_sparse(
        function, config, bf16=weight.packing.target == "bfloat16", oc=weight.oc, ic=weight.ic, n=n,
        places=config.places, factor=weight.packing.factor,
    )  # fmt: skip


def timed(weight: Weight, config: tune.SparseConfig, x: torch.Tensor) -> tuple[float, float]:
    """Return the microseconds of a launch, and the largest error against float32, in parts of the largest result."""
    n = len(x)
    launch = launch_of(weight, config, n)
    floats, counters = config.floats(weight.oc, n)
    partial = torch.empty(max(floats, 1), device="cuda")
    arrived = torch.zeros(max(counters, 1), dtype=torch.int32, device="cuda")
    y = torch.empty(n, weight.oc, dtype=x.dtype, device="cuda")

    def call(tiles: sparse_tiles.SparseTiles) -> None:
        launch(
            stream=torch.cuda.current_stream().cuda_stream,
            mask=tiles.mask.data_ptr(), layers=tiles.layers.data_ptr(), starts=tiles.starts.data_ptr(),
            marks=tiles.marks.data_ptr(), scale=weight.scale.data_ptr(), x=x.data_ptr(), x_stride=x.stride(0),
            bias=0, residual=0, y=y.data_ptr(), partial=partial.data_ptr(), arrived=arrived.data_ptr(), early=True,
        )  # fmt: skip

    laid_out = weight.laid_out(config.places)
    torch.cuda.synchronize()  # a launch fetches weights before the kernels ahead have ended
    call(laid_out[0])
    torch.cuda.synchronize()
    expected = torch.mm(x, weight.dense.T, out_dtype=torch.float32) * weight.scale
    error = float((y.float() - expected).abs().max() / expected.abs().max())
    y.fill_(float("nan"))
    time_us = graph_microseconds([lambda one=one: call(one) for one in laid_out])
    again = float((y.float() - expected).abs().max() / expected.abs().max())
    return time_us, max(error, again) if again == again else float("nan")


def cublas(weight: Weight, x: torch.Tensor) -> float:
    """Return the microseconds of cuBLAS FP16 with the dense weight."""
    dense = [weight.dense.clone() for _ in range(copies(weight.dense.nbytes))]
    return graph_microseconds([lambda one=one: torch.nn.functional.linear(x, one) for one in dense])


def decoded(weight: Weight, x: torch.Tensor, places: int) -> float:
    """Return the microseconds of decoding slices for cuBLAS."""

    def call(tiles: sparse_tiles.SparseTiles) -> torch.Tensor:
        held = (tiles.mask, tiles.layers, weight.scale, tiles.starts, tiles.marks)
        slices = decompressed.slices(*held, weight.packing, (weight.oc, weight.ic))
        return decompressed.linear(x, slices, None, weight.oc, None, 0)

    return graph_microseconds([lambda one=one: call(one) for one in weight.laid_out(places)])


def configs(oc: int, tile: tune.SparseTile, chip: Chip, n: int) -> Iterator[tune.SparseConfig]:
    """Yield a tile's configurations: whole tiles, and blocks dealt out to a place each multiprocessor."""
    for places in (0, chip.sms):
        yield tune.config(tile, oc, places, chip, n)


def main() -> None:
    """Measure, and print a line for every configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tiles", "table", "shapes", "many"))
    parser.add_argument("--skewed", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seconds", type=float, default=110.0)
    parser.add_argument("--values", default=",".join(VALUES))
    parser.add_argument("--tile", default="", help="row groups, CTAs and layers, such as 4.1.64; default: all")
    parser.add_argument("--output", help="a JSON file")
    options = parser.parse_args()
    chip, end = chip_named("H200"), time.monotonic() + options.seconds
    dtype = torch.bfloat16 if options.bf16 else torch.float16
    target = "bfloat16" if options.bf16 else "float16"
    values = [target if one == "float16" else one for one in options.values.split(",")]
    shapes, sparsities, tokens = {
        "tiles": (MEASURED[:1], (0.5, 0.8), (16,)),
        "table": (MEASURED, (0.5, 0.6, 0.7, 0.8), (8, 16, 32, 64)),
        "shapes": (FLASH, (0.5, 0.8), (16,)),
        "many": (MEASURED[::2], (0.5,), (128, 256, 1024, 4096)),
    }[options.what]

    def allowed(tile: tune.SparseTile) -> bool:
        return not options.tile or options.tile == f"{tile.row_groups}.{tile.resident}.{tile.layers}"

    packings = {one: packing_of(one, target)[0] for one in values}
    sources = {
        sparse_source(packing, tile)
        for packing, n in itertools.product(packings.values(), tokens)
        for tile in tiles_of(n, chip, packing.bits)
        if allowed(tile)
    }
    start = time.monotonic()
    compile_many(list(sources), arch_for((9, 0)))
    print(f"{len(sources)} kernels compiled in {time.monotonic() - start:.1f} s", flush=True)
    rows, dense_times = [], {}
    print("shape sparsity values n | tile places ctas | us GB/s error | cuBLAS ratio (roof: bytes at 4.35 TB/s)")
    for (oc, ic), sparsity in itertools.product(shapes, sparsities):
        kept = masks(oc, ic, sparsity, options.skewed)
        for name in values:
            weight = None
            for n in tokens:
                found = [
                    config
                    for tile in filter(allowed, tiles_of(n, chip, packings[name].bits))
                    for config in configs(oc, tile, chip, n)
                ]
                for config in sorted(found, key=lambda config: config.places):
                    if time.monotonic() > end:
                        break
                    weight = weight or Weight(kept, name, dtype)
                    x = torch.randn(n, ic, device="cuda", dtype=dtype) / 8
                    if (oc, ic, n) not in dense_times:
                        dense_times[oc, ic, n] = cublas(weight, x)
                    us, error = timed(weight, config, x)
                    nbytes = weight.laid_out(config.places)[0].nbytes
                    reference = dense_times[oc, ic, n]
                    problem = problem_of(weight.packing, (oc, ic), n, config.places, nbytes)
                    predicted = 1e6 * tune.seconds(problem, config, chip)
                    print(
                        f"{oc}x{ic} {sparsity:.0%} {name} {n} | {config.tile} {config.places} {config.ctas} | {us:.1f} "
                        f"{nbytes / us / 1e3:.0f} {error:.1e} | predicted {predicted:.1f} | "
                        f"{reference:.1f} {reference / us:.2f} (roof {nbytes / 4.35e6:.1f}, "
                        f"{8 * nbytes / oc / ic:.2f} bits)",
                        flush=True,
                    )
                    rows.append(
                        {"oc": oc, "ic": ic, "sparsity": sparsity, "values": name, "n": n, "tile": str(config.tile),
                         "places": config.places, "us": us, "predicted": predicted, "cublas": reference,
                         "bytes": nbytes, "error": error}
                    )  # fmt: skip
                if n > tune.FEW and weight is not None and time.monotonic() < end:
                    us = decoded(weight, x, places := next(iter(weight.tiles)))
                    print(f"{oc}x{ic} {sparsity:.0%} {name} {n} | for cuBLAS, {places} places | {us:.1f}", flush=True)
            del weight
            torch.cuda.empty_cache()
    if options.output:
        with open(options.output, "w") as file:
            json.dump(rows, file)


if __name__ == "__main__":
    main()
