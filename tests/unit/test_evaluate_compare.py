"""Two models on the same windows, a model and its way of running, and the noise below which nothing can be said."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny_lm

from tersor.convert import quantize
from tersor.errors import InputError
from tersor.evaluate import PerWindow, Quality, RoundedInputs, compare, engine_model, evaluate, subject
from tersor.evaluate.predictors import TransformersModel
from tersor.formats import Activations
from tersor.integrations.transformers import load

CPU = torch.device("cpu")


def quality(nll: list[float], kl: list[float] | None = None, window: int = 8) -> Quality:
    """What a measurement keeps, and no more."""
    kept = PerWindow(nll=tuple(nll), kl=None if kl is None else tuple(kl))
    return Quality(windows=len(nll), window=window, tokens=1, perplexity=1.0, perplexity_error=None, per_window=kept)


def test_a_difference_is_paired_so_that_hard_windows_cancel() -> None:
    hard = [1.0, 5.0, 2.0, 9.0]
    gaps = [0.02, 0.01, 0.03, -0.01]
    found = compare(quality(hard, hard), quality([a + d for a, d in zip(hard, gaps, strict=True)], [9.0, 0, 0, 9.0]))
    assert found.log_perplexity_difference == pytest.approx(statistics.mean(gaps))
    assert found.log_perplexity_difference_error == pytest.approx(statistics.stdev(gaps) / 2)
    assert (found.log_perplexity_better, found.windows) == (3, 4)
    assert found.kl_difference == pytest.approx(1 / 4) and found.kl_better == 1, "equal windows count for neither"
    back = compare(quality([a + d for a, d in zip(hard, gaps, strict=True)]), quality(hard))
    assert back.log_perplexity_difference == pytest.approx(-found.log_perplexity_difference)
    assert back.log_perplexity_better == 1 and back.kl_difference is None and "kl_better" not in back.to_dict()


def test_models_that_were_measured_on_other_windows_are_not_compared() -> None:
    with pytest.raises(InputError, match="2 windows of 8 tokens and 3 of 8 are not the same text"):
        compare(quality([1.0, 2.0]), quality([1.0, 2.0, 3.0]))
    with pytest.raises(InputError, match="2 windows of 8 tokens and 2 of 9"):
        compare(quality([1.0, 2.0]), quality([1.0, 2.0], window=9))
    with pytest.raises(InputError, match="not kept"):
        compare(quality([1.0]), Quality(windows=1, window=8, tokens=7, perplexity=1.0, perplexity_error=None))


def test_one_window_gives_a_difference_without_an_error() -> None:
    found = compare(quality([1.0]), quality([1.5]))
    assert found.to_dict() == {"windows": 1, "log_perplexity_difference": 0.5, "log_perplexity_better": 1}


def test_a_model_says_how_it_runs_and_the_options_hold_for_the_others() -> None:
    plain = subject("some/model")
    assert (plain.name, plain.activations, plain.kv_dtype, plain.label) == (
        "some/model",
        Activations.NATIVE,
        None,
        "some/model",
    )
    by_option = subject("some/model", activations="fp8", kv_dtype="float16")
    assert (by_option.activations, by_option.kv_dtype, by_option.label) == (Activations.E4M3, "float16", "some/model")
    own = subject("some/model@activations=16bit, kv_dtype=fp8", activations="fp8", kv_dtype="float16")
    assert (own.name, own.activations, own.kv_dtype) == ("some/model", Activations.NATIVE, "fp8")
    assert own.label == "some/model@activations=16bit, kv_dtype=fp8"
    assert own.pages.pages_dtype is torch.float8_e4m3fn and plain.pages.pages_dtype is None


def test_a_directory_whose_name_holds_the_sign_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run@kv-dtype=fp8").mkdir()
    monkeypatch.chdir(tmp_path)
    assert subject("run@kv-dtype=fp8").kv_dtype is None
    own = subject("run@kv-dtype=fp8@kv-dtype=bfloat16")
    assert (own.name, own.kv_dtype, own.label) == ("run@kv-dtype=fp8", "bfloat16", "run@kv-dtype=fp8@kv-dtype=bfloat16")
    assert subject("folder@2026/model").name == "folder@2026/model"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("m@fp8", "behind @ stands how the model runs, such as @kv-dtype=fp8"),
        ("m@main", "a branch or tag is --revision"),
        ("m@", "behind @ stands"),
        ("@kv-dtype=fp8", "behind @ stands"),
        ("m@kv-dtype=fp8,", "behind @ stands"),
        ("m@kv-dtyp=fp8", "option 'kv-dtyp', did you mean 'kv-dtype'?: there are activations and kv-dtype"),
        ("m@kv-dtype=fp9", "'m@kv-dtype=fp9': kv_dtype 'fp9', did you mean 'fp8'?"),
        ("m@activations=fp9", "activations 'fp9', did you mean 'fp8'?"),
        ("m@kv-dtype=fp8,kv-dtype=auto", "kv-dtype is given twice"),
    ],
)
def test_a_way_of_running_that_there_is_not_is_one_line(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        subject(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(2, 8192, (2, 48), generator=torch.Generator().manual_seed(1))


def test_rounded_inputs_move_a_model_little_and_far_less_than_six_bits_do(
    windows: torch.Tensor, tmp_path: Path
) -> None:
    base = TransformersModel(tiny_lm.model())
    floor = evaluate(RoundedInputs(base), windows, reference=base)
    assert floor.kl is not None and floor.kl_median is not None
    assert 1e-7 < floor.kl < 1e-4 and 0 < floor.kl_median < 1e-4
    assert evaluate(base, windows, reference=tiny_lm.model()).kl == 0.0, "nothing is left of the rounding"
    quantize(tiny_lm.TINY, tmp_path / "packed", format="fp6_e2m3")
    packed = load.ready_model(tmp_path / "packed", "cpu")
    compressed = evaluate(packed, windows, reference=base)
    assert compressed.kl is not None and compressed.kl > 10 * floor.kl
    rounded = evaluate(RoundedInputs(TransformersModel(packed)), windows, reference=packed)
    assert rounded.kl == pytest.approx(floor.kl, rel=0.7), "packed products get rounded inputs too"


def test_the_engine_has_the_same_noise(windows: torch.Tensor) -> None:
    base, engine = TransformersModel(tiny_lm.model()), engine_model(tiny_lm.TINY, CPU)
    (one, two) = (evaluate(RoundedInputs(model), windows, reference=model).kl for model in (base, engine))
    assert one is not None and two == pytest.approx(one, rel=0.5)


PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": lambda x, weight, rest: torch.nn.functional.linear(x, weight, rest[0]),
    "linear of three dimensions": lambda x, weight, rest: torch.nn.functional.linear(x[None], weight)[0],
    "mm": lambda x, weight, rest: x @ weight.T,
    "addmm": lambda x, weight, rest: torch.addmm(rest, x, weight.T),
}
"""Ways in which models multiply rows [7, 24] with a weight [5, 24]; the rest is added."""


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_rows_are_rounded_and_weights_and_sums_are_not(product: Callable[..., torch.Tensor]) -> None:
    x, weight, rest = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for seed, shape in enumerate([(7, 24), (5, 24), (7, 5)])
    )

    class Model:
        vocabulary, positions, dtype = 5, None, torch.float32

        def logits(self, tokens: torch.Tensor) -> torch.Tensor:
            return product(x[tokens], weight, rest)

        def not_finite(self, tokens: torch.Tensor) -> str:
            return ""

    with torch.inference_mode():
        found = RoundedInputs(Model()).logits(torch.arange(7))
        assert found.equal(product(x.bfloat16().float(), weight, rest))
        assert not found.equal(product(x, weight, rest))
