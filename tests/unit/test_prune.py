"""Zeros in a layer: algorithms as plain loops from their papers have them, n of m, and steps that only help."""

from __future__ import annotations

import itertools

import pytest
import torch

from tersor import formats
from tersor.compress import encode
from tersor.compress.hessian import INPUT_DAMPING, Hessian
from tersor.compress.prune import ALGORITHMS, Pattern, Pruned, prune
from tersor.compress.prune.admm import admm_mask
from tersor.compress.prune.pattern import first, least_by_bits
from tersor.compress.prune.reweight import reweight
from tersor.errors import InputError, NonFiniteError

PATTERNS = [
    Pattern(0.5),
    Pattern(0.5, scope="row"),
    Pattern(0.5, 2, 4),
    Pattern(0.7, 4, 8),
    Pattern(0.7, 4, 8, "row"),
    Pattern(0.9),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal random numbers, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(channels: int, tokens: int = 512, seed: int = 0) -> torch.Tensor:
    """Return the mean of x x^T over inputs whose channels depend on each other and differ in size."""
    mixing = random(channels, channels, seed=seed + 1) * torch.linspace(0.1, 2, channels)
    x = random(tokens, channels, seed=seed) @ mixing / channels**0.5
    return x.T @ x / len(x)


def damped(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix that losses are measured by, float64, relative to its mean diagonal."""
    wide = matrix.double() / float(matrix.double().diagonal().mean())
    return wide + INPUT_DAMPING * torch.eye(len(wide), dtype=torch.float64)


def loss(weight: torch.Tensor, found: torch.Tensor, matrix: torch.Tensor) -> float:
    """Return tr(E H E^T) by plain float64 products."""
    error = found.double() - weight.double()
    return float(((error @ damped(matrix)) * error).sum() * matrix.double().diagonal().mean())


def best_of_mask(weight: torch.Tensor, kept: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return the best weights for a mask, float64, by an exact solution for each row."""
    wide, result = damped(matrix), torch.zeros(weight.shape, dtype=torch.float64)
    for row, (mask, wanted) in enumerate(zip(kept, weight.double(), strict=True)):
        result[row, mask] = torch.linalg.solve(wide[mask][:, mask], wide[mask] @ wanted)
    return result


def pruned(weight: torch.Tensor, matrix: torch.Tensor, pattern: Pattern, name: str, **options: object) -> Pruned:
    return prune(weight, pattern, name, {"hessian": matrix}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_masks_by_one_score_keep_what_a_sorted_list_of_scores_has_first(name: str, scope: str) -> None:
    weight, matrix = random(7, 20), moments(20)
    found = pruned(weight, matrix, Pattern(0.6, scope=scope), name, update=False)
    norms = [float(damped(matrix)[j, j]) ** 0.5 if name == "wanda" else 1.0 for j in range(20)]
    ranked = sorted(
        (-abs(float(weight[row, column])) * norms[column], row, column) for row in range(7) for column in range(20)
    )
    want = torch.zeros(7, 20, dtype=torch.bool)
    for row in range(7):
        for _, _, column in [one for one in ranked if one[1] == row][:8] if scope == "row" else []:
            want[row, column] = True
    for _, row, column in ranked[:56] if scope == "layer" else []:
        want[row, column] = True
    assert torch.equal(found.kept, want)
    assert torch.equal(found.weight, torch.where(want, weight, 0.0))


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.5, 2, 4), Pattern(0.7, scope="row")], ids=Pattern.key)
def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column(pattern: Pattern) -> None:
    channels, span = 160, 4 if pattern.of else 128
    weight, matrix = random(6, channels), moments(channels)
    found = pruned(weight, matrix, pattern, "sparsegpt", update=False)
    # By the inverse of what is left of the Hessian at every column, without a Cholesky factor of anything.
    wide, rest = damped(matrix), weight.double()
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    inverses = [torch.linalg.inv(wide[column:, column:]) for column in range(channels)]
    for column in range(channels):
        if column % span == 0:
            stop = min(column + span, channels)
            scores = torch.stack([rest[:, j].square() / inverses[j][0, 0] for j in range(column, stop)], dim=1)
            if pattern.of:
                counts = [2] * 6
            elif pattern.scope == "row":
                counts = [round(0.3 * stop) - round(0.3 * column)] * 6
            else:
                counts = [round(0.5 * 6 * stop) - round(0.5 * 6 * column)]
            flat = scores.view(len(counts), -1)
            for row, count in enumerate(counts):
                chosen = flat[row].argsort(descending=True)[:count]
                where = torch.zeros(flat.shape[1], dtype=torch.bool)
                where[chosen] = True
                block = kept[:, column:stop]
                if len(counts) == 1:
                    block.copy_(where.view(block.shape))
                else:
                    block[row] = where
        error = torch.where(kept[:, column], 0.0, rest[:, column]) / inverses[column][0, 0]
        rest[:, column:] -= error.unsqueeze(1) * inverses[column][0]
    assert (found.kept == kept).double().mean() > 0.995
    rows = (found.kept == kept).all(dim=1)
    assert rows.any()
    torch.testing.assert_close(found.weight[rows].double(), (rest * kept)[rows], rtol=1e-3, atol=1e-3)


