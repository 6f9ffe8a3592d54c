"""Perplexity, divergence, agreement and their standard errors against independent computations."""

from __future__ import annotations

import copy
import math
import statistics
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_lm

from tersor.errors import InputError, TersorError
from tersor.evaluate import Quality, cut_windows, evaluate
from tersor.evaluate import quality as quality_module

TEXT = "def square(x):\n    return x * x\n\n\nclass Point:\n    def __init__(self, x, y):\n        self.x = x\n" * 20


class Bigram:
    """A model whose next-token logits are a row of a table."""

    def __init__(self, table: Any, positions: int = 1024) -> None:
        self.table = torch.as_tensor(table, dtype=torch.float32)
        text_config = SimpleNamespace(vocab_size=self.table.shape[1], max_position_embeddings=positions)
        self.config = SimpleNamespace(get_text_config=lambda: text_config)
        self.device = torch.device("cpu")
        self.alive = []
        self.most_alive = 0

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        logits = self.table[input_ids]
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(logits)]
        self.most_alive = max(self.most_alive, len(self.alive))
        return SimpleNamespace(logits=logits)


def constant(*probabilities: float) -> Bigram:
    """The same distribution after every token."""
    return Bigram(torch.tensor(probabilities).log().expand(len(probabilities), -1))


def test_perplexity_is_that_of_a_plain_computation() -> None:
    windows = cut_windows(TEXT, tiny_lm.tokenizer(), window=64, max_tokens=300)
    assert windows.shape == (4, 64)
    quality = evaluate(tiny_lm.model(), windows)
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = tiny_lm.model()(window.unsqueeze(0)).logits[0].double()
            for position in range(63):
                losses.append(-float(logits[position].log_softmax(-1)[window[position + 1]]))
    assert quality.tokens == len(losses) == 4 * 63
    assert quality.perplexity == pytest.approx(math.exp(statistics.mean(losses)), rel=1e-5)
    window_means = [statistics.mean(losses[63 * index : 63 * (index + 1)]) for index in range(4)]
    error = quality.perplexity * statistics.stdev(window_means) / 2
    assert quality.perplexity_error == pytest.approx(error, rel=1e-4)


def test_a_model_does_not_diverge_from_itself() -> None:
    windows = cut_windows(TEXT, tiny_lm.tokenizer(), window=32, max_tokens=96)
    quality = evaluate(tiny_lm.model(), windows, reference=tiny_lm.model())
    assert (quality.kl, quality.kl_reverse, quality.top1_agreement) == (0.0, 0.0, 1.0)
    assert (quality.perplexity_ratio, quality.perplexity_ratio_error) == (1.0, 0.0)
    assert quality.reference_perplexity == quality.perplexity
    assert evaluate(tiny_lm.model(), windows).perplexity == quality.perplexity


def test_divergence_of_two_known_distributions() -> None:
    model, reference = constant(0.5, 0.25, 0.25), constant(0.25, 0.25, 0.5)
    windows = torch.tensor([[0, 0, 2], [1, 2, 2]])
    quality = evaluate(model, windows, reference=reference)
    kl = 0.25 * math.log(0.5) + 0.5 * math.log(2)  # reference against model
    assert quality.kl == pytest.approx(kl, rel=1e-6)
    assert quality.kl_reverse == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5), rel=1e-6)
    assert quality.top1_agreement == 0.0
    # Targets 0, 2 | 2, 2.
    model_means = [(math.log(2) + math.log(4)) / 2, math.log(4)]
    reference_means = [(math.log(4) + math.log(2)) / 2, math.log(2)]
    assert quality.perplexity == pytest.approx(math.exp(statistics.mean(model_means)), rel=1e-6)
    assert quality.reference_perplexity == pytest.approx(math.exp(statistics.mean(reference_means)), rel=1e-6)
    gaps = [a - b for a, b in zip(model_means, reference_means, strict=True)]
    ratio = math.exp(statistics.mean(gaps))
    assert quality.perplexity_ratio == pytest.approx(ratio, rel=1e-6)
    assert quality.perplexity_ratio_error == pytest.approx(ratio * statistics.stdev(gaps) / math.sqrt(2), rel=1e-6)
    error = quality.perplexity * statistics.stdev(model_means) / math.sqrt(2)
    assert quality.perplexity_error == pytest.approx(error, rel=1e-6)
    assert quality.kl_error == pytest.approx(0.0, abs=1e-9)


