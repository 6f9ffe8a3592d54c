"""The weights of all experts of a layer in one module, and what a layer of experts computes with two of them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Protocol

import torch

from tersor import ops
from tersor.errors import UnsupportedError
from tersor.formats import Scheme
from tersor.layouts import STREAM, Stacked, StackedWeight
from tersor.layouts.gated import gated_rows, interleave
from tersor.nn.linear import cast_bias
from tersor.nn.packed import MultipliedModule, guard


class Rows(enum.Enum):
    """What the rows of an expert's weight are, where it is stored."""

    PLAIN = "plain"
    """Those of one layer: down, or up without a gate."""
    HALVES = "halves"
    """Those of the gate, then those of up."""
    PAIRS = "pairs"
    """One of the gate and one of up in turn: gpt-oss."""

    def halves(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gate and up [E, F, ...] of a tensor [E, 2 F, ...], as views."""
        if self is Rows.PAIRS:
            return tensor[:, 0::2], tensor[:, 1::2]
        gate, up = tensor.chunk(2, dim=1)
        return gate, up

    def whole(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Undo `halves`."""
        return torch.stack((gate, up), dim=2).flatten(1, 2) if self is Rows.PAIRS else torch.cat((gate, up), dim=1)

    def arrange(self, weight: StackedWeight) -> StackedWeight:
        """Return a weight in the stored stream with gate and up interleaved by eight rows; others as they are."""
        if self is Rows.PLAIN:
            return weight
        gate, up = (self._half(weight, index) for index in range(2))
        return StackedWeight.gate_up(gate, up)

    def restore(self, weight: StackedWeight) -> StackedWeight:
        """Undo `arrange`."""
        if self is Rows.PLAIN:
            return weight
        gate, up = weight.split_gate_up()
        zero_points = None
        if gate.zero_point is not None and up.zero_point is not None:
            zero_points = self.whole(gate.zero_point, up.zero_point)
        data, scale = self.whole(gate.data, up.data), self.whole(gate.scale, up.scale)
        return StackedWeight(weight.scheme, (data.shape[0], data.shape[1], weight.shape[2]), data, scale, zero_points)

    def _half(self, weight: StackedWeight, index: int) -> StackedWeight:
        zero_point = None if weight.zero_point is None else self.halves(weight.zero_point)[index]
        data, scale = self.halves(weight.data)[index], self.halves(weight.scale)[index]
        count, rows, ic = weight.shape
        return StackedWeight(weight.scheme, (count, rows // 2, ic), data, scale, zero_point)

    def arrange_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """Return a bias [E, 2 F] interleaved as the rows are; a plain one [E, OC] as it is."""
        if self is Rows.PLAIN:
            return bias
        gate, up = self.halves(bias)
        return interleave(gate.T, up.T).T.contiguous()


class PackedStack(MultipliedModule):
    """The packed weights [E, OC, IC] of one layer of each of E experts.

    On disk and in a state dict rows are in the model's order; in memory gate and up are interleaved by eight rows
    (`rows`), in the layout that the kernels of the device read, as soon as `prepare` is called.

    Attributes:
        shape: (E, OC, IC), with OC as it is stored.
        rows: what is interleaved in memory.
        interleaved: whether rows lie as kernels read them now.
        transposed: whether the model keeps its weight as [E, IC, OC].
    """

    _ready_for: torch.dtype | None

    def __init__(
        self,
        shape: tuple[int, ...],
        scheme: Scheme,
        rows: Rows = Rows.PLAIN,
        *,
        stored: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a module with uninitialised codes and scales, to be filled from a state dict.

        Args:
            shape: (E, OC, IC).
            scheme: element format and scales.
            rows: what the rows are.
            stored: whether a state dict shows the weights under this module's name.
            device: of everything.
            dtype: of the decoded weights; torch's default when `None`.

        Raises:
            FormatError: the group size does not divide IC.
        """
        self.in_state_dict = stored
        super().__init__(shape, scheme, device=device, dtype=dtype)
        self.rows = rows
        self.interleaved = False
        self.transposed = False

    @classmethod
    def of(cls, weight: StackedWeight, shape: tuple[int, ...], rows: Rows, dtype: torch.dtype) -> PackedStack:
        """Wrap weights that are interleaved already and that no state dict shows, without a copy.

        Args:
            weight: [E, rows, IC] in any layout.
            shape: (E, OC, IC) as stored, that is without rows of zeros.
            rows, dtype: as for a new one.
        """
        module = cls(shape, weight.scheme, rows, stored=False, device="meta", dtype=dtype)
        module._set_stack(weight, interleaved=True)
        return module

    def packed_weight(self) -> StackedWeight:  # type: ignore[override]  # of several experts
        """Return the weights as they lie in memory, sharing it; rows are interleaved where `interleaved` says so."""
        return self._current()

    def _current(self) -> StackedWeight:  # type: ignore[override]
        current: StackedWeight = super()._current()  # type: ignore[assignment]
        return current

    def _view(self) -> StackedWeight:  # type: ignore[override]
        data, shape = self.weight_packed, self.shape
        rows = shape[1]
        if self.interleaved and self.rows is not Rows.PLAIN:
            rows = gated_rows(rows // 2)
        of = (shape[0], rows, shape[2])
        return StackedWeight(self.scheme, of, data, self.weight_scale, self.weight_zero_point, self.layout)

    @property
    def as_stored(self) -> bool:
        """Whether the buffers hold what is on disk."""
        return self.layout == STREAM and not self.interleaved

    def stored_weight(self) -> StackedWeight:  # type: ignore[override]
        """Return the weights as they are on disk: [E, OC, IC] in the stored stream, in the model's order."""
        weight = self.packed_weight().to_layout(STREAM)
        return self.rows.restore(weight) if self.interleaved else weight

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weights [E, OC, IC] in `dtype` and the model's order, made anew on every access."""
        return self.decoded(self.dtype)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights [E, OC, IC] in the model's order, rounded once to a dtype."""
        return self.stored_weight().dequantize(dtype)

    def ready(self, dtype: torch.dtype) -> StackedWeight:
        """Return the weights, interleaved, in the layout for activations of `dtype`; they stay so."""
        if torch.compiler.is_compiling():
            weight = self._view()
            return weight if self.interleaved else self.rows.arrange(weight.to_layout(STREAM))
        weight = self._current()
        if self._ready_for is not dtype or weight is not self._held:  # another thread has prepared it meanwhile
            self.prepare(dtype)
            weight = self._current()
        # Only while a CUDA graph is captured is a weight not as it should be, and what is made there is not kept.
        return weight if self.interleaved else self.rows.arrange(weight.to_layout(STREAM))

    def prepare(self, dtype: torch.dtype) -> None:
        """Put the weights into the order and the layout that serve activations of `dtype` on the module's device.

        Does nothing when they are there already, on the meta device, and while a CUDA graph is captured.
        """
        with guard:
            weight = self._current()
            device = weight.data.device
            if self._ready_for is dtype or device.type == "meta":
                return
            layout = ops.preferred_layout(self.scheme, dtype, device, self.activations)
            if layout != weight.layout or not self.interleaved:
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    return
                if not self.interleaved:
                    weight = self.rows.arrange(weight.to_layout(STREAM))
                self._set_stack(weight.to_layout(layout), interleaved=True)
                self._current()  # what is held now is what is ready
            self._ready_for = dtype

    def _set_stack(self, weight: StackedWeight, interleaved: bool) -> None:
        with guard:
            self.weight_packed, self.weight_scale = weight.data, weight.scale
            self.weight_zero_point, self.layout = weight.zero_point, weight.layout
            self.interleaved = interleaved
            self._held, self._ready_for = None, None

    def _set_empty(self) -> None:
        super()._set_empty()
        self.interleaved = False
        self._held = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Refuse: which expert a token goes to, the layer of experts knows.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("the weights of a layer's experts are multiplied by the layer that holds them")

    def extra_repr(self) -> str:
        """Say shape, scheme and layout."""
        count, oc, ic = self.shape
        words = [f"experts={count}", f"in_features={ic}", f"out_features={oc}", f"scheme={self.scheme.key()}"]
        words.append(f"bits_per_weight={self.scheme.bits_per_weight(ic):.3f}")
        if self.layout != STREAM:
            words.append(f"layout={self.layout}")
        return ", ".join(words)


class Stack(Protocol):
    """The packed weights of one layer of all experts: a `PackedStack`, or a `MixedStack`.

    Attributes:
        shape: (E, OC, IC), with OC as it is stored.
    """

    shape: Any

    def ready(self, dtype: torch.dtype) -> Stacked:
        """Return the weights in the layout for activations of `dtype`."""


def multiply_stacks(
    x: torch.Tensor,
    gate_up: Stack,
    down: Stack,
    index: torch.Tensor,
    factors: torch.Tensor,
    gate: ops.Gate,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run tokens x [T, H] through a layer of experts by `ops.experts`, in the layouts that serve x.

    Args:
        x: [T, H].
        gate_up, down: of the layer.
        index, factors: [T, K], the experts of each token and what their outputs are multiplied by.
        gate: how gate and up become one.
        gate_up_bias, down_bias: [E, rows] interleaved as the weights, and [E, H], of any dtype, or `None`.

    Returns:
        [T, H] in x's dtype.
    """
    first, second = gate_up.ready(x.dtype), down.ready(x.dtype)
    inner, outer = cast_bias(gate_up_bias, x.dtype), cast_bias(down_bias, x.dtype)
    return ops.experts(x, first, second, index, factors, gate_up_bias=inner, down_bias=outer, gate=gate)


def multiply_routed(
    x: torch.Tensor,
    gate_up: Stack,
    down: Stack,
    logits: torch.Tensor,
    options: dict[str, Any],
    gate: ops.Gate,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run tokens through the experts that a router's logits choose by `ops.routed_experts`, in layouts that serve x.

    Args:
        x, gate_up, down, gate, gate_up_bias, down_bias: as in `multiply_stacks`.
        logits: [T, E].
        options: how experts are chosen: those of `ops.routed_experts`, `top_k` among them.

    Returns:
        [T, H] in x's dtype.
    """
    first, second = gate_up.ready(x.dtype), down.ready(x.dtype)
    inner, outer = cast_bias(gate_up_bias, x.dtype), cast_bias(down_bias, x.dtype)
    return ops.routed_experts(x, logits, first, second, gate_up_bias=inner, down_bias=outer, gate=gate, **options)


def waits(gate_up: Stack, down: Stack, dtype: torch.dtype) -> str:
    """Return why the host waits to learn which tokens an expert gets, or an empty string where no kernel needs it.

    Args:
        gate_up, down: of the layer.
        dtype: of activations.
    """
    first, second = gate_up.ready(dtype), down.ready(dtype)
    x = torch.empty(1, gate_up.shape[2], dtype=dtype, device=first.device)
    return ops.experts_obstacle(x, first, second)


def one_by_one(
    x: torch.Tensor,
    index: torch.Tensor,
    factors: torch.Tensor,
    count: int,
    run: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Run every token through its experts, one expert after the other, and add their outputs up in float32.

    Args:
        x: [T, H]; sums of float64 are float64.
        index: integers [T, K], the experts of each token; a number that is no expert contributes nothing.
        factors: [T, K], what their outputs are multiplied by.
        count: how many experts there are.
        run: returns [n, H] of an expert's number and its tokens [n, H].

    Returns:
        [T, H] in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(x.shape, dtype=wide, device=x.device)
    for expert, tokens, ranks in ops.pairs_by_expert(index, count):
        result = run(expert, x[tokens]).to(wide)
        total.index_add_(0, tokens, result * factors[tokens, ranks, None].to(wide))
    return total.to(x.dtype)