def test_reweighting_finds_the_solution_of_every_rows_normal_equations() -> None:
    weight, matrix = random(5, 24), moments(24)
    kept = random(5, 24, seed=3) > 0
    hessian = Hessian.of(matrix, INPUT_DAMPING, "hessian")
    found = reweight(weight * kept, kept, weight, hessian, steps=60)
    assert not found[~kept].any()
    torch.testing.assert_close(found.double(), best_of_mask(weight, kept, matrix), rtol=1e-3, atol=1e-4)


def test_twelve_steps_are_within_a_hundredth_of_the_least_loss() -> None:
    weight, matrix = random(16, 96), moments(96)
    found = pruned(weight, matrix, Pattern(0.5), "sparsegpt")
    least = loss(weight, best_of_mask(weight, found.kept, matrix), matrix)
    assert loss(weight, found.weight, matrix) < 1.01 * least


def test_admm_goes_through_the_steps_of_its_paper() -> None:
    weight, matrix = random(8, 32), moments(32)
    kept, _ = admm_mask(weight, Hessian.of(matrix, INPUT_DAMPING, "hessian"), Pattern(0.5))
    wide = damped(matrix)
    norms = wide.diagonal().sqrt()
    wide, target = wide / torch.outer(norms, norms), weight.double() * norms
    rho, dual = 0.1, torch.zeros(8, 32, dtype=torch.float64)

    def project(rows: torch.Tensor) -> torch.Tensor:
        least = rows.abs().flatten().sort(descending=True).values[127]
        return torch.where(rows.abs() >= least, rows, 0.0)

    split = project(target)
    before = split != 0
    for step in range(1, 301):
        weights = torch.linalg.solve(wide + rho * torch.eye(32), (target @ wide - dual + rho * split).T).T
        split = project(weights + dual / rho)
        dual = dual + rho * (weights - split)
        if step % 3 == 0:
            changed = int(((split != 0) != before).sum()) / 128
            if not changed:
                break
            rho *= 1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1
            before = split != 0
    assert (kept == (split != 0)).double().mean() > 0.99


def test_admm_comes_near_the_best_of_all_masks_of_a_tiny_layer() -> None:
    weight, matrix = random(12, 8), moments(8)
    found = pruned(weight, matrix, Pattern(0.5, scope="row"), "admm")
    best = 0.0
    for row in weight:
        masks = [torch.tensor([j in four for j in range(8)]) for four in itertools.combinations(range(8), 4)]
        given = row.expand(len(masks), 8)
        exact = best_of_mask(given, torch.stack(masks), matrix)
        best += min(loss(row[None], one[None], matrix) for one in exact)
    assert loss(weight, found.weight, matrix) < 1.15 * best


