"""How long must a workload take? What has to be multiplied and read for it, whatever the order of its requests.

Tensor cores and memory work beside each other, so a run takes at least as long as the busier of the two alone: the
roofline model (Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009) of a whole run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from tersor.bench import latency
from tersor.bench.workloads import Workload
from tersor.engine import groups
from tersor.engine.prefix_tree import Integers
from tersor.engine.runner import Runner
from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.models.config import DecoderConfig
from tersor.models.expected import Expected
from tersor.models.names import NAMES

METHOD = (
    "roofline: the longer of two times that a workload takes at least. Of the tensor cores: the operations of linears, "
    "over the datasheet's peak for the activations, and of attention, over that for 16 bits; every prefix that prompts "
    "share is computed once; logits, and what the last layer does behind its attention, are made where tokens are "
    "drawn alone. Of the memory: weights read once a step, in the fewest steps that the rows of a step allow (of "
    "experts those expected to be hit by uniform routing), and keys and values that steps read to decode, those of a "
    "shared prefix once a step for all its requests (in layers with a window only what is not shared), over the "
    "bandwidth of a large read in the same run"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a workload makes a model do at least.

    Attributes:
        linear_operations: of linears; a multiplication and an addition are two.
        attention_operations: of products of queries, keys, and values, likewise.
        steps: in which all tokens can be drawn.
        weight_bytes, kv_bytes: that these steps read.
    """

    linear_operations: int
    attention_operations: int
    steps: int
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What a machine does at most.

    Attributes:
        linear_peak, attention_peak: of the tensor cores, in operations a second.
        bandwidth: of a large read, in bytes a second.
    """

    linear_peak: float
    attention_peak: float
    bandwidth: float

    @staticmethod
    def of(chip: Chip, activations: Activations, bandwidth: float) -> Speeds:
        """Return those of a chip.

        Args:
            chip: its datasheet.
            activations: what weights are multiplied with.
            bandwidth: that was measured.
        """
        eight = activations.bits == 8 and chip.fp8_ops  # where the tensor cores have none, 16 bits are multiplied
        return Speeds(
            linear_peak=chip.fp8_ops if eight else chip.fp16_ops, attention_peak=chip.fp16_ops, bandwidth=bandwidth
        )

    def seconds(self, work: Work) -> float:
        """Return the least time of some work."""
        cores = work.linear_operations / self.linear_peak + work.attention_operations / self.attention_peak
        return max(cores, (work.weight_bytes + work.kv_bytes) / self.bandwidth)


def work(load: Workload, runner: Runner, max_rows: int) -> Work:
    """Return what a workload makes a model do at least.

    Args:
        load: what is asked; of every answer all tokens but the last are read again, to draw the next one.
        runner: of the model, with its pages.
        max_rows: rows of a step at most.
    """
    decoder = runner.decoder
    config = decoder.config
    texts = _Texts.of(load, max_rows)
    logits = len(load.prompts) + texts.decoded
    steps = max(-(-logits // max_rows), int(load.outputs.max()))
    everywhere, drawing = _weights(config)
    value = None if config.latent is None else config.latent.value
    attention, kv = 0, 0
    forms = [layer.attention for layer in config.layers]
    tokens = [latency.token_bytes(form, cache) for form, cache in zip(forms, runner.caches, strict=True)]
    for (form, token), count in Counter(zip(forms, tokens, strict=True)).items():
        channels = form.head_dim + (form.head_dim if value is None else value)
        attention += count * 2 * form.heads * channels * texts.pairs(form.window)
        kv += count * token * texts.read(form.window)
    dense = latency.step_bytes(decoder, 0)
    experts = latency.step_bytes(decoder, max_rows) - dense  # of a full step: fewer rows hit more of them a row
    return Work(
        linear_operations=2 * (everywhere * (texts.computed + texts.decoded) + drawing * logits),
        attention_operations=attention,
        steps=steps,
        weight_bytes=steps * dense + round(logits / max_rows * experts),
        kv_bytes=kv,
    )


def _weights(config: DecoderConfig) -> tuple[int, int]:
    """Return how many weights a token is multiplied with, and how many more one after which another is drawn."""
    names, last = NAMES[config.architecture], len(config.layers) - 1
    outside = (names.head, names.base + names.embedding)
    of_layer = names.base + names.layer.format(layer=last)
    latent = (names.query, names.query_down, names.query_up, names.key_value_down, names.key_value_up)
    ahead = {of_layer + module for module in (*names.qkv, *latent)}
    layers = drawing = 0
    for module, shape in Expected.of(config, names).matrices.items():
        weights = 0 if module in outside else int(np.prod(shape))
        if module.startswith(of_layer) and module not in ahead:
            drawing += weights
        else:
            layers += weights
    for number, experts in enumerate(layer.experts for layer in config.layers):
        if experts is not None:
            idle = (experts.count - experts.top_k) * 3 * experts.ffn * config.hidden
            layers, drawing = layers - idle * (number != last), drawing - idle * (number == last)
    return layers, drawing + config.vocabulary * config.hidden


@dataclass(frozen=True, slots=True)
class _Texts:
    """Texts in pieces that are computed once: prefixes that prompts share, each without the one above it, and the rest.

    Attributes:
        tops, ends: int64 [V]: where the shared pieces begin and end in a text.
        reads: int64 [V]: steps that read them, at least.
        firsts, lengths: int64 [N]: where a prompt's own piece begins and ends.
        later: int64 [N]: tokens drawn after the first one, by each continuation.
        samples: continuations of a prompt.
    """

    tops: Integers
    ends: Integers
    reads: Integers
    firsts: Integers
    lengths: Integers
    later: Integers
    samples: int

    @staticmethod
    def of(load: Workload, max_rows: int) -> _Texts:
        plan = groups.plan(load.prompts, load.outputs, page=1)
        later = plan.outputs - 1
        reads = []
        for first, stop in zip(plan.firsts[1:].tolist(), plan.stops[1:].tolist(), strict=True):
            members = later[first:stop]
            reads.append(max(int(members.max()), -(-load.samples * int(members.sum()) // max_rows)))
        return _Texts(
            tops=plan.depths[plan.parents[1:]],
            ends=plan.depths[1:],
            reads=np.array(reads, dtype=np.int64),
            firsts=plan.depths[plan.nodes],
            lengths=plan.lengths,
            later=later,
            samples=load.samples,
        )

    @property
    def computed(self) -> int:
        """Prompt tokens that are computed."""
        return int((self.ends - self.tops).sum() + (self.lengths - self.firsts).sum())

    @property
    def decoded(self) -> int:
        """Drawn tokens that are read again, to draw the next one."""
        return self.samples * int(self.later.sum())

    def pairs(self, window: int | None) -> int:
        """Return of how many tokens the computed and decoded ones see the keys and values, themselves included."""
        shared = _seen(self.ends, window) - _seen(self.tops, window)
        own = _seen(self.lengths, window) - _seen(self.firsts, window)
        drawn = _seen(self.lengths + self.later, window) - _seen(self.lengths, window)
        return int(shared.sum() + own.sum()) + self.samples * int(drawn.sum())

    def read(self, window: int | None) -> int:
        """Return of how many tokens decoded ones have the keys and values read, themselves included."""
        drawn = _seen(self.later, window)
        own = self.lengths - self.firsts
        beside = _seen(own + self.later, window) - _seen(own, window) - drawn  # of a prompt: once for continuations
        total = int(beside.sum()) + self.samples * int(drawn.sum())
        return total if window is not None else total + int((self.reads * (self.ends - self.tops)).sum())


def _seen(count: Integers, window: int | None) -> Integers:
    """Return the sum of what the first `count` tokens of a text see, of which each sees those up to itself."""
    near = count if window is None else np.minimum(count, window)
    whole = near * (near + 1) // 2
    return whole if window is None else whole + (count - near) * window
