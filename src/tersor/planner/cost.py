"""What does a rank's part of an operator take? Our own kernels by their predicted times, the rest by a roofline.

Packed products ask `kernels.tune`. Plain ones (cuBLAS), attention and small kernels have a few constants, fitted to
decode steps that `tersor bench latency` took on an H200 (`bench/planner_costs.py`); other chips have them in proportion
to their datasheets.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tersor.formats import Activations, Scheme
from tersor.hardware import CHIPS, Chip
from tersor.kernels import tune
from tersor.kernels.tune import experts as tune_experts
from tersor.kernels.tune import forecast
from tersor.layouts.packing import Packing, target_of, unsupported_reason

Levels = Sequence[tuple[Scheme | None, int]]
"""Schemes of the rows of a product and how many rows have each; `None` is plain."""

READ = 4.39e12 / CHIPS["NVIDIA H200"].bandwidth
"""Of the datasheet's bandwidth, what a large read gets (`read_bandwidth` of bench/results/latency_h200.json)."""
LAYER = 8.76e-6
"""Seconds a layer of a decode step takes beside products and the bytes of keys and values: two norms (`NORM`), rotary,
append, splits and merge of attention, and gaps between launches."""
NORM = 1.0e-6
"""Seconds of a norm of few rows (engine.md 2.2: 1.0 us each at batch 1 to 8)."""
HEAD_TOKEN = 10.19e-12
"""Seconds that attention takes for each token of each kv head of each row, beside its bytes."""
SUSTAINED = 0.367
"""Of the time that a packed product's operations take at the datasheet's peak, what is added while a whole step heats
the chip: predicted times are of launches alone. Like `LAYER` and `HEAD_TOKEN` it is fitted to Llama-3-8B and OPT-30B in
FP6, and predicts Llama-2-70B."""
CUBLAS_START, CUBLAS_PEAK = 6.0e-6, 0.70
"""Seconds that a plain product takes beside its bytes or operations, and the part of the peak it gets (measured on an
H200, 64 times of `cublas` in bench/results/linear_h200.json, within 6 % in the mean)."""
ATTENTION_PEAK = 0.55
"""Of the peak, what causal attention of a prompt gets (flash attention on Hopper; not measured for ours)."""
SAMPLE_ROW = 0.25e-12
"""Seconds for each logit of each row that is drawn from."""
_FITTED = "fitted to bench/results/latency_h200*.json"


@dataclass(frozen=True, slots=True)
class Timed:
    """A time, and where it comes from.

    Attributes:
        seconds: of one call, or of one layer's part.
        source: how it was found.
    """

    seconds: float
    source: str

    def __add__(self, other: Timed) -> Timed:
        sources = dict.fromkeys(one.source for one in (self, other) if one.source)
        return Timed(self.seconds + other.seconds, "; ".join(sources))


ZERO = Timed(0.0, "")


