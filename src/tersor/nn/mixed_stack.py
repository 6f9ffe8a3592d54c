"""The weights of all experts of a layer that have one mix, in one module: a stack of each level."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tersor.checkpoint.names import LEVEL, LEVELS
from tersor.errors import ShapeError, UnsupportedError
from tersor.formats import Activations, Assignment, Scheme
from tersor.layouts import StackedMixedWeight
from tersor.nn.experts import PackedStack, Rows
from tersor.nn.levels import OfLevels


class StackRows(PackedStack):
    """The rows [E, rows, IC] of one level of a layer's experts."""

    def __init__(self, shape: tuple[int, ...], scheme: Scheme, rows: Rows = Rows.PLAIN, **options: Any) -> None:
        """Make a module as `PackedStack` does."""
        super().__init__(shape, scheme, rows, **options)

    @property
    def stored_bits(self) -> float:
        """Bits that a checkpoint has for the rows, scales and the byte that says the level of each counted."""
        return super().stored_bits + 8 * self.shape[1]


class MixedStack(OfLevels):
    """The mixed weights [E, OC, IC] of one layer of each of E experts, whose output features have the same levels.

    Rows lie in memory as those of a `PackedStack` do: gate and up are interleaved, level by level.

    Attributes:
        shape: (E, OC, IC), with OC as it is stored.
        mix: the levels.
        levels: the rows of every level that has any, by its number.
        weight_level: uint8 [OC], the level of every output feature.
        dtype: of the decoded weights; follows `.half()`, `.to(dtype)` and the like.
        transposed: whether the model keeps its weight as [E, IC, OC].
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        form: Assignment,
        rows: Rows = Rows.PLAIN,
        *,
        stored: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a module with uninitialised levels, codes and scales, to be filled from a state dict.

        Args:
            shape: (E, OC, IC).
            form: the mix, and how many output features have each level; which ones, the state dict says.
            rows: what the rows are.
            stored: whether a state dict shows the weights under this module's name.
            device: of everything.
            dtype: of the decoded weights; torch's default when `None`.

        Raises:
            FormatError: a group size does not divide IC.
            ShapeError: another number of output features has levels.
        """
        super().__init__()
        count, oc, ic = shape
        form.check(oc)
        self.shape, self.mix = shape, form.mix
        self.dtype = dtype or torch.get_default_dtype()
        self.in_state_dict = stored
        self.transposed = False
        level = torch.empty(oc, dtype=torch.uint8, device=device)
        self.register_buffer(LEVEL, level, persistent=stored)
        sets = {
            str(number): StackRows((count, own, ic), scheme, rows, stored=stored, device=device, dtype=dtype)
            for number, (scheme, own) in enumerate(zip(form.mix.levels, form.rows, strict=True))
            if own
        }
        self.levels = nn.ModuleDict(sets)
        self._rows = rows
        self._held: StackedMixedWeight | None = None
        self._level: torch.Tensor | None = None

    @classmethod
    def of(
        cls, weight: StackedMixedWeight, form: Assignment, shape: tuple[int, int, int], rows: Rows, dtype: torch.dtype
    ) -> MixedStack:
        """Wrap weights that are interleaved already and that no state dict shows, without a copy.

        Args:
            weight: [E, rows, IC] in any layout.
            form: the level of every output feature as stored.
            shape: (E, OC, IC) as stored, that is without rows of zeros.
            rows, dtype: as for a new one.
        """
        module = cls(shape, form, rows, stored=False, device="meta", dtype=dtype)
        module.weight_level = torch.tensor(list(form.level), dtype=torch.uint8, device=weight.device)
        for own, one in zip(module.row_sets, weight.sets, strict=True):
            own._set_stack(one, interleaved=True)
        return module

    @property
    def row_sets(self) -> list[StackRows]:
        """The rows of every level, in the order of levels."""
        return [rows for rows in self.levels.values() if isinstance(rows, StackRows)]

    @property
    def rows(self) -> Rows:
        """What is interleaved in memory."""
        return self._rows

    @rows.setter
    def rows(self, rows: Rows) -> None:
        self._rows, self._held = rows, None
        for own in self.row_sets:
            own.rows = rows

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weight_level.device

    @property
    def activations(self) -> Activations:
        """What the weights are multiplied with; set by `multiply_with` of every level."""
        return self.row_sets[0].activations

    @activations.setter
    def activations(self, activations: Activations) -> None:
        for rows in self.row_sets:
            rows.activations = activations

    def packed_weight(self) -> StackedMixedWeight:
        """Return the weights as they lie in memory, sharing it: gate and up interleaved where all rows are.

        Raises:
            ShapeError: the levels are not those of the row sets, or gate and up of a channel have several.
        """
        gated = self._rows is not Rows.PLAIN and all(rows.interleaved for rows in self.row_sets)
        return self._of([rows.packed_weight() for rows in self.row_sets], gated)

    def ready(self, dtype: torch.dtype) -> StackedMixedWeight:
        """Return the weights, interleaved, in the layouts for activations of `dtype`; they stay so."""
        return self._of([rows.ready(dtype) for rows in self.row_sets], self._rows is not Rows.PLAIN)

    def prepare(self, dtype: torch.dtype) -> None:
        """Put the rows of every level into the order and the layout that serve activations of `dtype`.

        Does nothing on the meta device, and nothing that is done already.
        """
        if self.device.type != "meta":
            self.ready(dtype)

    def _of(self, sets: list[Any], gated: bool) -> StackedMixedWeight:
        held = self._held
        if torch.compiler.is_compiling():
            assert held is not None, "prepare makes it before a graph is traced"
            return StackedMixedWeight(self.mix, held.shape, tuple(sets), held.features, held.places, gated)
        if held is None or self._level is not self.weight_level or held.gated != gated:
            try:
                held = StackedMixedWeight.of(self._assignment(gated), sets, gated)
            except ShapeError as error:
                raise ShapeError(f"{LEVEL} does not fit the weights of {LEVELS}: {error}") from None
        elif any(old is not new for old, new in zip(held.sets, sets, strict=True)):
            held = StackedMixedWeight(self.mix, held.shape, tuple(sets), held.features, held.places, gated)
        self._held, self._level = held, self.weight_level
        return held

    def _assignment(self, gated: bool) -> Assignment:
        """Return the level of every output feature, or of every channel of gate and up."""
        level = self.weight_level.cpu()
        if gated:
            level, up = (half[0] for half in self._rows.halves(level[None]))
            if not torch.equal(level, up):
                raise ShapeError("gate and up of a channel of experts have different levels")
        return Assignment(self.mix, level.contiguous().numpy().tobytes())

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weights [E, OC, IC] in `dtype` and the model's order, made anew on every access."""
        return self.decoded(self.dtype)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights [E, OC, IC] in the model's order, rounded once to a dtype."""
        form, result = self._assignment(False), torch.empty(self.shape, dtype=dtype, device=self.device)
        level = torch.tensor(list(form.level), device=self.device)
        for number, rows in self.levels.items():
            assert isinstance(rows, StackRows)
            result[:, level == int(number)] = rows.stored_weight().dequantize(dtype)
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Refuse: which expert a token goes to, the layer of experts knows.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("the weights of a layer's experts are multiplied by the layer that holds them")

    def extra_repr(self) -> str:
        """Say shape and levels."""
        count, oc, ic = self.shape
        rows = ", ".join(f"{own.shape[1]} x {own.scheme.key()}" for own in self.row_sets)
        return f"experts={count}, in_features={ic}, out_features={oc}, {rows}"
