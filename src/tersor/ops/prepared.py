"""What stays the same from call to call: a weight's kind, and for each number of tokens a plan that is ready to run.

Neither knows an address, so nothing has to be undone when a tensor moves; both are safe in any number of threads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

import torch

from tersor.errors import ShapeError
from tersor.formats import Scheme
from tersor.kernels import tune
from tersor.layouts import STREAM, PackedWeight, decode_groups, stream, tiles
from tersor.ops import dispatch, invariance, measuring

if TYPE_CHECKING:
    from tersor.kernels.dense import FusedLaunch, QuantizeLaunch

_MOST_PLANS = 256
"""Plans that a kind keeps: beyond that it starts anew."""

Key: TypeAlias = tuple[int, torch.dtype, int, bool, bool, bool]
"""Tokens, dtype of activations, CUDA device (-1: none), whether rows of activations start on 16 bytes, whether the
linear is gated, whether it is batch-invariant."""


class Plan:
    """How calls of one kind, dtype, device and number of tokens are served.

    Attributes:
        decision: who serves them.
        launch: of a fused kernel, else `None`.
        quantize: of the kernel that makes activations 8-bit before that, else `None`.
        codes_stride: bytes from one token's 8-bit activations to the next; zero without `quantize`.
        floats, counters: what its splits exchange; zero without splits.
        tokens: that one call takes, where it takes several calls; else 0.
    """

    __slots__ = ("codes_stride", "counters", "decision", "floats", "launch", "quantize", "tokens")

    def __init__(self, decision: dispatch.Decision) -> None:
        self.decision = decision
        self.launch: FusedLaunch | None = None
        self.quantize: QuantizeLaunch | None = None
        self.floats = self.counters = self.codes_stride = 0
        self.tokens = decision.tokens


class Kind:
    """What weights have in common that are multiplied in the same way.

    Attributes:
        scheme, oc, ic, layout: as in `PackedWeight`.
        words: int32 elements of the packed weight.
        factor: what decoded sums are multiplied by in a kernel layout, beside the scales.
        plans: those made so far.
    """

    __slots__ = ("factor", "ic", "layout", "oc", "plans", "scheme", "words")

    def __init__(self, scheme: Scheme, oc: int, ic: int, layout: str) -> None:
        self.scheme = scheme
        self.oc = oc
        self.ic = ic
        self.layout = layout
        if layout == STREAM:
            self.words = oc * stream.row_words(ic, scheme.format.bits)
            self.factor = 1.0
        else:
            self.words = tiles.row_blocks(oc) * tiles.column_blocks(ic) * 64 * scheme.format.bits
            self.factor = math.ldexp(1.0, decode_groups.decode_group(scheme.format, tiles.LAYOUTS[layout]).exponent)
        self.plans: dict[Key, Plan] = {}

    def check(self, data: torch.Tensor) -> None:
        """Raise ShapeError where packed codes are not those of such a weight."""
        if data.numel() != self.words or data.dtype != torch.int32:
            raise ShapeError(
                f"linear: the packed weight has {data.numel()} elements of {data.dtype}, expected {self.words} int32 "
                f"words for [{self.oc}, {self.ic}] in {self.scheme.name} ({self.layout})"
            )

    def plan(self, key: Key) -> Plan:
        """Return the plan for a key, made at its first use; compiles and loads the kernel it needs."""
        if measuring.current().config is not None:
            return self._make(*key)  # a measurement's plan is not kept
        plan = self.plans.get(key)
        if plan is None:
            plan = self._make(*key)
            if len(self.plans) >= _MOST_PLANS:
                self.plans.clear()
            self.plans[key] = plan
        return plan

    def _make(self, n: int, dtype: torch.dtype, index: int, aligned: bool, gated: bool, invariant: bool) -> Plan:
        device = torch.device("cpu") if index < 0 else torch.device("cuda", index)
        shape = (self.oc, self.ic)
        plan = Plan(dispatch.decide(self.scheme, self.layout, shape, n, dtype, device, aligned, invariant))
        config = plan.decision.config
        if config is not None and not plan.tokens:
            config = measuring.current().config or config
            plan.launch = self._fused(config, n, index, dtype, aligned, gated)
            if config.activation_bits == 8:
                plan.quantize, plan.codes_stride = self._quantize(n, index, dtype)
            if config.splits > 1 and not config.gathered:
                from tersor.kernels import dense as family

                plan.floats, plan.counters = family.parts(config, n)
        return plan

    def _quantize(self, n: int, index: int, dtype: torch.dtype) -> tuple[QuantizeLaunch, int]:
        from tersor.kernels import dense as family
        from tersor.kernels import jit

        target = dispatch.target_name(dtype)
        assert target is not None
        function = jit.get(family.quantize_source(target), index)
        return family.prepare_quantize(function, n=n, ic=self.ic), family.codes_stride(self.ic)

    def _fused(
        self, config: tune.LinearConfig, n: int, index: int, dtype: torch.dtype, aligned: bool, gated: bool
    ) -> FusedLaunch:
        from tersor.kernels import dense as family
        from tersor.kernels import jit

        target = dispatch.target_name(dtype)
        assert target is not None
        function = jit.get(family.fused_source(self.scheme, target, config, gated), index)
        return family.prepare_fused(
            function,
            config,
            bf16=target == "bfloat16",
            oc=self.oc,
            ic=self.ic,
            n=n,
            aligned=aligned,
            factor=self.factor,
        )


_kinds: dict[tuple[str, int, int, str], Kind] = {}


def kind(scheme: str, oc: int, ic: int, layout: str) -> Kind:
    """Return the one kind of these weights; `scheme` is `Scheme.key()`."""
    key = (scheme, oc, ic, layout)
    found = _kinds.get(key)
    if found is None:
        found = _kinds.setdefault(key, Kind(Scheme.from_key(scheme), oc, ic, layout))
    return found


def kind_of(weight: PackedWeight) -> Kind:
    """Return a weight's kind, which the weight keeps.

    Raises:
        ShapeError: its packed codes are not as many as its shape asks for.
    """
    found: Kind | None = getattr(weight, "note", None)
    if found is None:
        found = kind(weight.scheme.key(), *weight.shape, weight.layout)
        found.check(weight.data)
        object.__setattr__(weight, "note", found)  # not part of the frozen value
    return found


def forget() -> None:
    """Drop every plan and read the environment anew: for who changes it, or a chooser, while it runs."""
    dispatch.forget()
    invariance.forget()
    for found in list(_kinds.values()):
        found.plans.clear()
