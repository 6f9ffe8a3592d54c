"""Ranks that are processes, which run spread modules over gloo and say how far they are from the whole module."""

from __future__ import annotations

import functools
import multiprocessing
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from helpers.graph_models import Gpt, Mixture, Mlp, Skips, Towers, Unet
from tersor.hardware import chip_named
from tersor.nn.spread import Spread
from tersor.nn.staged import Staged
from tersor.planner.graph.ir import Graph
from tersor.planner.graph.moves import Axis, Ring
from tersor.planner.graph.pipeline import plan_stages
from tersor.planner.graph.problem import Space, space
from tersor.planner.graph.roofline import Roofline
from tersor.planner.graph.trace import trace
from tersor.planner.graph.training import training
from tersor.planner.problem import Choice

IDS = (torch.arange(32) * 7 % 13).view(4, 8)


@dataclass(frozen=True)
class Distance:
    """How far a spread module is from the whole one.

    Attributes:
        case: which.
        outputs: largest difference of an output.
        gradients: of a parameter's gradient.
        parameters: of a parameter after two steps with momentum (Adam would make much of gradients that are rounding).
        share: numbers of parameters that the rank holds, of all.
        cut: names of options of blocks that are cut.
    """

    case: str
    outputs: float
    gradients: float
    parameters: float
    share: float
    cut: tuple[str, ...]


