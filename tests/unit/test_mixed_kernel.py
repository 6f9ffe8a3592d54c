"""The kernel of mixed weights on a CPU, with its rings, products, exchanged sums and places of results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated, tensor_map
from helpers.mixes import mixed
from helpers.multiplied import multiplied

from tersor.formats import Activations, Assignment, Mix, get_scheme
from tersor.formats.mix import MOST_LEVELS
from tersor.hardware import CHIPS
from tersor.kernels import mixed as kernels
from tersor.kernels import quantizing
from tersor.kernels.jit import tensor_map as maps
from tersor.kernels.tune import mixed as tune
from tersor.kernels.tune import sm90
from tersor.layouts import MixedWeight
from tersor.layouts.gated import interleave
from tersor.layouts.packing import BYTEWISE
from tersor.ops import Gate, mixed_launch

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

H200 = CHIPS["NVIDIA H200"]
MIX = Mix((get_scheme("fp5_e2m2"), get_scheme("uint4", 32)))
IC = 352


def matrix(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, IC, generator=torch.Generator().manual_seed(seed))


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Launched:
    """A mixed weight, and launches of one tile's kernel with it."""

    def __init__(self, weight: MixedWeight, tile: sm90.Tile, gate: Gate | None, folder: Path) -> None:
        layout = f"tiles_{BYTEWISE.get(tile.activations, 'float16')}"
        self.weight, self.tile = weight.to_layout(lambda scheme: layout), tile
        self.outputs = weight.channels
        packings, self.problem = mixed_launch.problem_of(self.weight, layout, 1)
        self.function = Emulated(kernels.source(packings, "float16", tile, H200, int(gate or 0)), folder, 900)

    def __call__(
        self, x: torch.Tensor, ctas: int, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tune.MixedConfig]:
        """Return the product by so many CTAs at the most, and how they had it."""
        n, ic = x.shape
        config = tune.configured(self.problem.of_tokens(n), self.tile, ctas, 1, H200, deals=True)
        launch = kernels.prepare(self.function, config, bf16=False, ic=ic, n=n, outputs=self.outputs)  # type: ignore[arg-type]
        sets = [0] * (2 * MOST_LEVELS)
        for one in self.weight.sets:
            level = self.weight.mix.levels.index(one.scheme)
            sets[2 * level : 2 * level + 2] = one.data.data_ptr(), one.scale.data_ptr()
        y = torch.full((n, self.outputs), torch.nan, dtype=torch.float16)
        partial = torch.full((max(1, config.floats),), torch.nan)
        arrived = torch.zeros(max(1, config.counters), dtype=torch.int32)
        x_scale = None
        if self.tile.bytewise:
            codes, scales = self.tile.activations.quantize(x.float())
            x = torch.zeros(n, quantizing.codes_stride(ic), dtype=codes.dtype)
            x[:, :ic] = codes
            x_scale = torch.full((scales.shape[1], quantizing.scales_stride(n)), torch.nan)
            x_scale[:, :n] = scales.T
        launch(
            stream=0,
            sets=sets,
            x=x.data_ptr(),
            x_stride=x.stride(0),
            x_scale=address(x_scale),
            features=address(self.weight.features),
            bias=address(bias),
            residual=address(residual),
            y=y.data_ptr(),
            partial=partial.data_ptr(),
            arrived=arrived.data_ptr(),
            early=True,
        )
        assert not arrived.any()
        return y, config


def form(rows: int, ordered: bool) -> Assignment:
    """Levels of so many output features, two thirds of them the first; the first feature has the second level."""
    level = bytes(int(i % 3 == 0) for i in range(rows))
    return Assignment(MIX, bytes(sorted(level)) if ordered else level)