def test_each_algorithm_loses_less_than_the_one_before_it() -> None:
    weight, matrix = random(64, 128), moments(128)
    found = [pruned(weight, matrix, Pattern(0.5), name, update=name == "admm") for name in ALGORITHMS]
    losses = [loss(weight, one.weight, matrix) for one in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < 0.8 * losses[1]
    assert losses[3] < 0.8 * losses[2]


@pytest.mark.parametrize("pattern", PATTERNS, ids=Pattern.key)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_masks_have_the_share_of_zeros_asked_for_and_no_more_of_any_few(name: str, pattern: Pattern) -> None:
    weight, matrix = random(10, 136), moments(136)
    found = pruned(weight, matrix, pattern, name)
    assert int(found.kept.sum()) == pattern.kept(10, 136)
    assert not found.weight[~found.kept].any()
    if pattern.of:
        assert int(found.kept.view(-1, pattern.of).sum(dim=1).max()) == pattern.most
    if pattern.scope == "row" or pattern.exact:
        assert len(set(found.kept.sum(dim=1).tolist())) == 1


def test_the_least_score_that_stays_is_found_by_its_bits_as_by_selection() -> None:
    scores = random(3, 500).abs()
    scores[0, :400], scores[1, 7], scores[2, :100] = 1.5, torch.inf, -torch.inf
    for count in (1, 7, 250, 400):
        wanted = scores.sort(dim=1, descending=True).values[:, count - 1 : count]
        assert torch.equal(least_by_bits(scores, count), wanted)
        ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
        assert torch.equal(first(scores, count), torch.zeros(3, 500, dtype=torch.bool).scatter(1, ranked, True))


@pytest.mark.parametrize("text", ["fp6_e2m3", "fp5_e2m2", "int4:8", "uint4:8", "mxfp4_e2m1"])
@pytest.mark.parametrize("name", ["wanda", "admm"])
def test_codes_are_chosen_for_the_mask_and_zeros_stay_exact(name: str, text: str) -> None:
    element, _, group = text.partition(":")
    scheme = formats.get_scheme(element, int(group) if group else None)
    weight, matrix = random(12, 64), moments(64)
    plain = pruned(weight, matrix, Pattern(0.5), name)
    found = pruned(weight, matrix, Pattern(0.5), name, scheme=scheme)
    assert found.encoded is not None
    assert torch.equal(found.kept, plain.kept)
    assert torch.equal(found.weight, found.encoded.dequantize())
    assert not found.weight[~found.kept].any()
    assert not torch.signbit(found.weight[~found.kept]).any()
    apart = encode(plain.weight, scheme).dequantize()
    least = loss(weight, plain.weight, matrix)
    assert loss(weight, found.weight, matrix) - least < 0.8 * (loss(weight, apart, matrix) - least)
    assert found.losses["quantized"] == pytest.approx(loss(weight, found.weight, matrix), rel=1e-3)


def test_losses_are_those_of_the_weights_and_never_grow_behind_the_mask() -> None:
    weight, matrix = random(12, 64).bfloat16(), moments(64)
    for name in ALGORITHMS:
        losses = pruned(weight, matrix, Pattern(0.5), name).losses
        assert list(losses) == ["magnitude", "mask", "reweighted"]
        assert losses["reweighted"] <= min(losses["mask"], losses["magnitude"]) * (1 + 1e-6)
    plain = pruned(weight, matrix, Pattern(0.5), "magnitude", update=False)
    assert plain.losses["mask"] == pytest.approx(loss(weight.float(), plain.weight.float(), matrix), rel=1e-3)
    assert plain.weight.dtype == torch.bfloat16
    assert plain.squared_error == pytest.approx(float(weight.double()[~plain.kept].square().sum()))


def test_the_weights_that_stay_aim_at_the_original_models_outputs() -> None:
    x = random(512, 32) @ random(32, 32, seed=1)
    original = x + 0.3 * random(512, 32, seed=2) @ random(32, 32, seed=3)
    shift = (original - x).T @ x / 512
    weight, matrix = random(16, 32), x.T @ x / 512
    outputs = [
        prune(weight, Pattern(0.3), "admm", {"hessian": matrix, **more}).weight for more in ({}, {"shift": shift})
    ]
    errors = [float((original @ weight.T - x @ one.T).square().mean()) for one in outputs]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_layer_without_tokens_and_one_with_a_silent_channel_are_pruned(name: str) -> None:
    weight, matrix = random(6, 16), torch.zeros(16, 16)
    assert int(pruned(weight, matrix, Pattern(0.5), name).kept.sum()) == 48
    matrix = moments(16)
    matrix[3], matrix[:, 3] = 0, 0
    found = pruned(weight, matrix, Pattern(0.5), name)
    assert bool(found.weight.isfinite().all())
    if name != "magnitude":
        assert int(found.kept[:, 3].sum()) <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((0.0,), "sparsity 0.0 is not a share"),
        ((1,), "not a share of weights between 0 and 1"),
        ((float("nan"),), "not a share"),
        (("half",), "sparsity 'half' is not a share"),
        ((None,), "no sparsity given"),
        ((0.4, "2:4"), "sparsity 0.4 is out of reach: 2:4 makes 0.5 of the weights zero or more"),
        ((None, "4:4"), "does not leave some"),
        ((None, "0:4"), "does not leave some"),
        ((0.5, "2/4"), "pattern '2/4' is not n:m"),
        ((0.5, "", "column"), "scope 'column' is neither of layer, row"),
    ],
)
def test_a_pattern_that_means_nothing_is_an_error_that_names_it(options: tuple[object, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Pattern.parse(*options)  # type: ignore[arg-type]


def test_what_cannot_be_pruned_is_an_error_that_names_it() -> None:
    with pytest.raises(InputError, match=r"unknown algorithm 'wander', did you mean 'wanda'"):
        pruned(random(2, 4), moments(4), Pattern(0.5), "wander")
    with pytest.raises(InputError, match=r"pattern 2:4 does not divide the 6 input channels of a\.b"):
        Pattern(0.5, 2, 4).check(6, "a.b")
    with pytest.raises(InputError, match="hessian"):
        pruned(random(2, 4), moments(6), Pattern(0.5), "admm")
    weight = random(2, 4)
    weight[1, 2] = float("nan")
    with pytest.raises(NonFiniteError):
        pruned(weight, moments(4), Pattern(0.5), "magnitude")
    assert Pattern.parse(None, "4:8") == Pattern(0.5, 4, 8)
    assert Pattern.parse("0.75") == Pattern(0.75)


def test_without_statistics_the_largest_weights_stay_on_their_nearest_codes() -> None:
    weight, pattern = random(16, 64), Pattern(0.5, 2, 4)
    found = prune(weight, pattern, "magnitude", {}, update=False)
    assert torch.equal(found.kept, pattern.choose(weight.abs()))
    assert torch.equal(found.weight, weight.where(found.kept, 0.0)) and found.losses == {}
    assert found.squared_error == pytest.approx(float(weight.where(found.kept, 0.0).sub(weight).square().sum()))
    allowed = torch.arange(64).expand(16, 64) > 8
    few = prune(weight, pattern, "magnitude", {}, scheme=formats.get_scheme("uint4", 16), update=False, allowed=allowed)
    assert few.encoded is not None and not few.weight[~few.kept].any() and not few.kept[:, :9].any()
    near = encode(weight.where(few.kept, 0.0), formats.get_scheme("uint4", 16))
    assert torch.equal(few.weight, near.dequantize())


@pytest.mark.parametrize(("algorithm", "update"), [("wanda", False), ("admm", False), ("magnitude", True)])
def test_statistics_that_are_needed_are_asked_for(algorithm: str, update: bool) -> None:
    with pytest.raises(InputError, match="need statistics of what the layer reads"):
        prune(random(8, 16), Pattern(0.5), algorithm, {}, update=update)
