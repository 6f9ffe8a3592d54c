"""How many bytes has a rank to hold? Weights, keys and values, activations and buffers, for every stage and phase."""

from __future__ import annotations

from collections.abc import Sequence

from tersor.hardware import Chip
from tersor.planner.blocks import EMBEDDING, HEAD, Replica
from tersor.planner.parts import PLAIN_BYTES
from tersor.planner.plan import Memory
from tersor.planner.problem import Choice
from tersor.planner.ways import ALL, CHANNELS, Phase, Setting

USABLE = 0.98
"""Of a device's memory, what a driver leaves."""
PROCESS = 3_500_000_000
"""Bytes that a process has beside tensors: context, kernels, graphs, fragments (aiconfigurator, h200_sxm: `other`)."""
COLLECTIVES = 392_000_000
"""Bytes of the buffers of collectives, where there are any (aiconfigurator, h200_sxm: NCCL, 8 GPUs)."""
_STREAMS = 3
"""Activations of [tokens, hidden] that live at once: the residual, what a block reads and what it gives."""


def room(chip: Chip) -> int:
    """Return the bytes of a device that a plan may use."""
    return int(chip.memory_bytes * USABLE)


def buffers(setting: Setting) -> int:
    """Return the bytes of a rank that are neither weights nor keys and values nor activations."""
    alone = setting.axes.tensor * setting.axes.pipeline * setting.axes.expert == 1
    return PROCESS + (0 if alone else COLLECTIVES)


def activations(setting: Setting, phase: Phase, choice: Choice | None = None, replica: Replica | None = None) -> int:
    """Return the bytes of activations that a rank has at once in a pass; of whole layouts where nothing is chosen."""
    hidden, widest = setting.model.hidden, 0
    for kind in setting.model.kinds:
        heads = sum(weight.oc for weight in kind.qkv)
        shared = kind.experts.shared_ffn if kind.experts else 0
        inner = kind.ffn if kind.experts is None else kind.experts.top_k * (kind.experts.ffn + hidden) + shared
        for width, block in ((heads, "qkv"), (inner, "experts" if kind.experts else "gate_up")):
            ranks = 1
            if choice is not None and replica is not None:
                way = replica.way(choice, f"{phase.name}.{kind.name}.{block}")
                ranks = 1 if way.gives in (ALL, CHANNELS) else setting.ranks
            widest = max(widest, -(-width // ranks))
    return PLAIN_BYTES * phase.tokens * (_STREAMS * hidden + widest)


def logits(setting: Setting, phases: Sequence[Phase]) -> int:
    """Return the bytes of the logits that a step has; those of all ranks come side by side, and then as one."""
    rows = max(phase.rows for phase in phases)
    return rows * setting.model.vocabulary * PLAIN_BYTES * (1 if setting.ranks == 1 else 2)


def reserve(setting: Setting, phases: Sequence[Phase]) -> int:
    """Return the bytes that are no weights, keys and values, at the most."""
    most = max(activations(setting, phase) for phase in phases)
    return buffers(setting) + most + logits(setting, phases)


def item_bytes(replica: Replica, choice: Choice) -> list[list[int]]:
    """Return for every rank the bytes of weights, keys and values of embedding, layers and output, in order."""
    setting, model = replica.setting, replica.setting.model
    phase = next(iter(replica.weights))
    found: list[list[int]] = []
    held = [
        [replica.way(choice, name) for name, place in replica.places.items() if (place.phase.name, place.group) == of]
        for of in ((phase, kind.name) for kind in model.kinds)
    ]
    first, last = (replica.way(choice, f"{phase}.{name}") for name in (EMBEDDING, HEAD))
    counted = replica.held_bytes(f"{phase}.{HEAD}")
    for rank in range(setting.ranks):
        of_kind = [
            PLAIN_BYTES * kind.vectors + sum(way.weight_bytes[rank] + way.kv[rank] for way in ways)
            for kind, ways in zip(model.kinds, held, strict=True)
        ]
        layers = [of_kind[number] for number in model.layers]
        behind = (last.weight_bytes[rank] if counted else 0) + PLAIN_BYTES * model.vectors
        found.append([first.weight_bytes[rank], *layers, behind])
    return found


def of_stage(
    replica: Replica,
    choice: Choice,
    phases: Sequence[Phase],
    items: list[list[int]],
    span: tuple[int, int],
    ends: tuple[bool, bool],
    chip: Chip,
) -> tuple[Memory, ...]:
    """Return the memory of every rank of a stage.

    Args:
        replica, choice: what was chosen.
        phases: what passes compute.
        items: `item_bytes` of the choice.
        span: layers of the stage, the last not included.
        ends: whether it has the embedding, and the head.
        chip: whose memory it is.
    """
    setting, model = replica.setting, replica.setting.model
    most = max(activations(setting, phase, choice, replica) for phase in phases)
    found: list[Memory] = []
    first, last = span
    phase = next(iter(replica.weights))
    for rank in range(setting.ranks):
        total = sum(items[rank][1 + first : 1 + last])
        total += (items[rank][0] if ends[0] else 0) + (items[rank][-1] if ends[1] else 0)
        kv = sum(
            replica.way(choice, f"{phase}.{model.kinds[number].name}.attention").kv[rank]
            for number in model.layers[first:last]
        )
        found.append(
            Memory(
                weights=total - kv,
                kv=kv,
                activations=most,
                logits=logits(setting, phases) if ends[1] else 0,
                buffers=buffers(setting),
                room=room(chip),
            )
        )
    return tuple(found)


def phases_of(setting: Setting, parts: int) -> list[Phase]:
    """Return the passes of a workload whose decode step is dealt out to so many micro-batches."""
    return [Phase.of(name, setting.workload, parts) for name in setting.workload.phases]