class Kernels:
    """Predicts what runs on one chip with 16-bit activations.

    Attributes:
        chip: the GPU.
        bandwidth: bytes per second that a large read gets.
        scale: by how much longer than on an H200 what is fitted takes.
    """

    def __init__(self, chip: Chip, dtype: torch.dtype = torch.bfloat16) -> None:
        """Take the chip and the dtype of activations."""
        known = CHIPS["NVIDIA H200"]
        self.chip, self.bandwidth = chip, chip.bandwidth * READ
        self.scale = known.bandwidth / chip.bandwidth
        self._target = target_of(Activations.NATIVE, dtype) or "bfloat16"
        self._dtype = dtype
        on = "" if chip.capability == known.capability else f" of an H200, times {self.scale:.3g} for {chip.name}"
        self._fitted = _FITTED + on
        self._product = functools.lru_cache(maxsize=65536)(self._product_of)
        self._experts = functools.lru_cache(maxsize=65536)(self._experts_of)

    def product(self, levels: Levels, ic: int, tokens: int) -> Timed:
        """Return what a product of so many tokens takes with rows of these levels, as one launch.

        Args:
            levels: schemes and rows; plain rows are a product of their own.
            ic, tokens: sizes.
        """
        if not tokens or not ic:
            return ZERO
        packed = tuple((scheme, rows) for scheme, rows in levels if scheme is not None and rows)
        plain = sum(rows for scheme, rows in levels if scheme is None)
        found = self._product(packed, ic, tokens) if packed else ZERO
        return found + self._plain(plain, ic, tokens) if plain else found

    def _product_of(self, levels: tuple[tuple[Scheme, int], ...], ic: int, tokens: int) -> Timed:
        rows = sum(count for _, count in levels)
        names = "+".join(scheme.key() for scheme, _ in levels)
        words = f"{names} [{rows}, {ic}] x {tokens} tokens"
        if any(unsupported_reason(scheme, self._target) for scheme, _ in levels):
            return self._decoded(levels, ic, tokens, f"{words}, which no kernel decodes")
        problems = [
            tune.LinearProblem.of(Packing.of(scheme, self._target), (count, ic), tokens) for scheme, count in levels
        ]
        if not all(tune.fused(problem, self.chip) for problem in problems):
            return self._decoded(levels, ic, tokens, words)
        seconds = forecast.linear_seconds(problems, self.chip)
        seconds += SUSTAINED * 2 * rows * ic * tokens / self.chip.fp16_ops
        return Timed(seconds, f"kernels.tune for {self.chip.name}: {words}")

    def _decoded(self, levels: tuple[tuple[Scheme, int], ...], ic: int, tokens: int, words: str) -> Timed:
        """Return the time where weights are decoded for cuBLAS ahead of the product."""
        rows = sum(count for _, count in levels)
        read = sum(scheme.bits_per_weight(ic) * count * ic / 8 for scheme, count in levels)
        decoded = (read + 2 * rows * ic) / self.bandwidth
        plain = self._plain(rows, ic, tokens)
        return Timed(decoded + plain.seconds, f"{words}, decoded for cuBLAS; {plain.source}")

    def _plain(self, rows: int, ic: int, tokens: int) -> Timed:
        seconds = max(
            2 * (rows * ic + tokens * (rows + ic)) / self.bandwidth,
            2 * rows * ic * tokens / (self.chip.fp16_ops * CUBLAS_PEAK),
        )
        source = f"roofline of cuBLAS: 16-bit [{rows}, {ic}] x {tokens} tokens, + {CUBLAS_START * 1e6:.0f} us"
        return Timed(seconds + CUBLAS_START, source)

    def experts(
        self,
        ups: Levels,
        downs: Levels,
        sizes: tuple[int, int],
        copies: int,
        top_k: int,
        tokens: int,
    ) -> Timed:
        """Return what both products of the experts of a rank take, routing included.

        Args:
            ups, downs: schemes and rows of one expert's first and second weight.
            sizes: input channels of the first and of the second.
            copies: experts that the rank has.
            top_k: of them, how many a token goes to.
            tokens: that go to any of them.
        """
        if not tokens or not copies:
            return ZERO
        return self._experts(tuple(ups), tuple(downs), sizes, copies, min(top_k, copies), tokens)

    def _experts_of(
        self, ups: Levels, downs: Levels, sizes: tuple[int, int], copies: int, top_k: int, tokens: int
    ) -> Timed:
        words = f"{copies} experts, {top_k} of them a token, x {tokens} tokens"
        packed = all(
            scheme is not None and not unsupported_reason(scheme, self._target) for scheme, _ in (*ups, *downs)
        )
        if packed:
            sets = [
                tuple(
                    tune_experts.ExpertsProblem.of(Packing.of(scheme, self._target), (copies, rows, ic), tokens, top_k)
                    for scheme, rows in levels
                    if scheme is not None and rows
                )
                for levels, ic in zip((ups, downs), sizes, strict=True)
            ]
            seconds = forecast.experts_seconds(sets[0], sets[1], self.chip)
            return Timed(seconds, f"kernels.tune for {self.chip.name}: {words}")
        hit = copies * (1 - (1 - top_k / copies) ** tokens)
        weights = sum(
            (16 if scheme is None else scheme.bits_per_weight(ic)) / 8 * rows * ic
            for levels, ic in zip((ups, downs), sizes, strict=True)
            for scheme, rows in levels
        )
        ops = sum(2 * rows * ic for levels, ic in zip((ups, downs), sizes, strict=True) for _, rows in levels)
        seconds = max(hit * weights / self.bandwidth, top_k * tokens * ops / (self.chip.fp16_ops * CUBLAS_PEAK))
        return Timed(
            seconds + 2 * CUBLAS_START, f"roofline of a grouped product, {words}, {hit:.1f} expected to be hit"
        )

    def attention(self, rows: int, length: int, kv_heads: int, kv_bytes: float) -> Timed:
        """Return what attention of a decode step takes in one layer, with rotary and append.

        Args:
            rows: of the step.
            length: tokens of each text that are seen.
            kv_heads: of this rank.
            kv_bytes: of keys and values that are read.
        """
        seconds = (LAYER - 2 * NORM) + rows * length * kv_heads * HEAD_TOKEN * self.scale + kv_bytes / self.bandwidth
        return Timed(seconds, f"attention of {rows} rows, {length} tokens, {kv_heads} kv heads: {self._fitted}")

    def prompt_attention(self, prompts: int, length: int, heads: int, head_dim: int, window: int) -> Timed:
        """Return what causal attention of whole prompts takes in one layer."""
        seen = length * (length + 1) / 2 if not window or window >= length else window * (length - window / 2)
        ops = 4 * prompts * heads * head_dim * seen
        seconds = LAYER - 2 * NORM + ops / (self.chip.fp16_ops * ATTENTION_PEAK)
        return Timed(seconds, f"roofline of attention of {length} tokens: {ATTENTION_PEAK:.0%} of the peak, assumed")

    def norm(self, tokens: int, hidden: int) -> Timed:
        """Return what a norm and the residual's sum take."""
        nbytes = 2 * 4 * tokens * hidden  # x, the residual and the sum, and what the norm gives
        seconds = NORM + (nbytes / self.bandwidth if nbytes > self.chip.l2_bytes / 2 else 0.0)
        return Timed(seconds, f"norm of {tokens} tokens: {NORM * 1e6:.0f} us, and bytes where L2 does not hold them")

    def lookup(self, tokens: int, hidden: int) -> Timed:
        """Return what fetching embeddings takes."""
        return Timed(NORM + 4 * tokens * hidden / self.bandwidth, f"bytes of {tokens} embeddings")

    def sample(self, rows: int, vocabulary: int) -> Timed:
        """Return what drawing a token of every row takes."""
        seconds = rows * vocabulary * SAMPLE_ROW * self.scale
        return Timed(seconds, f"{rows} rows of {vocabulary} logits: {self._fitted}")


def busiest(pairs: float, ranks: int, most: float) -> float:
    """Return how many of `pairs` of tokens and experts the busiest of so many ranks gets where routing is uniform.

    The largest of n nearly normal shares is about sqrt(2 ln n) standard deviations above their mean.

    Args:
        pairs: in all.
        ranks: n.
        most: that one rank can get.
    """
    if ranks == 1:
        return pairs
    mean = pairs / ranks
    return min(most, mean + math.sqrt(2 * math.log(ranks) * mean * (1 - 1 / ranks)))