def test_divergence_is_not_symmetric_and_counts_every_row() -> None:
    model, reference = constant(0.7, 0.2, 0.1), constant(0.1, 0.8, 0.1)
    quality = evaluate(model, torch.zeros(2, 300, dtype=torch.int64), reference=reference)
    forward = sum(q * math.log(q / p) for p, q in ((0.7, 0.1), (0.2, 0.8), (0.1, 0.1)))
    backward = sum(p * math.log(p / q) for p, q in ((0.7, 0.1), (0.2, 0.8), (0.1, 0.1)))
    assert quality.kl == pytest.approx(forward, rel=1e-5)
    assert quality.kl_reverse == pytest.approx(backward, rel=1e-5)
    assert quality.tokens == 598


def test_the_median_is_of_windows_and_the_percentile_of_tokens() -> None:
    """After token i the model has moved by i + 1 steps from a reference that says the same after every token."""
    reference = torch.zeros(4, 4)
    table = torch.eye(4) * torch.arange(4.0).unsqueeze(1)
    windows = torch.tensor([[0, 0, 0], [1, 1, 0], [3, 3, 0], [0, 2, 0], [0, 3, 0]])
    quality = evaluate(Bigram(table), windows, reference=Bigram(reference))
    after = [(math.log(3 + math.exp(move)) - move / 4) - math.log(4) for move in range(4)]
    means = [(after[one] + after[two]) / 2 for one, two in ((0, 0), (1, 1), (3, 3), (0, 2), (0, 3))]
    assert quality.per_window is not None
    assert quality.per_window.kl == pytest.approx(means, rel=1e-12, abs=1e-15)
    assert quality.kl_median == pytest.approx(statistics.median(means), rel=1e-12)
    assert quality.kl_median != pytest.approx(statistics.mean(means), rel=0.1)
    tokens = sorted([after[0]] * 4 + [after[1]] * 2 + [after[2]] + [after[3]] * 3)
    assert quality.kl_p99 == pytest.approx(tokens[-1], rel=1e-12)
    assert quality.kl == pytest.approx(statistics.mean(tokens), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_divergence_far_below_what_float32_resolves_is_exact(dtype: torch.dtype) -> None:
    """Logits are taken as they are, in the dtype of the model, and all that follows is float64."""
    step = 2.0**-7 if dtype is torch.bfloat16 else 2.0**-20
    logits = torch.zeros(3, 3)
    logits[:, 0] = 1.0
    other = logits.clone()
    other[:, 0] += step
    model, reference = Bigram(other), Bigram(logits)
    for one in (model, reference):
        one.table = one.table.to(dtype)
    quality = evaluate(model, torch.tensor([[0, 1, 2]]), reference=reference)
    q = [math.e / (math.e + 2), 1 / (math.e + 2)]
    exact = math.log1p(q[0] * math.expm1(step)) - q[0] * step  # log of the ratio of the sums, less the mean gap
    assert quality.kl == pytest.approx(exact, rel=1e-3)
    assert quality.kl < 1e-5 and (dtype is torch.bfloat16 or 0 < quality.kl < 1e-12)


def test_rows_are_compared_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = torch.randint(0, 5, (2, 40), generator=torch.Generator().manual_seed(1))
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(2))
    whole = evaluate(Bigram(table), windows, reference=Bigram(table.flip(0)))
    monkeypatch.setattr(quality_module, "CHUNK", 15)
    pieces = evaluate(Bigram(table), windows, reference=Bigram(table.flip(0)))
    assert whole.to_dict() == pytest.approx(pieces.to_dict(), rel=1e-12)
    assert whole.kl_p99 == pieces.kl_p99 > whole.kl > 0


