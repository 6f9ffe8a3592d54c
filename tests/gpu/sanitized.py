"""Small products through every tile of every schedule, for compute-sanitizer: see test_sanitizer_gpu.py."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import torch
from helpers.sampling_rows import logits_of, moved, random_rows
from helpers.sharing import share

from tersor import formats, hardware, ops
from tersor.compress import quantize_rtn
from tersor.formats import Activations, Plain
from tersor.kernels import deciding, dense
from tersor.kernels.tune import MOST_NORMED, experts_sm80, sm80, sm90
from tersor.kernels.tune import experts as tune
from tersor.kernels.tune import mixed as tune_mixed
from tersor.kernels.tune import sparse as tune_sparse
from tersor.layouts import MixedWeight, PackedWeight, SparseWeight, StackedWeight, TiledSparseWeight
from tersor.layouts.packing import scales_in_block, target_of
from tersor.layouts.sparse_packing import FP8
from tersor.ops import grouped, heads, mixed_launch, routing
from tersor.ops.attention_form import Rows


def main() -> None:
    """Run each configuration of one part once; the sanitizer looks on."""
    PARTS[sys.argv[1]]()
    torch.cuda.synchronize()
    print("done")


def linears() -> None:
    """Run the products of dense weights, with activations of 16 and of 8 bits."""
    chip = hardware.of_device(0)
    for group_size in (None, 32):
        run(formats.get_scheme("fp6_e3m2", group_size), chip.capability, 200, 416)
    if chip.capability == (9, 0):
        run(formats.get_scheme("fp6_e3m2"), chip.capability, 200, 416, Activations.E4M3)
        run(formats.get_scheme("int8"), chip.capability, 200, 416, Activations.INT8)
        run(formats.get_scheme("uint4", 32), chip.capability, 200, 416, Activations.INT8)
        run(formats.get_scheme("uint4", 32), chip.capability, 200, 416, Activations.INT8_GROUPS)


def mixes() -> None:
    """Run the products of mixed weights, where one launch has all their row sets."""
    if hardware.of_device(0).capability == (9, 0):
        mixed(("fp4_e2m1", None), ("uint3", 32), ("int8", None))
        mixed(("uint4", 128), ("int8", None), activations=Activations.INT8)
        mixed(("uint4", 128), ("int8", None), activations=Activations.INT8_GROUPS)


def zeros() -> None:
    """Run the products of pruned weights, with activations of 16 and of 8 bits."""
    if hardware.of_device(0).capability == (9, 0):
        pruned(formats.get_scheme("fp6_e3m2"), torch.float16)
        pruned(formats.get_scheme("int8"), torch.bfloat16)
        pruned(Plain("float16"), torch.float16)
        pruned(formats.get_scheme("fp6_e2m3"), torch.bfloat16, FP8)


def mixtures() -> None:
    """Run the experts of a layer, with activations of 16 and of 8 bits, and what chooses them."""
    if hardware.of_device(0).capability == (9, 0):
        experts(Activations.E4M3)
        experts(Activations.INT8)
    experts(Activations.NATIVE)
    for tokens in (1, 3, 40, 70):  # one warp, one CTA, several
        route(tokens)


def others() -> None:
    """Run what is around the products: sampling, norms, heads, attention."""
    for vocabulary, dtype in ((3001, torch.bfloat16), (20000, torch.float16), (20000, torch.float32)):
        draw(vocabulary, dtype)
    around()
    attend()


def pruned(values: formats.Scheme | Plain, dtype: torch.dtype, target: str = "") -> None:
    """Multiply with a pruned weight through every tile, by CTAs that take whole tiles or have parts, and decode it.

    `target` is what activations are multiplied as, where that is not how they come.
    """
    chip, plain = hardware.of_device(0), torch.randn(300, 1400, device="cuda")
    kept = torch.rand(300, 1400, device="cuda") < 0.4
    kept[3], kept[:, 200], kept[128:192] = True, True, False
    stored = (
        SparseWeight.from_plain(plain.to(dtype), kept)
        if isinstance(values, Plain)
        else SparseWeight.from_encoded(quantize_rtn(plain, values), kept)
    )
    weight = TiledSparseWeight.of(stored, target or str(dtype).removeprefix("torch."), 2)
    for tokens in tune_sparse.TOKENS:
        x = torch.randn(tokens + 5 if tokens >= 64 else tokens - 3, 1400, dtype=dtype, device="cuda")
        for tile in tune_sparse.tiles(tokens, weight.packing.bits, chip, bytewise=weight.packing.bytewise):
            for places in (0, 2):
                with ops.using(sparse=tune_sparse.config(tile, 300, places, chip, len(x))):
                    ops.linear(x, weight)
    if not target:
        ops.linear(torch.randn(5, 1400, dtype=dtype, device="cuda", requires_grad=True), weight).sum().backward()


def attend() -> None:
    """Attend to rows of few and of many tokens, in whole and in parts, over pages of 16 and of 8 bits."""
    for dtype, dim, window in ((torch.float16, 128, None), (torch.float8_e4m3fn, 80, 100)):
        form = ops.AttentionForm(heads=8, kv_heads=2, head_dim=dim, scale=0.1, rotary_dim=dim, window=window)
        cache = ops.PagedCache.empty(12, form, dtype, "cuda")
        table = torch.arange(1, 11, dtype=torch.int32, device="cuda").view(2, 5)
        for counts in ((1, 1), (8, 3), (130, 2)):
            starts = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32, device="cuda")
            rows = ops.Rows(starts, torch.tensor([300, 65]).int().cuda(), table.clone(), max(counts), 320)
            if counts == (1, 1):
                rows.pages[1, 0] = rows.pages[0, 0]
                share(rows, form)
            qkv = torch.randn(sum(counts) + 1, form.qkv_channels, device="cuda").half()
            ops.attend(qkv, cache, rows, form, torch.ones(320, dim, device="cuda"))


def route(tokens: int) -> None:
    """Choose experts, sort pairs, theirs and those of an index with none among them, and add up."""
    index, weights, tables = routing.route_tables(torch.randn(tokens, 60, device="cuda"), 6, 8)
    for found in (tables, routing.tables(index - 5, 60, 8)):
        for channels in (520, 37):
            routing.combine(torch.randn(6 * tokens, channels, device="cuda").half(), weights, found)
    x, weight = torch.randn(tokens, 2056, device="cuda").half(), torch.randn(61, 2056, device="cuda").half()
    ops.router_logits(x, weight, weight[:, 0].contiguous())
    ops.router_logits(x, weight.float(), wide=True)
    if tokens <= deciding.MOST_TOKENS:
        decided(x, weight)


def decided(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Decide by a router for experts that are two stacks, run them, and norm their sum."""
    sizes, gain = ((2 * 136, x.shape[1]), (x.shape[1], 136)), ops.Gain(x[0], 1e-6)
    pair = []
    for size in sizes:
        one = PackedWeight.from_encoded(quantize_rtn(torch.randn(*size), formats.get_scheme("fp6_e3m2")))
        stack = StackedWeight.stack([one] * len(weight)).to_layout("tiles_float16")
        pair.append(replace(stack, data=stack.data.cuda(), scale=stack.scale.cuda()))
    found = ops.decide(x, (weight, None), (pair[0], pair[1]), 6, norm=gain)
    assert found is not None
    ops.decided_experts(found, pair[0], pair[1], addend=x, behind=gain)


