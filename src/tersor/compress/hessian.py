"""The second-moment matrix of a layer's inputs, or of its output gradients, made fit for rounding against it.

What calibration sums up may be singular (fewer tokens than channels), have channels that never fire, or channels a
thousand times louder than the others. Here it is checked, damped, ordered and factored once for all passes over a
weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tersor.errors import InputError

INPUT_DAMPING = 0.01
"""What is added to the diagonal of the inputs' matrix, relative to its mean (GPTQ, arXiv 2210.17323, section 3.3)."""

OUTPUT_DAMPING = 0.05
"""What is added to the diagonal of the output gradients' matrix, relative to its mean."""

BLOCK = 128
"""Channels of a block: a pass over them in order has one product for all that a block changes behind it."""

_DAMPING_STEP = 10.0
_MOST_DAMPING = 1e4
"""A matrix that is not positive with this times its mean diagonal added is no sum of x x^T."""


@dataclass(frozen=True, slots=True)
class Hessian:
    """A damped second-moment matrix of n channels, in natural order and by falling diagonal, divided by `unit`.

    Attributes:
        order: int64 [n], the channels by falling diagonal, the order in which they are rounded; or as they come.
        back: int64 [n], where in that order each channel is.
        natural: float32 [n, n], the damped matrix with channels as they come.
        ordered: float32 [n, n], the same with rows and columns in `order`.
        factor: float32 [n, n], the upper triangular U with U^T U the inverse of `ordered`.
        moves: float32 [n, n], its rows divided by its diagonal: how an error moves to later channels.
        behind: for every `BLOCK` of channels but the last, how it moves those behind it: views [behind, block] of
            `moves`, and of `ordered`.
        unit: mean of the diagonal that calibration summed up; entries here are relative to it.
    """

    order: torch.Tensor
    back: torch.Tensor
    natural: torch.Tensor
    ordered: torch.Tensor
    factor: torch.Tensor
    moves: torch.Tensor
    behind: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]
    unit: float

    @staticmethod
    def of(matrix: torch.Tensor, damping: float, name: str, *, as_they_come: bool = False) -> Hessian:
        """Damp and factor what calibration summed up.

        The factors are found in float64: a Cholesky factor in float32 loses all digits at condition numbers of 10^7,
        which a thousand channels with one loud one among them reach. Damping grows tenfold until there is a factor.

        Args:
            matrix: float [n, n], symmetric up to rounding; all zeros stand for channels that are all alike.
            damping: what is added to the diagonal, relative to its mean.
            name: what to call it in errors, such as `hessian`.
            as_they_come: whether `order` leaves channels as they are.

        Raises:
            InputError: it is not square, not finite (the first such entry is named), or not a second-moment matrix.
        """
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"statistics {name!r} have shape {list(matrix.shape)}, not that of a square matrix")
        check_finite(matrix, name)
        wide = matrix.double()
        wide = (wide + wide.T).mul_(0.5)
        diagonal = wide.diagonal()
        unit = float(diagonal.mean()) if diagonal.numel() else 0.0
        if unit <= 0:
            if bool((wide != 0).any()):
                raise InputError(f"statistics {name!r} have a diagonal of mean {unit:.3g}: they are no sum of squares")
            unit, wide = 1.0, torch.eye(len(wide), dtype=torch.float64, device=wide.device)
        else:
            wide.div_(unit)
        if as_they_come:
            order = torch.arange(len(wide), device=wide.device)
        else:
            order = torch.argsort(wide.diagonal(), descending=True, stable=True)
        damped, factor = _factor(wide[order][:, order], damping, name)
        back = torch.argsort(order)
        ordered, upper = damped.float().contiguous(), factor.float().contiguous()
        moves = upper / upper.diagonal().unsqueeze(1)
        behind = _behind(moves), _behind(ordered)
        return Hessian(order, back, ordered[back][:, back].contiguous(), ordered, upper, moves, behind, unit)

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.order)

    def weights(self) -> torch.Tensor:
        """Return 1 / U_jj^2, float32 [n] in natural order: what an error of a channel costs that no later one mends."""
        return self.factor.diagonal().square().reciprocal()[self.back]

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows @ (damped matrix)^-1 for float32 rows [m, n] in natural order, in the units of `natural`."""
        return ((rows[:, self.order] @ self.factor.T) @ self.factor)[:, self.back]


def _behind(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    ends = range(BLOCK, len(matrix), BLOCK)
    return tuple(matrix[end - BLOCK : end, end:].T for end in ends)


def _factor(ordered: torch.Tensor, damping: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the damped matrix and the upper triangular U with U^T U its inverse, float64.

    The Cholesky factor of the matrix read backwards, itself read backwards, is an upper triangular R with R R^T the
    matrix, so that U is the inverse of R: one factorisation, and no inverse of the matrix is made.
    """
    while damping <= _MOST_DAMPING:
        damped = ordered.clone()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            identity = torch.eye(len(ordered), dtype=ordered.dtype, device=ordered.device)
            return damped, torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        damping *= _DAMPING_STEP
    raise InputError(f"statistics {name!r} are not positive semidefinite: they are no sum of x x^T over tokens")


def check_finite(matrix: torch.Tensor, name: str) -> None:
    """Check that statistics hold no NaN and no infinity.

    Raises:
        InputError: they do; it names them and the first such entry.
    """
    if bool(torch.isfinite(matrix).all()):
        return
    index = [int(axis) for axis in (~torch.isfinite(matrix)).nonzero()[0]]
    raise InputError(
        f"statistics {name!r} hold {float(matrix[tuple(index)])} at {index}: the layer's activations or gradients are "
        "not finite"
    )


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32, whatever the process allows (TF32 keeps 10 bits of mantissa)."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the process has set a backend's precision, with which torch does not mix the older setting
        with _exact_products_of_cuda():
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _exact_products_of_cuda() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