def test_means_of_windows_are_kept_and_make_the_summary() -> None:
    windows = torch.tensor([[0, 0, 2], [1, 2, 2], [2, 1, 0]])
    quality = evaluate(constant(0.5, 0.25, 0.25), windows, reference=constant(0.25, 0.25, 0.5))
    kept = quality.per_window
    assert kept is not None and kept.reference_nll is not None and "per_window" not in quality.to_dict()
    assert {name: len(values) for name, values in kept.to_dict().items()} == dict.fromkeys(
        ("nll", "reference_nll", "kl", "kl_reverse", "flips"), 3
    )
    assert quality.perplexity == pytest.approx(math.exp(statistics.mean(kept.nll)))
    assert quality.reference_perplexity == pytest.approx(math.exp(statistics.mean(kept.reference_nll)))
    alone = evaluate(constant(0.5, 0.25, 0.25), windows)
    assert alone.per_window is not None and alone.per_window.to_dict() == {"nll": list(kept.nll)}


def test_flips_and_their_error() -> None:
    table = torch.zeros(2, 2)
    table[0, 0] = table[1, 1] = 1.0
    other = torch.zeros(2, 2)
    other[:, 0] = 1.0  # agrees after token 0 only
    windows = torch.tensor([[0, 0, 0, 1, 0], [1, 1, 1, 1, 0], [0, 0, 1, 1, 0]])
    quality = evaluate(Bigram(table), windows, reference=Bigram(other))
    fractions = [1 / 4, 1.0, 2 / 4]
    assert quality.flips == pytest.approx(statistics.mean(fractions))
    assert quality.flips_error == pytest.approx(statistics.stdev(fractions) / math.sqrt(3))
    assert quality.top1_agreement == pytest.approx(1 - quality.flips)
    assert quality.to_dict()["top1_agreement_error"] == quality.flips_error


def test_one_window_has_no_standard_error() -> None:
    quality = evaluate(constant(0.5, 0.5), torch.tensor([[0, 1, 1]]), reference=constant(0.5, 0.5))
    assert quality.perplexity == pytest.approx(2.0)
    assert quality.perplexity_error is None and quality.kl_error is None
    assert "perplexity_error" not in quality.to_dict() and quality.to_dict()["kl"] == 0.0


def test_to_dict_leaves_out_what_was_not_measured() -> None:
    quality = Quality(windows=2, window=3, tokens=4, perplexity=1.5, perplexity_error=0.25)
    assert quality.to_dict() == {
        "windows": 2,
        "window": 3,
        "tokens": 4,
        "perplexity": 1.5,
        "perplexity_error": 0.25,
    }


def test_at_most_one_window_of_logits_is_alive() -> None:
    model = constant(0.5, 0.5)
    evaluate(model, torch.zeros(6, 8, dtype=torch.int64))
    assert model.most_alive == 1


