"""Small products through every tile of every schedule, for compute-sanitizer: see test_sanitizer_gpu.py."""

from __future__ import annotations

import torch

from tersor import formats, ops
from tersor.compress import quantize_rtn
from tersor.kernels.tune import sm80, sm90
from tersor.layouts import PackedWeight, tiles
from tersor.ops import dispatch


def main() -> None:
    """Run each configuration once; the sanitizer looks on."""
    chip = dispatch.chip(torch.device("cuda", 0))
    for group_size in (None, 32):
        run(formats.get_scheme("fp6_e3m2", group_size), chip.capability, 200, 416, fp8=False)
    if chip.capability == (9, 0):
        run(formats.get_scheme("fp6_e3m2"), chip.capability, 200, 416, fp8=True)
    torch.cuda.synchronize()
    print("done")


def run(scheme: formats.Scheme, capability: tuple[int, int], oc: int, ic: int, *, fp8: bool) -> None:
    """Run one scheme through every tile, in whole and in parts, with CTAs that take several items."""
    chip = dispatch.chip(torch.device("cuda", 0))
    layout = dispatch.FP8_LAYOUT if fp8 else "tiles_float16"
    weight = PackedWeight.from_encoded(quantize_rtn(torch.randn(oc, ic), scheme)).to_layout(layout)
    weight = PackedWeight(scheme, (oc, ic), weight.data.cuda(), weight.scale.cuda(), None, layout)
    groups, bits = tiles.scales_in_block(scheme.group_size), 8 if fp8 else 16
    shapes = sm90.tiles(groups, fp8) if capability == (9, 0) else ()
    for tile in shapes:
        n = tile.tokens + 5
        problem = dispatch.problem_of(scheme, (oc, ic), n, activation_bits=bits)
        x = torch.randn(n, ic, device="cuda").half()
        for splits, ctas in ((1, 2), (2, 3)):
            with ops.launches(config=sm90.config(problem, tile, 0, splits, ctas * tile.cluster, chip)):
                ops.linear(x, weight)
        if tile.gathered > 1:
            problem = dispatch.problem_of(scheme, (oc, ic), tile.tokens, activation_bits=bits)
            count = -(-oc // tile.rows)
            with ops.launches(config=sm90.config(problem, tile, 0, 2, 2 * count, chip, True)):
                ops.linear(x[: tile.tokens], weight)
    if not fp8:
        for tokens in sm80.TILES:
            problem = dispatch.problem_of(scheme, (oc, ic), tokens)
            x = torch.randn(tokens, ic, device="cuda").half()
            for config in list(sm80.candidates(problem, chip))[:2]:
                with ops.launches(config=config):
                    ops.linear(x, weight)


if __name__ == "__main__":
    main()