def model_of(case: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """Return the module and the inputs of a case."""
    torch.manual_seed(1)
    name = case.split()[0]
    if name == "gpt":
        return Gpt(52, 32, 4, 1, 8), (IDS, IDS.roll(-1, 1))
    if name == "towers":
        return Towers(52, 32, 4, 8), (IDS, IDS.roll(-1, 1))
    if name == "skips":
        return Skips(16), (torch.randn(8, 16),)
    if name == "odd":
        return Gpt(53, 30, 5, 1, 8), (IDS, IDS.roll(-1, 1))
    if name == "mixture":
        return Mixture(16, 32, 4, 16), (torch.randn(32, 16),)
    if name == "unet":
        return Unet(), (torch.randn(4, 3, 8, 8),)
    return Mlp(16, 32, 16), (torch.randn(8, 16),)


@functools.cache
def graph_of(name: str) -> Graph:
    """Return the graph of a training step of a case's module."""
    module, inputs = model_of(name)
    return training(trace(module, inputs))


MEGATRON = {
    "qkv": "tensor:out.1",
    "attention": "tensor:heads",
    "o:": "tensor:in.0",
    "up": "tensor:out",
    "down": "tensor:in",
    "head": "tensor:out",
    "tokens": "tensor:vocabulary",
}
"""Parts of the names of blocks, and the option that each gets."""


def choice_of(spread: Space, case: str) -> Choice:
    """Return the options that a case asks for: the words behind its name are looked for in options, best first."""
    words = case.split()[1:]
    picked = {}
    for number, block in enumerate(spread.problem.blocks):
        if words == ["random"]:
            generator = torch.Generator().manual_seed(number)
            picked[block.name] = int(torch.randint(len(block.options), (1,), generator=generator))
            continue
        if words == ["megatron"]:
            wanted = next((option for part, option in MEGATRON.items() if part in block.name), block.options[0])
            found = [index for index, option in enumerate(block.options) if option.startswith(wanted)]
            picked[block.name] = found[0]
            continue
        picked[block.name] = next(
            (block.options.index(option) for word in words for option in block.options if word in option), 0
        )
    return Choice(picked)


def distance(case: str, shape: tuple[int, ...]) -> Distance:
    """Return how far this rank is in two steps of training, of whatever options the case asks for."""
    module, inputs = model_of(case)
    names = ("data", "tensor")[-len(shape) :]
    axes = tuple(Axis(name, ranks, Ring(1e-6, 1e10)) for name, ranks in zip(names, shape, strict=True))
    every = "+" in case or case.startswith("mlp")  # what another option beats is run, too
    ways = space(graph_of(case.split()[0]), axes, Roofline(chip_named("h200")), every=every)
    choice = choice_of(ways, case)
    mine = Spread(module, ways, choice, init_device_mesh("cpu", shape, mesh_dim_names=names))
    largest: list[float] = [0.0, 0.0, 0.0]
    steps = [torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (module, mine)]
    for _ in range(2):
        outputs = [one(*inputs) for one in (module, mine)]
        for one in outputs:
            one.square().mean().backward()
        whole = {name: parameter.grad for name, parameter in module.named_parameters()}
        found = mine.whole_gradients()
        largest[0] = max(largest[0], _apart(outputs[0], outputs[1]))
        largest[1] = max([largest[1], *(_apart(whole[name], found[name]) for name in found)])
        assert {name for name, gradient in whole.items() if gradient is not None} == set(found)
        for step in steps:
            step.step()
            step.zero_grad()
    parameters = mine.whole_parameters()
    largest[2] = max(_apart(parameters[name], parameter) for name, parameter in module.named_parameters())
    held = sum(parameter.numel() for parameter in mine.parameters())
    share = held / sum(parameter.numel() for parameter in module.parameters())
    cut = tuple(option.name for option in ways.chosen(choice).values())
    return Distance(case, *largest, share, cut)


def staged_distance(case: str, shape: tuple[int, ...]) -> Distance:
    """Return how far this rank of a pipeline is in two steps of four micro-batches; moves are free, so all is cut."""
    _, name, stages = case.split()
    module, inputs = model_of(name)
    count = int(stages)
    axis = Axis("tensor", int(torch.tensor(shape).prod()) // count, Ring(0.0, float("inf")))
    batches = list(zip(*(one.chunk(4) for one in inputs), strict=True))
    plan = plan_stages(module, batches[0], stages=count, mesh=(axis,), parts=4, train=True)
    mine = Staged(module, plan, init_device_mesh("cpu", (count, axis.ranks), mesh_dim_names=("stage", "tensor")))
    largest = [0.0, 0.0, 0.0]
    squared = (lambda output: output.square().mean()) if name == "unet" else None
    with torch.no_grad():
        expected = [module(*batch) for batch in batches]
    for one, other in zip(mine(*batches), expected, strict=False):
        largest[0] = max(largest[0], _apart(one, other))
    steps = [torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (module, mine)]
    for _ in range(2):
        whole = module(*inputs)
        whole = squared(whole) if squared else whole
        whole.backward()
        losses = mine.step(*batches, loss=squared)
        if losses:
            largest[0] = max(largest[0], _apart(whole, sum(losses) / len(losses)))
        assert bool(losses) == mine.last
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        found = mine.own.whole_gradients()
        largest[1] = max([largest[1], *(_apart(gradients[name], found[name]) for name in found)])
        for step in steps:
            step.step()
            step.zero_grad()
    parameters, whole_ones = mine.own.whole_parameters(), dict(module.named_parameters())
    largest[2] = max(_apart(parameters[name], whole_ones[name]) for name in parameters)
    held = sum(parameter.numel() for parameter in mine.parameters())
    sent = tuple(f"{one} to {to}" for stage in plan.stages for one, to in stage.sends.items())
    return Distance(case, *largest, held / sum(one.numel() for one in module.parameters()), sent)


def _apart(one: Any, other: Any) -> float:
    return float((one.detach() - other.detach()).abs().max())


def _rank(rank: int, shape: tuple[int, ...], cases: tuple[str, ...], store: str, results: Any) -> None:
    torch.set_num_threads(1)
    ranks = int(torch.tensor(shape).prod())
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        results.put((rank, [(staged_distance if "stages" in case else distance)(case, shape) for case in cases]))
    except BaseException:
        results.put((rank, traceback.format_exc()))
    finally:
        distributed.destroy_process_group()


def distances(shape: tuple[int, ...], cases: tuple[str, ...], folder: Path, *, seconds: float = 120) -> list[Distance]:
    """Return the distances of all cases on all ranks."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = int(torch.tensor(shape).prod())
    store = str(folder / "store")
    processes = [
        context.Process(target=_rank, args=(rank, shape, cases, store, results), daemon=True) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=seconds) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    wrong = [of_rank for _, of_rank in found if isinstance(of_rank, str)]
    assert not wrong, wrong[0]
    return [one for _, of_rank in sorted(found, key=lambda pair: pair[0]) for one in of_rank]