def test_progress_counts_windows() -> None:
    seen = []
    evaluate(constant(0.5, 0.5), torch.zeros(3, 4, dtype=torch.int64), progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_windows_do_not_overlap_and_the_last_part_is_dropped() -> None:
    ids = tiny_lm.tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    windows = cut_windows(TEXT, tiny_lm.tokenizer(), window=100)
    assert windows.dtype == torch.int64
    assert windows.flatten().tolist() == ids[: len(ids) // 100 * 100]
    assert cut_windows(TEXT, tiny_lm.tokenizer(), window=100, max_tokens=250).shape == (2, 100)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("one two", {"window": 64}, "less than one window of 64"),
        (TEXT, {"window": 1}, "at least 2 tokens"),
        (TEXT, {"window": 64, "max_tokens": 63}, "max_tokens is 63, less than one window of 64"),
    ],
)
def test_text_and_window_that_do_not_fit(text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cut_windows(text, tiny_lm.tokenizer(), **options)


@pytest.mark.parametrize(
    ("model", "reference", "windows", "message"),
    [
        (constant(0.5, 0.5), constant(0.5, 0.25, 0.25), [[0, 1]], "vocabulary of 2 tokens and the reference one of 3"),
        (constant(0.5, 0.5), None, [[0, 7]], "token 7 but the model has a vocabulary of 2"),
        (Bigram(torch.zeros(2, 2), positions=3), None, [[0, 1, 0, 1]], "4 tokens exceeds the model's 3 positions"),
    ],
)
def test_models_that_do_not_fit_the_text(
    model: Any, reference: Bigram | None, windows: list[list[int]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(model, torch.tensor(windows), reference=reference)


def test_logits_that_are_not_finite_are_not_averaged() -> None:
    with pytest.raises(TersorError, match="window 1 gives logits that are not finite") as caught:
        table = torch.zeros(3, 3)
        table[2] = math.nan
        evaluate(Bigram(table), torch.tensor([[0, 1, 0], [0, 2, 0]]))
    assert caught.value.exit_status == 1


class Starving(Bigram):
    """A model for which there is too little GPU memory."""

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


def test_too_little_gpu_memory_is_one_line() -> None:
    with pytest.raises(TersorError, match="GPU memory ran out in a window of 4 tokens: use a smaller one"):
        evaluate(Starving(torch.zeros(2, 2)), torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_told_with_window_token_and_layer(bad: float) -> None:
    model = copy.deepcopy(tiny_lm.model())
    windows = cut_windows(TEXT, tiny_lm.tokenizer(), window=32, max_tokens=96)
    model.model.layers[-1].mlp.down_proj.register_forward_hook(lambda m, a, y: y.index_fill(1, torch.tensor([5]), bad))
    with pytest.raises(
        TersorError, match=r"^window 0 .*, from token 6 on, first in model\.layers\.\d+\.mlp\.down"
    ) as caught:
        evaluate(model, windows)
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value)
    with pytest.raises(TersorError, match=r"^reference window 0 gives logits that are not finite"):
        evaluate(tiny_lm.model(), windows, reference=model)


def test_tokens_that_both_models_exclude_count_nothing() -> None:
    table = torch.tensor([[0.0, 1.0, -math.inf], [0.5, 0.0, -math.inf], [0.0, 0.0, 0.0]])
    windows = torch.tensor([[0, 1, 0, 1]])
    quality = evaluate(Bigram(table), windows, reference=Bigram(table + torch.tensor([0.0, 0.1, 0.0])))
    plain = evaluate(Bigram(table[:2, :2]), windows, reference=Bigram(table[:2, :2] + torch.tensor([0.0, 0.1])))
    assert quality.kl == pytest.approx(plain.kl, rel=1e-6) and quality.kl_reverse == pytest.approx(plain.kl_reverse)


def test_an_infinite_divergence_or_perplexity_is_one_line() -> None:
    whole, part = torch.zeros(3, 3), torch.zeros(3, 3)
    part[:, 2] = -math.inf
    with pytest.raises(TersorError, match="window 0: the KL divergence is infinite"):
        evaluate(Bigram(part), torch.tensor([[0, 1, 0]]), reference=Bigram(whole))
    with pytest.raises(TersorError, match="window 0 holds a token of probability zero"):
        evaluate(Bigram(part), torch.tensor([[0, 2, 0]]))


def test_a_loss_too_large_for_a_perplexity_is_one_line() -> None:
    table = torch.tensor([[0.0, -1000.0], [-1000.0, 0.0]])
    with pytest.raises(TersorError, match="the loss is 1000 nats a token, too large for a perplexity"):
        evaluate(Bigram(table), torch.tensor([[0, 1, 0]]))
    with pytest.raises(TersorError, match="the reference's loss is 1000 nats"):
        evaluate(Bigram(torch.zeros(2, 2)), torch.tensor([[0, 1, 0]]), reference=Bigram(table))
