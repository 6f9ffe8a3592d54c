"""Pairs of tokens and experts in the order of experts, as a product of experts walks through them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tersor.kernels.tune.experts_problem import most_blocks


@dataclass(frozen=True, slots=True)
class Tables:
    """Where each pair of a token and an expert stands when pairs are sorted by expert, in memory of one piece.

    Pair p is expert p % K of token p // K. The sort is stable; pairs whose expert does not exist come last. Kernels
    write the tables and read them on the device; nothing here waits for it.

    Attributes:
        memory: int32, `elements` of them: order, position, then on the next 16 bytes blocks.
        pairs: P, tokens times experts of a token.
        experts: E, how many there are.
        block_tokens: most tokens of a block, which are of one expert.
    """

    memory: torch.Tensor
    pairs: int
    experts: int
    block_tokens: int

    @property
    def order(self) -> torch.Tensor:
        """int32 [P]: sorted position -> pair."""
        return self.memory[: self.pairs]

    @property
    def position(self) -> torch.Tensor:
        """int32 [P]: pair -> sorted position."""
        return self.memory[self.pairs : 2 * self.pairs]

    @property
    def blocks(self) -> torch.Tensor:
        """int32 [1 + most blocks, 4], what the blocks of tokens are.

        Entry 0 is (blocks, pairs that have an expert, 0, 0). Entry 1 + b says of block b (its expert, the first block
        of that expert, where the expert's pairs start in sorted order, where they end): it has the pairs from
        start + (b - first) * block_tokens on. Experts ascend; what follows the last block is undefined.
        """
        return self.memory[blocks_offset(self.pairs) :].view(-1, 4)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of order, position and blocks, on the device."""
        start = self.memory.data_ptr()
        return start, start + 4 * self.pairs, start + 4 * blocks_offset(self.pairs)


def blocks_offset(pairs: int) -> int:
    """Return the int32 elements ahead of the blocks: order and position, rounded up to 16 bytes."""
    return -(-2 * pairs // 4) * 4


def elements(pairs: int, experts: int, block_tokens: int) -> int:
    """Return the int32 elements of the memory of tables."""
    return blocks_offset(pairs) + 4 * (1 + most_blocks(pairs, experts, block_tokens))