def draw(vocabulary: int, dtype: torch.dtype) -> None:
    """Draw tokens of rows of every kind, of some of which the whole row is searched."""
    for spread in (0.3, 3.0):
        rows = moved(random_rows(24, vocabulary, 0), "cuda")
        asks = torch.full((24,), 20, dtype=torch.int32, device="cuda")
        ops.draw_with_logprobs(logits_of(24, vocabulary, dtype, spread, 0).cuda(), rows, asks)


def around() -> None:
    """Normalise rows, a CTA or a warp several in turn, look rows up, make numbers, put heads side by side."""
    x, weight = torch.randn(3, 5128, device="cuda").half(), torch.ones(5128, device="cuda").half()
    ops.rms_norm(ops.layer_norm(x, weight, weight, 1e-5), weight, 1e-6, residual=x)
    x_many, ones = torch.randn(140, 8200, device="cuda").half(), torch.ones(8200, device="cuda").half()
    ops.rms_norm_quantized(ops.layer_norm(x_many, ones, ones, 1e-5), ones, 1e-6, residual=x_many)
    ops.layer_norm_quantized(x_many, ones, None, 1e-5, activations=Activations.INT8)
    ops.layer_norm_quantized(x_many, ones, None, 1e-5, activations=Activations.INT8_GROUPS)
    x_most, ones = torch.randn(1100, 520, device="cuda").half(), torch.ones(520, device="cuda").half()
    ops.rms_norm_quantized(ops.layer_norm(x_most, ones, ones, 1e-5), ones, 1e-6, residual=x_most)
    ops.rms_norm_quantized(
        torch.ones(1700, 4096, device="cuda").half(), x[0, :4096], 1e-6, activations=Activations.INT8
    )
    starts, lengths = torch.tensor([0, 2, 2, 3], device="cuda").int(), torch.tensor([9, 0, 1], device="cuda").int()
    rows = Rows(starts, lengths, torch.zeros(3, 1, device="cuda").int(), 2, 9)
    ops.lookup(torch.tensor([0, 2, 3, -1], device="cuda"), x, positions=x, rows=rows)
    ops.softcap(ops.relu(x), 30.0)
    ops.gated(x[:, :5120].contiguous(), ops.Gate.GELU_TANH)
    of = heads.LatentHeads(heads=3, fixed=8, turned=16, value=8, interleaved=True)
    qkv = heads.side_by_side(x[:, :72], x[:, 72:120], x[:, 120:136], of)
    heads.values_of(qkv[:, :72].contiguous(), of)


