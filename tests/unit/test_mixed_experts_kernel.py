"""The kernels of experts on a CPU, of one scheme and of a mix: however tokens are routed and CTAs are dealt out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated, tensor_map
from helpers.mixes import pack
from helpers.multiplied import multiplied

from tersor.formats import Activations, Assignment, Mix, Scheme, get_scheme
from tersor.formats.mix import MOST_LEVELS
from tersor.hardware import CHIPS
from tersor.kernels import experts as uniform_kernels
from tersor.kernels import mixed as kernels
from tersor.kernels import quantizing
from tersor.kernels.jit import tensor_map as maps
from tersor.kernels.tune import experts as tune
from tersor.kernels.tune import sm90
from tersor.kernels.tune.experts_problem import most_blocks
from tersor.layouts import MixedWeight, StackedMixedWeight, StackedWeight
from tersor.layouts.gated import interleave
from tersor.layouts.packing import BYTEWISE
from tersor.ops import Gate, grouped, routing

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

H200 = CHIPS["NVIDIA H200"]
MIX = Mix((get_scheme("fp5_e2m2"), get_scheme("uint4", 32)))
INTEGERS = Mix((get_scheme("int8"), get_scheme("uint4", 32)))
IC, EXPERTS, TOP_K = 352, 4, 2
INDEX = torch.tensor([[0, 2], [2, 0], [2, 9], [0, 2], [2, 3], [2, 0], [3, 2], [2, 0], [2, 3], [2, 0], [0, 2]])
"""Of eleven tokens: expert 1 has none, expert 2 more than a block of eight, and one number is no expert."""


@pytest.fixture(autouse=True)
def _maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "rows", tensor_map)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def levels(rows: int, mix: Mix, ordered: bool = False) -> Assignment:
    """Levels of so many output features, two thirds of them the first; the first feature has the second level."""
    level = bytes(int(i % 3 == 0) for i in range(rows))
    return Assignment(mix, bytes(sorted(level)) if ordered else level)


def expert(form: Assignment, seed: int, ic: int = IC) -> MixedWeight:
    weight = torch.randn(len(form.level), ic, generator=torch.Generator().manual_seed(seed))
    level = torch.tensor(list(form.level))
    return MixedWeight.of(form, [pack(weight[level == number], own) for number, own in enumerate(form.mix.levels)])


def routed(x: torch.Tensor, tile: sm90.Tile, gathers: bool) -> tuple[dict[str, int], list[torch.Tensor], torch.Tensor]:
    """Return what a launch reads: addresses, what has to stay alive, and the activations [P, IC] as they are read."""
    tables = routing.tables(INDEX, EXPERTS, tile.tokens)
    order, _, blocks = tables.addresses
    pairs, alive, ic = INDEX.numel(), [tables.memory], x.shape[1]
    of_pairs = x[tables.order.long() // TOP_K]
    given = {"order": order, "blocks": blocks, "x_scale": 0, "x": x.data_ptr(), "x_stride": ic}
    if tile.bytewise:
        codes, scales = tile.activations.quantize(of_pairs.float())
        held = torch.zeros(pairs + tile.tokens, quantizing.codes_stride(ic), dtype=codes.dtype)
        held[:pairs, :ic] = codes
        alive += [held, scales]
        given |= {"x": held.data_ptr(), "x_stride": held.stride(0), "x_scale": scales.data_ptr()}
        of_pairs = tile.activations.dequantize(codes, scales)
    elif not gathers:
        held = torch.full((pairs + tile.tokens, ic), torch.nan, dtype=x.dtype)
        held[:pairs] = of_pairs
        alive.append(held)
        given["x"] = held.data_ptr()
    return given, alive, of_pairs.double()


def product(
    weight: StackedMixedWeight | StackedWeight,
    tile: sm90.Tile,
    x: torch.Tensor,
    ctas: int,
    folder: Path,
    gate: Gate | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Launch a product: returns [P, outputs], the pairs' activations as they are read, and whether tiles were split."""
    layout = f"tiles_{BYTEWISE.get(tile.activations, 'float16')}"
    mixed = isinstance(weight, StackedMixedWeight)
    placed = weight.to_layout(lambda _: layout) if isinstance(weight, StackedMixedWeight) else weight.to_layout(layout)
    problems = grouped.problems_of(placed, len(INDEX), TOP_K, False)
    configs = [replace(tune.config(one, tile, H200), ctas=ctas) for one in problems]
    gathers, pairs = configs[0].gathers and gate is not None, INDEX.numel()
    given, _alive, read = routed(x, tile, gathers)
    outputs = weight.shape[1] // 16 * 8 + max(0, weight.shape[1] % 16 - 8) if gate else weight.shape[1]
    y = torch.full((pairs, outputs), torch.nan, dtype=torch.float16)
    partial = torch.full((max(1, configs[0].floats),), torch.nan)
    arrived = torch.zeros(max(1, configs[0].counters), dtype=torch.int32)
    common = {"bf16": False, "ic": x.shape[1], "tokens": len(INDEX), "top_k": TOP_K, "gathers": gathers}
    common["most_blocks"] = most_blocks(pairs, EXPERTS, tile.tokens)
    given |= {"bias": 0 if bias is None else bias.data_ptr(), "y": y.data_ptr()}
    given |= {"partial": partial.data_ptr(), "arrived": arrived.data_ptr(), "stream": 0, "early": True}
    if isinstance(placed, StackedMixedWeight):
        packings = tuple(one.packing for one in placed.sets)
        source = kernels.experts_source(packings, "float16", tuple(configs), int(gate or 0), False)
        few = max(1, ctas * 2 // 5)
        launch = kernels.prepare_experts(
            Emulated(source, folder, 900),  # type: ignore[arg-type]
            *(configs, (ctas - few, few), [one.oc for one in problems]),
            outputs=outputs,
            bias_rows=weight.shape[1],
            **common,  # type: ignore[arg-type]
        )
        sets = [address for one in placed.sets for address in (one.data.data_ptr(), one.scale.data_ptr())]
        features = 0 if placed.features is None else placed.features.data_ptr()
        launch(sets=[*sets, *[0] * (2 * MOST_LEVELS - len(sets))], features=features, **given)
    else:
        source = uniform_kernels.source(placed.packing, "float16", configs[0], int(gate or 0), False)
        launch = uniform_kernels.prepare(
            Emulated(source, folder, 900),  # type: ignore[arg-type]
            configs[0],
            oc=weight.shape[1],
            factor=placed.packing.factor,
            **common,  # type: ignore[arg-type]
        )
        launch(weight=placed.data.data_ptr(), scale=placed.scale.data_ptr(), **given)
    assert not arrived.any() and mixed == isinstance(placed, StackedMixedWeight)
    return y, read, bool(partial.isfinite().any())


def known_pairs(tile: sm90.Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places of pairs that have an expert, and their experts."""
    experts = INDEX.reshape(-1)[routing.tables(INDEX, EXPERTS, tile.tokens).order.long()]
    return torch.nonzero(experts < EXPERTS)[:, 0], experts


def exact(read: torch.Tensor, decoded: torch.Tensor, tile: sm90.Tile) -> torch.Tensor:
    """Return what each pair that has an expert gets of decoded weights [E, OC, IC], float64."""
    places, experts = known_pairs(tile)
    return torch.stack([decoded[experts[place]].double() @ read[place] for place in places])


@pytest.mark.parametrize(
    ("tile", "mix", "ctas"),
    [
        (sm90.Tile(8, 1, 4, 1, 1), MIX, (2, 5, 9)),
        (sm90.Tile(96, 2, 1, 1, 1), MIX, (3,)),
        (sm90.Tile(16, 1, 1, 1, 2, Activations.INT8), INTEGERS, (4,)),
    ],
)
@pytest.mark.parametrize("ordered", [False, True])
def test_results_of_every_pair_stand_in_the_columns_of_their_features(
    tile: sm90.Tile, mix: Mix, ctas: tuple[int, ...], ordered: bool, folder: Path
) -> None:
    """Tiles are taken in turn; a level has few CTAs or many."""
    parts = [expert(levels(233, mix, ordered), number) for number in range(EXPERTS)]
    weight, decoded = StackedMixedWeight.stack(parts), torch.stack([multiplied(one, tile.activations) for one in parts])
    x = torch.randn(len(INDEX), IC, generator=torch.Generator().manual_seed(1)).half()
    bias = torch.randn(EXPERTS, 233, generator=torch.Generator().manual_seed(2)).half()
    places, experts = known_pairs(tile)
    for count in ctas:
        y, read, _ = product(weight, tile, x, count, folder, bias=bias)
        wanted = exact(read, decoded, tile) + bias[experts[places]].double()
        torch.testing.assert_close(y[places].double(), wanted, rtol=1e-3, atol=4e-3)


def test_tiles_of_the_last_wave_are_split_and_their_sums_added(folder: Path) -> None:
    """Each level has counters and room for parts of its own."""
    tile, ic = sm90.Tile(8, 1, 4, 1, 1), 1504
    weight = StackedMixedWeight.stack([expert(levels(130, MIX), number, ic) for number in range(EXPERTS)])
    x = torch.randn(len(INDEX), ic, generator=torch.Generator().manual_seed(1)).half()
    places, _ = known_pairs(tile)
    split = []
    for ctas in (7, 8, 11):
        y, read, some = product(weight, tile, x, ctas, folder)
        torch.testing.assert_close(y[places].double(), exact(read, weight.dequantize(), tile), rtol=1e-3, atol=1e-2)
        split.append(some)
    assert any(split)


def test_gate_and_up_of_tokens_that_the_kernel_fetches_become_the_channels_of_their_features(folder: Path) -> None:
    channels, tile = 77, sm90.Tile(8, 1, 4, 1, 1)
    form = levels(channels, MIX)
    halves = [[expert(form, 10 * side + number) for number in range(EXPERTS)] for side in (0, 1)]
    weight = StackedMixedWeight.stack([MixedWeight.gate_up(*pair) for pair in zip(*halves, strict=True)])
    x = torch.randn(len(INDEX), IC, generator=torch.Generator().manual_seed(3)).half()
    biases = torch.randn(2, EXPERTS, channels, generator=torch.Generator().manual_seed(4)).half()
    bias = interleave(*(one.T for one in biases)).T.contiguous()
    y, read, _ = product(weight, tile, x, 5, folder, Gate.SILU, bias)
    places, experts = known_pairs(tile)
    products = [
        exact(read, torch.stack([one.dequantize() for one in side]), tile) + own[experts[places]].double()
        for side, own in zip(halves, biases, strict=True)
    ]
    torch.testing.assert_close(y[places].double(), Gate.SILU.combine(*products), rtol=3e-3, atol=2e-2)


@pytest.mark.parametrize(
    ("scheme", "tile"),
    [
        (MIX.levels[1], sm90.Tile(8, 1, 4, 1, 1)),
        (get_scheme("uint4", 32), sm90.Tile(16, 1, 1, 1, 2, Activations.INT8)),  # whole rows by ratios
        (get_scheme("uint6", 32), sm90.Tile(16, 1, 1, 1, 2, Activations.INT8)),  # sums of groups
        (get_scheme("lut3"), sm90.Tile(8, 1, 4, 1, 1)),
    ],
    ids=["groups", "ratios", "sums of groups", "tables"],
)
def test_experts_of_one_scheme_are_what_they_were(scheme: Scheme, tile: sm90.Tile, folder: Path) -> None:
    made = [pack(torch.randn(150, IC, generator=torch.Generator().manual_seed(n)), scheme) for n in range(EXPERTS)]
    weight, decoded = StackedWeight.stack(made), torch.stack([multiplied(one, tile.activations) for one in made])
    x = torch.randn(len(INDEX), IC, generator=torch.Generator().manual_seed(5)).half()
    places, _ = known_pairs(tile)
    for ctas in (2, 7):
        y, read, _ = product(weight, tile, x, ctas, folder)
        torch.testing.assert_close(y[places].double(), exact(read, decoded, tile), rtol=1e-3, atol=4e-3)
