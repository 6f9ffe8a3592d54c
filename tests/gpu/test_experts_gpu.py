"""The experts of a layer by kernels, against the definition: every tile, format and gate, however tokens crowd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tersor import formats, hardware, ops
from tersor.compress.rtn import quantize_rtn
from tersor.kernels import experts as family
from tersor.kernels import jit
from tersor.kernels.tune import experts as tune
from tersor.kernels.tune import experts_sm80
from tersor.kernels.tune.tile import Tile
from tersor.layouts import STREAM, PackedWeight, StackedWeight
from tersor.layouts.gated import gated_rows
from tersor.layouts.packing import target_of
from tersor.ops import Gate, grouped

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

EXPERTS, TOP_K = 5, 2
BY_ROWS = "fp6_e3m2"
KINDS = (
    (BY_ROWS, None, torch.float16, "16bit"),
    (BY_ROWS, None, torch.bfloat16, "16bit"),
    ("fp5_e2m2", None, torch.float16, "16bit"),
    ("fp4_e2m1", 32, torch.bfloat16, "16bit"),
    ("int4", 128, torch.float16, "16bit"),
    ("uint4", 64, torch.float16, "16bit"),
    (BY_ROWS, None, torch.float16, "fp8"),
    ("fp4_e2m1", 32, torch.bfloat16, "fp8"),
)
"""Format, group size, dtype and activations; each meets the tiles by turns, the first two every one."""
OLDER_KINDS = (
    (BY_ROWS, None, torch.float16, "16bit"),
    ("fp5_e2m2", None, torch.bfloat16, "16bit"),
    ("fp4_e2m1", 32, torch.bfloat16, "16bit"),
    ("uint4", 128, torch.float16, "16bit"),
)
"""The same for the sm80 schedule; each meets two of its tiles, or all."""
REPEATS = 20


def chips() -> dict[str, hardware.Chip]:
    """The GPU as if it were of the generations that the sm80 schedule is for, older and newer, and as it is."""
    chip = hardware.of_device(0)
    known = {"sm80": replace(chip, capability=(8, 0))}
    if chip.capability == (9, 0):
        known |= {"sm80 early": replace(chip, capability=(10, 0)), "sm90": chip}
    return known


@pytest.fixture(params=["sm80", "sm80 early", "sm90"])
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test with the kernels of either schedule; `early`: they are launched before the kernel ahead has ended."""
    chip = chips().get(request.param)
    if chip is None:
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setattr(hardware, "of_device", lambda index: chip)
    grouped.forget()
    yield request.param
    grouped.forget()


def stacked(experts: int, oc: int, ic: int, scheme: formats.Scheme) -> StackedWeight:
    """Random weights of a layer's experts."""
    weights = [torch.randn(oc, ic, device="cuda") / math.sqrt(ic) for _ in range(experts)]
    return StackedWeight.stack([PackedWeight.from_encoded(quantize_rtn(weight, scheme)) for weight in weights])


def layer(
    name: str, group_size: int | None, dtype: torch.dtype, activations: str, hidden: int, inner: int
) -> tuple[StackedWeight, StackedWeight, dict[str, Any]]:
    """A layer of experts on the GPU, in kernel tiles, and its biases."""
    scheme = formats.get_scheme(name, group_size)
    layout = ops.preferred_layout(scheme, dtype, torch.device("cuda", 0), activations)
    rows = gated_rows(inner)
    gate_up = stacked(EXPERTS, rows, hidden, scheme).to_layout(layout)
    down = stacked(EXPERTS, hidden, inner, scheme).to_layout(layout)
    biases = {
        "gate_up_bias": torch.randn(EXPERTS, rows, device="cuda", dtype=dtype) / 4,
        "down_bias": torch.randn(EXPERTS, hidden, device="cuda", dtype=dtype) / 4,
    }
    return gate_up, down, biases


def expected(
    x: torch.Tensor,
    gate_up: StackedWeight,
    down: StackedWeight,
    index: torch.Tensor,
    weights: torch.Tensor,
    **rest: Any,
) -> torch.Tensor:
    """What the definition says, in float64 from decoded weights, [T, H]."""
    gate: Gate = rest["gate"]
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(gate_up.experts):
        tokens, ranks = (index == expert).nonzero(as_tuple=True)
        both = x[tokens].double() @ gate_up.expert(expert).dequantize(torch.float64).T
        inner = gate.of_rows(both + rest["gate_up_bias"][expert].double()).to(x.dtype).double()
        outer = inner @ down.expert(expert).dequantize(torch.float64).T + rest["down_bias"][expert].double()
        total.index_add_(0, tokens, outer * weights[tokens, ranks].double()[:, None])
    return total


def close(got: torch.Tensor, want: torch.Tensor, activations: str = "16bit") -> bool:
    """Whether a result is within a few roundings of what was expected, or of e4m3 activations'."""
    step = 2.0**-4 if activations == "fp8" else torch.finfo(got.dtype).eps
    return bool((got.double() - want).abs().max() <= 3 * step * want.abs().max())