def norms(x: torch.Tensor, weight: PackedWeight) -> None:
    """Multiply with a norm behind the product, then with one ahead of it."""
    oc, ic = weight.shape
    behind, ahead = (ops.FoldedNorm.of(torch.ones(size, device="cuda").half(), 1e-5) for size in (oc, ic))
    ops.linear_norm_out(x, weight, behind, residual=x[:, :oc])
    squares = torch.rand(len(x), dense.squares_stride(ic), device="cuda")[:, : -(-ic // dense.SQUARED_CHANNELS)]
    ops.linear_norm_in(ops.Deferred(x, x, squares, ahead), weight)


def experts(activations: Activations) -> None:
    """Run a layer of experts, one of which gets no token and one most, through every tile of every schedule.

    Those of the sm90 schedule by few CTAs, those of the sm80 schedule in whole and in parts.
    """
    name = "int6" if activations is Activations.INT8 else "fp6_e3m2"
    chip, scheme, top_k = hardware.of_device(0), formats.get_scheme(name), 2
    layout = f"tiles_{target_of(activations, torch.float16)}"
    sizes = ((2 * 136, 256), (256, 136))  # gate and up, down
    weights = [
        StackedWeight.stack([PackedWeight.from_encoded(quantize_rtn(torch.randn(*size), scheme)) for _ in range(4)])
        for size in sizes
    ]
    gate_up, down = (weight.to_layout(layout) for weight in weights)
    pair = [
        replace(weight, data=weight.data.cuda(), scale=weight.scale.cuda(), zero_point=None)
        for weight in (gate_up, down)
    ]
    problems = [tune.ExpertsProblem.of(weight.packing, weight.shape, 21, top_k, activations) for weight in pair]
    x, factors = torch.randn(21, 256, device="cuda").half(), torch.rand(21, top_k, device="cuda")
    index = torch.randint(0, 5, (21, top_k), device="cuda", dtype=torch.int32).clamp(max=2)
    tried: list[list[tune.EitherConfig]] = []
    if chip.capability == (9, 0):
        for tile in tune.tiles(problems[0]):
            tried.append([replace(tune.config(problem, tile, chip), ctas=3) for problem in problems])
    if activations is Activations.NATIVE:
        for tokens, splits in itertools.product(experts_sm80.TILES, (1, 2)):
            tried.append([experts_sm80.config(problem, tokens, splits, chip) for problem in problems])
    for configs in tried:
        grouped.configs = lambda *call, configs=configs: [(config,) for config in configs]
        grouped.forget()
        ops.experts(x, pair[0], pair[1], index, factors)


def mixed(*levels: tuple[str, int | None], activations: Activations = Activations.NATIVE) -> None:
    """Multiply with a mixed weight through every tile, by CTAs that take whole tiles or have parts, and in clusters."""
    chip, oc, ic = hardware.of_device(0), 203, 416 if activations is Activations.NATIVE else 640
    mix = formats.Mix(tuple(formats.get_scheme(*level) for level in levels))
    form = formats.Assignment(mix, bytes(i * i % len(levels) for i in range(oc)))
    sets = [
        PackedWeight.from_encoded(quantize_rtn(torch.randn(count, ic), scheme))
        for scheme, count in zip(mix.levels, form.rows, strict=True)
        if count
    ]
    layout = f"tiles_{target_of(activations, torch.float16)}"
    weight = MixedWeight.of(form, sets).to(torch.device("cuda")).to_layout(lambda scheme: layout)
    _, any_tokens = mixed_launch.problem_of(weight, layout, 1)
    for tile in tune_mixed.tiles(any_tokens):
        for n in (tile.tokens, tile.tokens + 5):
            x, residual = torch.randn(n, ic, device="cuda").half(), torch.randn(n, oc, device="cuda").half()
            problem = any_tokens.of_tokens(n)
            for crowd, splits in ((5, 1), (11, 1), *tune_mixed.runs(problem, tile, chip)):
                with ops.using(mixed=tune_mixed.configured(problem, tile, crowd, splits, chip, deals=True)):
                    ops.linear(x, weight, residual=residual)


def run(
    scheme: formats.Scheme, capability: tuple[int, int], oc: int, ic: int, activations: Activations = Activations.NATIVE
) -> None:
    """Run one scheme through every tile, in whole and in parts, with CTAs that take several items."""
    chip = hardware.of_device(0)
    layout, native = f"tiles_{target_of(activations, torch.float16)}", activations is Activations.NATIVE
    weight = PackedWeight.from_encoded(quantize_rtn(torch.randn(oc, ic), scheme)).to_layout(layout)
    weight = PackedWeight(scheme, (oc, ic), weight.data.cuda(), weight.scale.cuda(), None, layout)
    groups = scales_in_block(scheme.group_size)
    shapes = sm90.tiles(groups, activations) if capability == (9, 0) else ()
    for tile in shapes:
        n = tile.tokens + 5
        problem = dense.problem_of(scheme, (oc, ic), n, activations=activations)
        x = torch.randn(n, ic, device="cuda").half()
        for splits, ctas in ((1, 2), (2, 3)):
            with ops.using(config=sm90.config(problem, tile, 0, splits, ctas * tile.cluster, chip)):
                ops.linear(x, weight)
        if tile.gathered > 1:
            problem = dense.problem_of(scheme, (oc, ic), tile.tokens, activations=activations)
            count = -(-oc // tile.rows)
            with ops.using(config=sm90.config(problem, tile, 0, 2, 2 * count, chip, True)):
                ops.linear(x[: tile.tokens], weight)
        if tile.tokens <= MOST_NORMED and native:
            for splits, ctas in ((1, 2), (2, 3)):
                problem = dense.problem_of(scheme, (oc, ic), tile.tokens)
                with ops.using(config=sm90.config(problem, tile, 0, splits, ctas, chip)):
                    norms(x[: tile.tokens], weight)
    if native:
        for tokens in sm80.TILES:
            problem = dense.problem_of(scheme, (oc, ic), tokens)
            x = torch.randn(tokens, ic, device="cuda").half()
            for config in list(sm80.candidates(problem, chip))[:2]:
                with ops.using(config=config):
                    ops.linear(x, weight)


PARTS = {"linears": linears, "mixes": mixes, "zeros": zeros, "mixtures": mixtures, "others": others}

if __name__ == "__main__":
    main()
