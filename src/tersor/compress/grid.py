"""The numbers that a row of codes can be: the values of a format times scales, and the scales that fit them best.

Codes that choose from a table have the numbers of their row (`tersor.compress.tables`), and of this only a limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tersor.formats import SCALE_DTYPES, Scheme, scale_values, store_scales

SHRINKS = tuple(step / 100 for step in range(100, 39, -2))
"""Factors of the round-to-nearest scale that the search tries, 1.0 to 0.4."""

_E8M0_SHRINKS = (1.0, 0.5)
"""Of powers of two the next smaller one is the only other scale within `SHRINKS`."""

_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Weights that the search rounds at once, by type of device: where rows are few, with several scales."""

_MARGIN = 1 - 2.0**-7
"""A scale this far below a limit is below it when rounded, bfloat16's 8 bits included."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that codes of a scheme stand for, before scales, on one device.

    A value is decode(code) - zero point, float32.

    Attributes:
        scheme: element format and scales.
        groups: scales a row, one where it has a table.
        limit: the largest scale allowed, so that no weight decodes beyond its dtype.
        least, largest: the smallest and the largest value of a code.
        table: float32 [values], ascending, of a float format.
        middles: float32 [values - 1], halfway between neighbours of `table`, in one piece of memory with it.
    """

    scheme: Scheme
    groups: int
    limit: float
    least: float
    largest: float
    table: torch.Tensor
    middles: torch.Tensor

    @staticmethod
    def of(scheme: Scheme, ic: int, dtype: torch.dtype, device: torch.device) -> Grid:
        """Return the grid for rows of `ic` weights that came in `dtype`.

        Raises:
            FormatError: the group size does not divide `ic`.
        """
        if scheme.has_table:
            limit = min(torch.finfo(kind).max for kind in (dtype, SCALE_DTYPES[scheme.scale_dtype], torch.float32))
            none = torch.empty(0, device=device)
            return Grid(scheme, 1, limit * _MARGIN, -limit, limit, none, none)
        table = scheme.format.values().unique(sorted=True)
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / float(table.abs().max())
        stored = SCALE_DTYPES[scheme.scale_dtype]
        if stored.is_floating_point:
            limit = min(limit, torch.finfo(stored).max)
        both = torch.cat([table, (table[1:] + table[:-1]) / 2]).to(device)
        least, largest = float(table[0]), float(table[-1])
        own, middles = both[: len(table)], both[len(table) :]
        return Grid(scheme, scheme.groups(ic), limit * _MARGIN, least, largest, own, middles)

    def nearest(self, wanted: torch.Tensor, low: torch.Tensor, high: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return the values nearest to scaled weights.

        Args:
            wanted: float32, contiguous, weights divided by their scales; overwritten.
            low, high: the ends of the range, of the shape of `wanted`; float formats have them in their table.
            out: where the values go, float32 of the shape of `wanted`; it is what is returned.
        """
        if self.scheme.format.kind == "float":
            return torch.index_select(self.table, 0, torch.bucketize(wanted, self.middles, out_int32=True), out=out)
        return torch.clamp(wanted.round_(), low, high, out=out)

    def ends(self, zero_point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the smallest and largest values beside zero points (0 where there are none), float32."""
        if self.scheme.has_zero_point:
            return -zero_point, self.scheme.format.max - zero_point
        return torch.full_like(zero_point, self.least), torch.full_like(zero_point, self.largest)

    def rounded(self, scale: torch.Tensor) -> torch.Tensor:
        """Return positive scales, float32 [rows, G], as the scheme's dtype stores them, at most `limit`."""
        return scale_values(store_scales(scale.clamp(max=self.limit), self.scheme, fits=True), self.scheme)

    def rounded_tables(self, tables: torch.Tensor) -> torch.Tensor:
        """Return tables, float32 [rows, size], as the scheme's dtype stores them, of magnitudes up to `limit`."""
        return tables.clamp(-self.limit, self.limit).to(SCALE_DTYPES[self.scheme.scale_dtype]).float()

    def search(self, rows: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the scale of every group whose codes lose least, among shrunken round-to-nearest scales.

        Args:
            rows: float32 [rows, IC].
            weights: float32 [IC], what a squared error of each channel costs.

        Returns:
            Scales as they are stored, float32 [rows, G], and zero points, float32 [rows, G] (0 where there are none).
        """
        grouped = rows.reshape(len(rows), self.groups, -1)
        cost = weights.reshape(1, self.groups, -1)
        maximum = self.scheme.format.max
        if self.scheme.has_zero_point:
            lowest = grouped.amin(dim=2).clamp_max_(0)
            full = grouped.amax(dim=2).clamp_min_(0).div_(maximum) - lowest / maximum
            zero_point = (-lowest / full.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(0, maximum)
        else:
            full = grouped.abs().amax(dim=2).div_(maximum)
            zero_point = torch.zeros_like(full)
        best = self.rounded(full)
        least = torch.full_like(full, torch.inf)
        shrinks = torch.tensor(_E8M0_SHRINKS if self.scheme.scale_dtype == "e8m0" else SHRINKS, device=rows.device)
        for some in shrinks.split(max(1, _ELEMENTS.get(rows.device.type, _ELEMENTS["cpu"]) // max(1, rows.numel()))):
            scales = self.rounded((full * some.view(-1, 1, 1)).flatten(0, 1)).unflatten(0, (len(some), -1))
            errors = torch.nan_to_num(self._errors(grouped, scales, zero_point, cost), nan=torch.inf, posinf=torch.inf)
            first = errors.argmin(dim=0, keepdim=True)  # the first of several that lose the least
            error, scale = errors.gather(0, first)[0], scales.gather(0, first)[0]
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, scale, best)
        return best, zero_point

    def _errors(
        self, grouped: torch.Tensor, scales: torch.Tensor, zero_point: torch.Tensor, cost: torch.Tensor
    ) -> torch.Tensor:
        """Return what groups [rows, G, group] lose, rounded to nearest with scales [S, rows, G]: of that shape."""
        divisor = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
        scaled = grouped / divisor
        if self.scheme.has_zero_point:
            offset = zero_point.unsqueeze(-1)
            rounded = scaled.round_().add_(offset).clamp_(0, self.scheme.format.max).sub_(offset)
        else:
            rounded = self.scheme.format.round(scaled)[1]
        return rounded.mul_(scales.unsqueeze(-1)).sub_(grouped).square_().mul_(cost).sum(dim=-1)

    def codes(self, values: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        """Return the uint8 codes [rows, IC] of values [rows, IC] and zero points [rows, G]."""
        if not self.scheme.has_zero_point:
            return self.scheme.format.encode(values)
        shape = (len(values), self.groups, -1)
        return (values.reshape(shape) + zero_point.unsqueeze(2)).to(torch.uint8).reshape(values.shape)
