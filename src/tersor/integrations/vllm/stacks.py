"""What does one tensor hold that is of all experts of a layer, and who takes it apart?

Most loaders of vLLM take the weights of single experts, which a mapper of names hands them; those of `HANDED_WHOLE`
know no such names, and a layer of experts is handed tensors as they are stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from tersor.checkpoint.config import Represented
from tersor.checkpoint.modules import Linear
from tersor.checkpoint.names import LEVEL
from tersor.errors import UnsupportedError
from tersor.formats import Mix, Scheme
from tersor.nn.experts import Rows

WEIGHT, BIAS = "weight", "bias"
"""Names of the tensor of a plain weight, and of biases."""
PARTS = ("blocks", "scales")
"""Names of the tensors of a released MXFP4 weight, behind an underscore."""
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
"""What the weights of an expert are called here where one tensor holds them for all experts of a layer."""
HANDED_WHOLE = ("GptOssForCausalLM",)
"""Classes whose loaders hand a tensor to the parameter of its name, and pass over those that have none."""
_STACKED = {"gate_up_proj": (GATE, UP), "input_linear": (GATE, UP), "down_proj": (DOWN,), "output_linear": (DOWN,)}


@dataclass(frozen=True, slots=True)
class Stack:
    """One tensor that holds a weight of all experts of a layer, or gate and up of all.

    Attributes:
        experts: what vLLM calls the layer.
        projections: of `GATE`, `UP` and `DOWN`, what its rows are.
        count: of experts.
        pairs: whether gate and up of a channel are neighbours; else all gates come first.
        transposed: whether a plain one is [E, IC, OC].
        biased: whether there are biases [E, rows] beside it.
        parts: names of the tensors that it is released as, where it is decoded while it is loaded.
    """

    experts: str
    projections: tuple[str, ...]
    count: int
    pairs: bool = False
    transposed: bool = False
    biased: bool = False
    parts: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """What parameters of a layer that is handed it whole are called, before their own names."""
        return "_".join(("stacked", *self.projections))

    def rows(self) -> Rows:
        """Return what its rows are."""
        if len(self.projections) == 1:
            return Rows.PLAIN
        return Rows.PAIRS if self.pairs else Rows.HALVES

    def taken_apart(self, own: str, tensor: torch.Tensor) -> Iterator[tuple[int, str, torch.Tensor]]:
        """Yield expert, projection and what of a tensor is theirs.

        Args:
            own: its name, but for what it is of.
            tensor: [E, rows, ...], or levels [rows] of all experts; of gate and up of a channel they are one.
        """
        whole = tensor.transpose(1, 2) if self.transposed and own == WEIGHT else tensor
        whole = whole.expand(self.count, -1) if own == LEVEL else whole
        for expert, rows in enumerate(whole):
            parts = [rows[0::2], rows[1::2]] if self.pairs else rows.chunk(len(self.projections))
            for projection, part in zip(self.projections, parts, strict=True):
                yield expert, projection, part


def stack_of(
    stem: str, represented: Represented | None, linear: Linear, names: Collection[str], parts: Collection[str] = ()
) -> Stack:
    """Return what a tensor of the weights of all experts holds.

    Args:
        stem: its name, but for what is said of it behind the last dot.
        represented: how it is stored, or is to be.
        linear: that it is of each expert.
        names: of all tensors of the checkpoint.
        parts: whole names of the tensors that it is released as, where it is decoded while it is loaded.

    Raises:
        UnsupportedError: it is neither dense nor mixed, or none that is known.
    """
    owner, _, last = stem.rpartition(".")
    whole = f"{stem} is one tensor for all experts of a layer"
    if last not in _STACKED or (len(_STACKED[last]) > 1 and linear.rows == "plain"):
        raise UnsupportedError(f"{whole}, and no gate and up that kernels take, or down")
    if not isinstance(represented, Scheme | Mix) or (
        isinstance(represented, Scheme) and represented.outliers is not None
    ):
        raise UnsupportedError(f"{whole}, and only a dense or a mixed one runs in vLLM")
    experts = owner if owner.endswith(".experts") else f"{owner}.experts"
    known = tuple(name for name in PARTS if f"{stem}_{name}" in parts)
    if len(known) != len(parts):
        raise UnsupportedError(f"{stem} is released as {' and '.join(parts)}, which is not decoded while vLLM loads")
    biased = f"{stem}_{BIAS}" in names
    return Stack(experts, _STACKED[last], linear.shape[0], linear.rows == "pairs", linear.transposed, biased, known)


def check_whole(stacks: Mapping[str, Stack]) -> None:
    """Hold that of every layer's experts gate, up and down are packed, or none.

    Raises:
        UnsupportedError: some are.
    """
    found: dict[str, list[str]] = {}
    for stack in stacks.values():
        found.setdefault(stack.experts, []).extend(stack.projections)
    for experts, projections in found.items():
        if len(projections) != 3:
            raise UnsupportedError(f"{experts}: packed experts have gate, up and down, and these {sorted(projections)}")