@pytest.fixture(autouse=True)
def _maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "rows", tensor_map)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize(
    ("tile", "n", "ctas"),
    [
        (sm90.Tile(8, 1, 2, 1, 2), 7, (2, 3, 5, 7)),
        (sm90.Tile(96, 1, 1, 1, 2), 99, (7,)),
    ],
)
@pytest.mark.parametrize("ordered", [False, True])
def test_results_stand_in_the_columns_of_their_features(
    tile: sm90.Tile, n: int, ctas: tuple[int, ...], ordered: bool, folder: Path
) -> None:
    """However tiles are dealt out: in turn, in even shares of one or two parts, or both."""
    rows = 233
    plain = mixed(matrix(rows), form(rows, ordered))
    launched = Launched(plain, tile, None, folder)
    generator = torch.Generator().manual_seed(n)
    x, residual = (torch.randn(n, columns, generator=generator).half() for columns in (IC, rows))
    bias = torch.randn(rows, generator=generator).half()
    exact = x.double() @ plain.dequantize().double().T + bias.double() + residual.double()
    dealt = []
    for count in ctas:
        y, config = launched(x, count, bias, residual)
        torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=2e-3)
        dealt.append(config.dealt)
    assert any(dealt)


@pytest.mark.parametrize("activations", [Activations.INT8, Activations.INT8_GROUPS])
def test_scales_of_tokens_come_with_their_blocks(activations: Activations, folder: Path) -> None:
    """Token tiles begin with a multiple of four, and the last block has fewer channels."""
    rows, n = 233, 39
    whole = Assignment(Mix((get_scheme("int8"), get_scheme("uint4", 32))), form(rows, False).level)
    plain = mixed(matrix(rows), whole)
    launched = Launched(plain, sm90.Tile(16, 1, 1, 1, 2, activations), None, folder)
    x = torch.randn(n, IC, generator=torch.Generator().manual_seed(n)).half()
    x *= torch.logspace(-2, 0, n)[:, None] * torch.logspace(-1, 1, IC)
    read = activations.dequantize(*activations.quantize(x.float())).double()
    exact = read @ multiplied(plain, activations).T
    for ctas in (3, 7):
        y, _ = launched(x, ctas)
        torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activations", [Activations.INT8, Activations.INT8_GROUPS])
def test_many_tokens_are_multiplied_in_pieces(activations: Activations, folder: Path) -> None:
    """In several items one behind the other, and levels beside that have no groups, or ratios in place of them."""
    rows, n, ic = 224, 130, 384
    mix = Mix((get_scheme("uint6", 128), get_scheme("int8"), get_scheme("uint4", 128)))
    form = Assignment(mix, bytes((0, 0, 1, 0, 2)[i % 5] for i in range(rows)))
    generator = torch.Generator().manual_seed(4)
    plain = mixed(torch.randn(rows, ic, generator=generator) + 0.2, form)
    launched = Launched(plain, sm90.Tile(256, 2, 1, 1, 1, activations), None, folder)
    x = torch.randn(n, ic, generator=generator).half()
    read = activations.dequantize(*activations.quantize(x.float())).double()
    y, _ = launched(x, 3)
    torch.testing.assert_close(y.double(), read @ multiplied(plain, activations).T, rtol=1e-3, atol=2e-3)


def test_gate_and_up_of_a_row_set_become_the_channels_of_their_features(folder: Path) -> None:
    channels, n = 77, 5
    gate_up = [mixed(matrix(channels, seed), form(channels, False)) for seed in (1, 2)]
    launched = Launched(MixedWeight.gate_up(*gate_up), sm90.Tile(8, 1, 2, 1, 2), Gate.SILU, folder)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, IC, generator=generator).half()
    halves = [torch.randn(channels, generator=generator).half() for _ in range(2)]
    products = [x.double() @ one.dequantize().double().T + half for one, half in zip(gate_up, halves, strict=True)]
    y, _ = launched(x, 4, interleave(*halves))
    torch.testing.assert_close(y.double(), Gate.SILU.combine(*products), rtol=2e-3, atol=5e-3)
