"""What a linear asks of a kernel, and how a kernel runs it."""

from __future__ import annotations

from dataclasses import dataclass

from tersor.formats import Activations
from tersor.layouts.packing import Packing

SM80 = "sm80"
SM90 = "sm90"
FEW_TOKENS = 16
"""Up to so many tokens mma.sync is faster than wgmma; up to 32 it can be, where warpgroups take blocks in turn."""
INVARIANT_TOKENS = 16
"""Where results must not depend on the number of tokens, splits are those that would suit so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProblem:
    """One product y[N, OC] = x[N, IC] @ W^T with packed W.

    Attributes:
        oc, ic, n: sizes; n is at least 1.
        bits: width of a code.
        scale_groups: sums of one row in a block of 128 input channels that are scaled apart; 0 for one scale a row.
        scale_bytes: bytes that the scales of a row take in such a block, zero points included.
        tables: whether a row has a table in place of a scale.
        aligned: whether rows of x start on 16 bytes, which a tensor map needs.
        activations: what the weight is multiplied with.
        batch_invariant: whether a row of y must not depend on how many other rows there are.
    """

    oc: int
    ic: int
    n: int
    bits: int
    scale_groups: int = 0
    scale_bytes: int = 0
    tables: bool = False
    aligned: bool = True
    activations: Activations = Activations.NATIVE
    batch_invariant: bool = False

    @staticmethod
    def of(
        packing: Packing,
        shape: tuple[int, int],
        n: int,
        *,
        aligned: bool = True,
        activations: Activations = Activations.NATIVE,
        batch_invariant: bool = False,
    ) -> LinearProblem:
        """Return the problem that N tokens make with a weight of a packing and a shape, (OC, IC)."""
        return LinearProblem(
            oc=shape[0],
            ic=shape[1],
            n=n,
            bits=packing.scheme.format.bits,
            scale_groups=packing.sums_in_block,
            scale_bytes=packing.scale_row_bytes,
            tables=packing.scheme.has_table,
            aligned=aligned,
            activations=activations,
            batch_invariant=batch_invariant,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearConfig:
    """How a fused kernel runs a problem.

    Attributes:
        schedule: `sm80` or `sm90`.
        activations: what the weight is multiplied with.
        n_tile: tokens in a tile.
        row_groups: groups of 64 output channels in a tile.
        channel_groups: warpgroups for each row group; with few tokens all warpgroups of a CTA take blocks of input
            channels in turn.
        cluster: CTAs that share the activations they fetch.
        resident: CTAs meant to share a multiprocessor, with those of the next launch.
        weight_slots, x_slots: slots in the rings of shared memory, for weights and for activations.
        token_tiles, row_tiles: tiles along tokens and along output channels.
        whole_tiles: tiles that one CTA takes over all input channels; every other tile goes to `splits` CTAs.
        splits: parts into which the input channels of a split tile are cut.
        gathered: whether the splits of a tile are one cluster, which adds their sums in shared memory.
        gather_room: sums of other splits that have room beside the rings while a cluster gathers; further sums come to
            where the rings were.
        ctas: CTAs launched.
        shared_bytes: dynamic shared memory of a CTA.
        few_tokens: tokens up to which the sm90 schedule may take mma.sync; 0 forbids it in whatever tile (`Tile.few`).
    """

    schedule: str
    activations: Activations = Activations.NATIVE
    n_tile: int
    row_groups: int = 2
    channel_groups: int = 1
    cluster: int = 1
    resident: int
    weight_slots: int
    x_slots: int
    token_tiles: int
    row_tiles: int
    whole_tiles: int = 0
    splits: int
    gathered: bool = False
    gather_room: int = 0
    ctas: int
    shared_bytes: int
    few_tokens: int = FEW_TOKENS

    def __str__(self) -> str:
        clusters = " in clusters" if self.gathered else ""
        return (
            f"{self.schedule} schedule, tiles of {64 * self.row_groups} rows and {self.n_tile} tokens, "
            f"{self.token_tiles * self.row_tiles} tiles, {self.splits} splits{clusters}, "
            f"{self.ctas} CTAs, "
            f"{self.shared_bytes / 1024:.0f} KiB shared"
        )