def routings(tokens: int) -> Iterator[torch.Tensor]:
    """Indices of experts: random ones, all to one expert, and some to none."""
    index = torch.randint(EXPERTS, (tokens, TOP_K), device="cuda", dtype=torch.int32)
    yield index
    yield torch.full_like(index, 3)
    yield torch.where(torch.rand(tokens, TOP_K, device="cuda") < 0.5, index, EXPERTS + 2)


def forced(
    monkeypatch: pytest.MonkeyPatch, config_of: Callable[[tune.ExpertsProblem, hardware.Chip], tune.EitherConfig]
) -> None:
    """Let both products of the calls that follow run with configurations."""

    def configs(
        gate_up: StackedWeight, down: StackedWeight, tokens: int, top_k: int, invariant: bool, chip: Any
    ) -> Any:
        problems = [
            tune.ExpertsProblem.of(
                weight.packing, weight.shape, tokens, top_k, grouped.activations_of(weight), invariant
            )
            for weight in (gate_up, down)
        ]
        return tuple((config_of(problem, chip),) for problem in problems)

    monkeypatch.setattr(grouped, "configs", configs)
    grouped.forget()


def cases() -> list[tuple[tuple[Any, ...], Tile]]:
    """Kinds of weights and tiles that meet."""
    found: list[tuple[tuple[Any, ...], Tile]] = []
    for number, kind in enumerate(KINDS):
        gate_up, _, _ = layer(*kind, 256, 128)
        problem = tune.ExpertsProblem.of(gate_up.packing, gate_up.shape, 8, TOP_K, grouped.activations_of(gate_up))
        tiles = tune.tiles(problem)
        found += [(kind, tile) for tile in (tiles if number < 2 else tiles[number % 4 :: 4])]
    return found


def holds(
    kind: tuple[Any, ...], made: tuple[StackedWeight, StackedWeight, dict[str, Any]], gate: Gate, tokens: int
) -> bool:
    """Whether a layer gives so many tokens what the definition says, however they are routed and far apart."""
    gate_up, down, biases = made
    hidden = gate_up.shape[2]
    x = torch.randn(tokens, hidden + 8, device="cuda", dtype=kind[2])[:, :hidden]
    weights = torch.rand(tokens, TOP_K, device="cuda")
    rest = {**biases, "gate": gate}
    pairs = (
        (ops.experts(x, gate_up, down, index, weights, **rest), expected(x, gate_up, down, index, weights, **rest))
        for index in routings(tokens)
    )
    return all(close(got, want, kind[3]) for got, want in pairs)


def test_every_tile_is_the_definition_whoever_gets_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = hardware.of_device(0)
    if chip.capability != (9, 0):
        pytest.skip("needs compute capability 9.0")
    pairs = cases()
    layers = {kind: layer(*kind, 256 if kind[1] else 264, 128 if kind[1] else 136) for kind in KINDS}
    gates = {case: Gate(1 + number % 4) for number, case in enumerate(pairs)}
    sources = []
    for kind, tile in pairs:
        gate_up, down, _ = layers[kind]
        result, native = target_of(formats.Activations.NATIVE, kind[2]), kind[3] == "16bit"
        for weight, gate in ((gate_up, gates[kind, tile]), (down, 0)):
            problem = tune.ExpertsProblem.of(weight.packing, weight.shape, 8, TOP_K, grouped.activations_of(weight))
            config = tune.config(problem, tile, chip)
            sources.append(family.source(weight.packing, str(result), config, int(gate), gate == 0 and native))
    jit.compile_many(sources, jit.arch_for((9, 0)))
    for kind, tile in pairs:
        forced(monkeypatch, lambda problem, chip, tile=tile: tune.config(problem, tile, chip))
        for tokens in (1, 3, 40, 300):
            assert holds(kind, layers[kind], gates[kind, tile], tokens), f"{kind} {tile} {tokens} tokens"


@pytest.mark.parametrize("schedule", ["sm80"], indirect=True)
def test_every_tile_of_the_sm80_schedule_is_the_definition_in_whole_and_in_parts(
    monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    pairs = [
        (kind, tile)
        for number, kind in enumerate(OLDER_KINDS)
        for tile in (experts_sm80.TILES if number < 2 else experts_sm80.TILES[number % 2 :: 2])
    ]
    layers = {kind: layer(*kind, 256 if kind[1] else 264, 128 if kind[1] else 136) for kind in OLDER_KINDS}
    gates = {case: Gate(1 + number % 4) for number, case in enumerate(pairs)}
    sources = []
    for kind, tile in pairs:
        gate_up, down, _ = layers[kind]
        for weight, gate in ((gate_up, gates[kind, tile]), (down, 0)):
            problem = tune.ExpertsProblem.of(weight.packing, weight.shape, 8, TOP_K)
            config = experts_sm80.config(problem, tile, 1, hardware.of_device(0))
            sources.append(family.source(weight.packing, weight.packing.target, config, int(gate), False))
    jit.compile_many(sources, jit.arch_for(torch.cuda.get_device_capability(0)))
    for kind, tile in pairs:
        for splits, tokens in ((1, 1), (2, 3), (1, 40), (2, 300)):
            forced(
                monkeypatch,
                lambda problem, chip, tile=tile, splits=splits: experts_sm80.config(problem, tile, splits, chip),
            )
            assert holds(kind, layers[kind], gates[kind, tile], tokens), f"{kind} {tile} {tokens} tokens, {splits}"


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("tokens", [1, 5, 33, 200])
def test_launches_one_upon_the_other_give_the_same_bits(tokens: int) -> None:
    gate_up, down, biases = layer(BY_ROWS, None, torch.float16, "16bit", 512, 256)
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.float16)
    logits = torch.randn(tokens, EXPERTS, device="cuda")
    results = [ops.routed_experts(x, logits, gate_up, down, TOP_K, **biases) for _ in range(REPEATS)]
    assert all(torch.equal(result, results[0]) for result in results)
    index, weights = ops.route(logits, TOP_K)
    assert close(results[0], expected(x, gate_up, down, index, weights, **biases, gate=Gate.SILU))


