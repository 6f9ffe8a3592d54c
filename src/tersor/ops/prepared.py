"""What stays the same from call to call: a weight's type, and for each number of tokens a call that is ready to run.

Neither knows an address, so nothing has to be undone when a tensor moves; both are safe in any number of threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, TypeAlias

import torch

from tersor.errors import ShapeError
from tersor.formats import Activations, Scheme
from tersor.kernels import tune
from tersor.layouts import STREAM, PackedWeight, stream
from tersor.layouts.packing import LAYOUTS, Packing, target_of
from tersor.ops import dispatch, mode
from tersor.ops.quantizing import Quantize

if TYPE_CHECKING:
    from tersor.kernels.dense import FusedLaunch

FEW_TOKENS = 256
"""Up to so many tokens a prepared call is kept for good: those are decode steps, of which there are so many at most."""
_NORM_STEP = 4
"""Beyond `Mode.key`."""
_OUTLIERS_STEP = 4 * _NORM_STEP
"""Beyond what is folded in of norms."""
_MOST_LONG = 1024
"""Prepared calls of more tokens that a weight type keeps; the least recently used goes first."""

Key: TypeAlias = tuple[int, torch.dtype, int, bool, int, int]
"""Tokens, dtype of activations, CUDA device (-1: none), whether rows of activations start on 16 bytes, how gate and
up become one or 0, `mode_key`."""


def mode_key(now: mode.Mode, norm: int, outliers: int = 0) -> int:
    """Return `Mode.key` with what is folded into the kernel of norms (`kernels.dense.Norm`); 0 adds nothing.

    Args:
        now: the mode.
        norm: see above.
        outliers: rounds of outliers that a block has room for (`kernels.dense.sm90_source`), or 0.
    """
    return now.key + _NORM_STEP * norm + _OUTLIERS_STEP * outliers


class Prepared:
    """How calls of one weight type, dtype, device and number of tokens are served.

    Attributes:
        decision: who serves the calls.
        launch: launches the fused kernel; `None` where another serves.
        quantize: quantises activations before that; `None` where they stay as they come.
        floats, counters: float32 sums and counters that the kernel's splits exchange; zero without splits.
        tokens: most tokens of one launch, where a call takes several launches; else 0.
    """

    __slots__ = ("counters", "decision", "floats", "launch", "quantize", "tokens")

    def __init__(self, decision: dispatch.Decision) -> None:
        self.decision = decision
        self.launch: FusedLaunch | None = None
        self.quantize: Quantize | None = None
        self.floats = self.counters = 0
        self.tokens = decision.tokens


class WeightType:
    """What dense packed weights have in common that are multiplied in the same way.

    Attributes:
        scheme, oc, ic, layout: as in `PackedWeight`.
        packing: the scheme in kernel tiles; `None` in the stored stream.
        words: int32 elements of the packed codes.
        factor: what decoded sums are multiplied by in a kernel layout, beside the scales.
    """

    __slots__ = ("_few", "_guard", "_long", "factor", "ic", "layout", "oc", "packing", "scheme", "words")

    def __init__(self, scheme: Scheme, oc: int, ic: int, layout: str) -> None:
        self.scheme = scheme
        self.oc = oc
        self.ic = ic
        self.layout = layout
        self.packing: Packing | None = None
        if layout == STREAM:
            self.words = oc * stream.row_words(ic, scheme.format.bits)
            self.factor = 1.0
        else:
            self.packing = Packing.of(scheme, LAYOUTS[layout])
            self.words = self.packing.words((oc, ic))
            self.factor = self.packing.factor
        self._few: dict[Key, Prepared] = {}
        self._long: OrderedDict[Key, Prepared] = OrderedDict()
        self._guard = threading.Lock()

    def check(self, data: torch.Tensor) -> None:
        """Raise ShapeError where packed codes are not those of such a weight."""
        if data.numel() != self.words or data.dtype != torch.int32:
            raise ShapeError(
                f"linear: the packed weight has {data.numel()} elements of {data.dtype}, expected {self.words} int32 "
                f"words for [{self.oc}, {self.ic}] in {self.scheme.name} ({self.layout})"
            )

    def prepared(self, key: Key, now: mode.Mode) -> Prepared:
        """Return the prepared call for a key, made at its first use; compiles and loads the kernel it needs."""
        if now.config is not None:
            return self._make(key, now.config)  # a measurement's is not kept
        found = self._few.get(key)
        return self._find(key) if found is None else found

    def _find(self, key: Key) -> Prepared:
        if key[0] <= FEW_TOKENS:
            return self._few.setdefault(key, self._make(key))
        with self._guard:
            found = self._long.get(key)
            if found is not None:
                self._long.move_to_end(key)
                return found
        made = self._make(key)
        with self._guard:
            self._long[key] = made
            if len(self._long) > _MOST_LONG:
                self._long.popitem(last=False)
        return made

    def forget(self) -> None:
        """Drop every prepared call."""
        with self._guard:
            self._few.clear()
            self._long.clear()

    def _make(self, key: Key, wanted: tune.LinearConfig | None = None) -> Prepared:
        n, dtype, index, aligned, gate, how = key  # the mode is the current one
        device = torch.device("cpu") if index < 0 else torch.device("cuda", index)
        shape = (self.oc, self.ic)
        found = Prepared(dispatch.decide(self.scheme, self.layout, shape, n, dtype, device, aligned))
        config = found.decision.config
        if config is not None and not found.tokens:
            norm, outliers = how % _OUTLIERS_STEP // _NORM_STEP, how // _OUTLIERS_STEP
            chosen: tune.LinearConfig | None = wanted or config
            if norm:
                chosen = self._of_few(n, wanted, device)
            elif outliers:
                chosen = self._beside(found, n, outliers, wanted, device)
            if chosen is not None:
                self._add_launches(found, chosen, n, index, dtype, aligned, gate, norm, outliers)
        return found

    def _of_few(self, n: int, wanted: tune.LinearConfig | None, device: torch.device) -> tune.LinearConfig | None:
        """Return how a kernel with a norm in it runs; `None` where there is none."""
        if wanted is not None:
            return wanted if tune.takes_norms(wanted) else None
        chip = dispatch.kernel_chip(device)
        assert self.packing is not None and chip is not None
        return tune.choose_normed(tune.LinearProblem.of(self.packing, (self.oc, self.ic), n), chip)

    def _beside(
        self, found: Prepared, n: int, rounds: int, wanted: tune.LinearConfig | None, device: torch.device
    ) -> tune.LinearConfig | None:
        """Return how a kernel that adds outliers runs; `None` where there is none, or where the decision is changed to
        decoding the weight."""
        assert self.packing is not None
        problem = tune.LinearProblem.of(self.packing, (self.oc, self.ic), n)
        if wanted is not None:
            return wanted if tune.takes_outliers(wanted, rounds, problem) else None
        chip = dispatch.kernel_chip(device)
        assert chip is not None
        if tune.decodes_beside(problem, rounds, chip):
            sentence = "{} tokens are predicted to take less with a decoded weight than outliers that are gathered"
            found.decision = dispatch.Decision(dispatch.DEQUANTIZE, None, sentence, (n,))
            return None
        return tune.choose_beside(problem, rounds, chip)

    def _add_launches(
        self,
        found: Prepared,
        config: tune.LinearConfig,
        n: int,
        index: int,
        dtype: torch.dtype,
        aligned: bool,
        gate: int,
        norm: int,
        outliers: int,
    ) -> None:
        from tersor.kernels import dense, jit

        result = target_of(Activations.NATIVE, dtype)
        assert self.packing is not None and result is not None
        found.launch = dense.prepare_fused(
            jit.get(dense.fused_source(self.packing, result, config, gate, dense.Norm(norm), outliers), index),
            config,
            bf16=result == "bfloat16",
            oc=self.oc,
            ic=self.ic,
            n=n,
            aligned=aligned,
            factor=self.factor,
        )
        found.quantize = Quantize.of(result, config.activations, n, self.ic, index)
        if config.splits > 1 and not config.gathered:
            found.floats, found.counters = dense.parts(config, n)


_types: dict[tuple[str, int, int, str], WeightType] = {}


def weight_type(scheme: str, oc: int, ic: int, layout: str) -> WeightType:
    """Return the one type of these weights; `scheme` is `Scheme.key()`."""
    key = (scheme, oc, ic, layout)
    found = _types.get(key)
    if found is None:
        found = _types.setdefault(key, WeightType(Scheme.from_key(scheme), oc, ic, layout))
    return found


def type_of(weight: PackedWeight) -> WeightType:
    """Return a weight's type, which the weight keeps.

    Raises:
        ShapeError: its packed codes are not as many as its shape asks for.
    """
    if weight.outliers is not None:  # what is multiplied by kernels is the dense part, and the weight keeps that
        return weight_type(weight.scheme.dense.key(), *weight.shape, weight.layout)
    found: WeightType | None = getattr(weight, "note", None)
    if found is None:
        found = weight_type(weight.scheme.key(), *weight.shape, weight.layout)
        found.check(weight.data)
        object.__setattr__(weight, "note", found)  # not part of the frozen value
    return found


def forget() -> None:
    """Drop every prepared call and read the environment anew: for who changes it, or a chooser, while it runs."""
    from tersor.ops import grouped, mixed_launch, tiled_sparse

    mode.forget()
    grouped.forget()
    mixed_launch.forget()
    tiled_sparse.forget()
    for found in list(_types.values()):
        found.forget()
