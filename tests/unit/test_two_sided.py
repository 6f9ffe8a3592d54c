"""Rounding against both sides of a layer: lower by tr(H_O E H E^T) than either alone, in pieces as in a whole."""

from __future__ import annotations

import pytest
import torch

from tersor import formats
from tersor.compress import encode, two_sided
from tersor.compress.hessian import INPUT_DAMPING, OUTPUT_DAMPING
from tersor.compress.two_sided import OutputHessian
from tersor.errors import InputError
from tersor.formats import Scheme


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal random numbers, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(channels: int, seed: int) -> torch.Tensor:
    """Return the second moments of channels that depend on each other, float32."""
    mixing = random(channels, channels, seed=seed) * torch.linspace(0.1, 2, channels)
    x = random(8 * channels, channels, seed=seed + 1) @ mixing
    return x.T @ x / len(x)


def damped(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the matrix that the loss is measured by, float64."""
    wide = matrix.double()
    return wide + damping * float(wide.diagonal().mean()) * torch.eye(len(wide), dtype=torch.float64)


def loss(error: torch.Tensor, hessian: torch.Tensor, output: torch.Tensor) -> float:
    """Return tr(H_O E H E^T), both damped."""
    wide = error.double()
    return float(((damped(output, OUTPUT_DAMPING) @ wide) * (wide @ damped(hessian, INPUT_DAMPING))).sum())


ROWS = 2 * two_sided.ROW_BLOCK + 8


@pytest.mark.parametrize("scheme", [formats.get_scheme("uint3", 16), formats.get_scheme("fp5_e2m2")], ids=Scheme.key)
def test_rows_that_correct_each_other_lose_less_than_rows_alone(scheme: Scheme) -> None:
    weight, hessian, output = random(ROWS, 32), moments(32, 2), moments(ROWS, 4)
    alone = encode(weight, scheme, "gptq", {"hessian": hessian})
    both = encode(weight, scheme, "gptq", {"hessian": hessian, "output_hessian": output})
    losses = [loss(weight - encoded.dequantize(), hessian, output) for encoded in (encode(weight, scheme), alone, both)]
    assert losses[2] < 0.7 * losses[1] < 0.7 * losses[0]
    assert both.objective is not None
    assert both.objective.before == pytest.approx(losses[0], rel=1e-3)
    assert both.objective.after == pytest.approx(losses[2], rel=1e-3)


def test_outputs_that_do_not_depend_on_each_other_are_rounded_alone() -> None:
    weight, hessian = random(ROWS, 32), moments(32, 2)
    scheme = formats.get_scheme("int4", 16)
    alone = encode(weight, scheme, "gptq", {"hessian": hessian})
    both = encode(weight, scheme, "gptq", {"hessian": hessian, "output_hessian": torch.eye(ROWS)})
    assert both.objective is not None and alone.objective is not None
    assert both.objective.before == pytest.approx(alone.objective.before * (1 + OUTPUT_DAMPING), rel=1e-3)
    assert both.objective.after <= alone.objective.after * (1 + OUTPUT_DAMPING) * (1 + 1e-5)


def test_pieces_along_the_diagonal_give_what_the_whole_matrix_with_zeros_beside_them_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(two_sided, "ROW_BLOCK", 1)  # rows of both pieces in one block do not correct each other
    weight, hessian = random(2 * ROWS, 32), moments(32, 2)
    pieces = torch.stack([moments(ROWS, 4), moments(ROWS, 6)])
    scheme = formats.get_scheme("uint4", 16)
    results = [
        encode(weight, scheme, "gptq", {"hessian": hessian, "output_hessian": output})
        for output in (pieces, torch.block_diag(*pieces))
    ]
    objectives = [result.objective for result in results]
    assert objectives[0] is not None and objectives[1] is not None
    assert objectives[0].before == pytest.approx(objectives[1].before, rel=1e-2)
    assert objectives[0].after == pytest.approx(objectives[1].after, rel=0.05)


def test_a_piece_without_gradients_is_rounded_and_the_others_are_as_without_it() -> None:
    weight, hessian = random(2 * ROWS, 32), moments(32, 2)
    pieces = torch.stack([moments(ROWS, 4), torch.zeros(ROWS, ROWS)])
    scheme = formats.get_scheme("uint4", 16)
    best = encode(weight, scheme, "gptq", {"hessian": hessian, "output_hessian": pieces})
    first = encode(weight[:ROWS], scheme, "gptq", {"hessian": hessian, "output_hessian": pieces[0]})
    error = (weight - best.dequantize())[:ROWS]
    expected = loss(weight[:ROWS] - first.dequantize(), hessian, pieces[0])
    assert loss(error, hessian, pieces[0]) == pytest.approx(expected, rel=0.05)
    assert float((weight - best.dequantize())[ROWS:].abs().max()) < 1


def test_factors_of_pieces_are_those_of_their_damped_matrices_in_the_order_of_rows() -> None:
    pieces = torch.stack([moments(12, 4), 100 * moments(12, 6)])
    output = OutputHessian.of(pieces, "output_hessian")
    assert sorted(output.order.flatten().tolist()) == list(range(24))
    for index in range(2):
        order = output.order[index] - 12 * index
        expected = damped(pieces[index], OUTPUT_DAMPING)[order][:, order] / output.unit
        assert torch.allclose(output.matrix[index].double(), expected, rtol=1e-4, atol=1e-5)
        product = output.factor[index].T @ output.factor[index] @ output.matrix[index]
        assert torch.allclose(product, torch.eye(12), atol=1e-3)


def test_a_matrix_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match="3 output features"):
        encode(
            random(3, 8), formats.get_scheme("int4"), "gptq", {"hessian": torch.eye(8), "output_hessian": torch.eye(4)}
        )