@pytest.mark.usefixtures("schedule")
def test_a_graph_is_replayed_with_tokens_that_go_elsewhere() -> None:
    gate_up, down, biases = layer(BY_ROWS, None, torch.bfloat16, "16bit", 512, 256)
    x = torch.randn(12, 512, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(12, EXPERTS, device="cuda")
    ops.routed_experts(x, logits, gate_up, down, TOP_K, **biases)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.routed_experts(x, logits, gate_up, down, TOP_K, **biases)
    for crowded in (False, True):
        x.normal_()
        logits.normal_()
        if crowded:
            logits[:, 2] += 100
        y.fill_(torch.nan)
        graph.replay()
        index, weights = ops.route(logits, TOP_K)
        assert close(y, expected(x, gate_up, down, index, weights, **biases, gate=Gate.SILU))


@pytest.mark.usefixtures("schedule")
def test_a_token_alone_has_the_bits_it_has_among_others_where_that_is_asked_for() -> None:
    gate_up, down, biases = layer(BY_ROWS, None, torch.float16, "16bit", 512, 256)
    x = torch.randn(200, 512, device="cuda", dtype=torch.float16)
    index = torch.randint(EXPERTS, (200, TOP_K), device="cuda", dtype=torch.int32)
    weights = torch.rand(200, TOP_K, device="cuda")
    with ops.using(batch_invariant=True):
        together = ops.experts(x, gate_up, down, index, weights, **biases)
        for count in (1, 7, 60):
            few = ops.experts(x[:count], gate_up, down, index[:count], weights[:count], **biases)
            assert torch.equal(few, together[:count])


@pytest.mark.usefixtures("schedule")
def test_a_shared_expert_is_added_before_the_rounding() -> None:
    gate_up, down, biases = layer(BY_ROWS, None, torch.float16, "16bit", 512, 256)
    x = torch.randn(9, 512, device="cuda", dtype=torch.float16)
    addend = torch.randn_like(x)
    index = torch.randint(EXPERTS, (9, TOP_K), device="cuda")
    weights = torch.rand(9, TOP_K, device="cuda", dtype=torch.float16)
    got = ops.experts(x, gate_up, down, index, weights, addend=addend, **biases)
    assert close(got, expected(x, gate_up, down, index, weights, **biases, gate=Gate.SILU) + addend.double())


@pytest.mark.usefixtures("schedule")
def test_what_no_kernel_takes_goes_an_expert_at_a_time() -> None:
    gate_up, down, biases = layer(BY_ROWS, None, torch.float16, "16bit", 512, 252)
    assert "do not start on 16 bytes" in grouped.obstacle(torch.empty(1, 512, device="cuda").half(), gate_up, down)
    x = torch.randn(9, 512, device="cuda", dtype=torch.float16)
    index = torch.randint(EXPERTS, (9, TOP_K), device="cuda")
    weights = torch.rand(9, TOP_K, device="cuda")
    got = ops.experts(x, gate_up, down, index, weights, gate=Gate.CLAMPED, **biases)
    assert close(got, expected(x, gate_up, down, index, weights, **biases, gate=Gate.CLAMPED))


def test_gradients_are_those_of_decoded_weights() -> None:
    gate_up, down, biases = layer(BY_ROWS, None, torch.float16, "16bit", 256, 128)
    x = torch.randn(6, 256, device="cuda", dtype=torch.float16, requires_grad=True)
    index = torch.randint(EXPERTS, (6, TOP_K), device="cuda")
    weights = torch.rand(6, TOP_K, device="cuda", requires_grad=True)
    ops.experts(x, gate_up, down, index, weights, **biases).float().sum().backward()
    plain, same = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    stream = [weight.to_layout(STREAM) for weight in (gate_up, down)]
    wide = {name: bias.double() for name, bias in biases.items()}
    ops.experts(plain, stream[0], stream[1], index, same, **wide).sum().backward()
    for one, other in ((x, plain), (weights, same)):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad.double(), other.grad, rtol=0.02, atol=0.02 * float(other.grad.abs().max()))
