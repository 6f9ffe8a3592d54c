"""Errors: exit statuses, who is whose kind, suggestions."""

from __future__ import annotations

import pytest

from tersor import errors
from tersor.errors import InputError, NonFiniteError, TersorError, did_you_mean

ALL = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, TersorError)]


@pytest.mark.parametrize("kind", ALL)
def test_bad_input_exits_with_2_and_failures_with_1(kind: type[TersorError]) -> None:
    bad_input = {"InputError", "FormatError", "CheckpointError", "ShapeError", "NonFiniteError"}
    failures = {"TersorError", "OutputError", "KernelError", "UnsupportedError", "LostError"}
    assert kind.__name__ in bad_input | failures
    assert kind.exit_status == (2 if kind.__name__ in bad_input else 1)
    assert issubclass(kind, ValueError) == (kind.__name__ in bad_input)


def test_a_non_finite_weight_is_told_with_value_and_index() -> None:
    error = NonFiniteError((3, 17), float("-inf"), "model.layers.0.mlp.up_proj.weight")
    assert isinstance(error, InputError)
    assert (error.index, error.value) == ((3, 17), float("-inf"))
    assert str(error).startswith("model.layers.0.mlp.up_proj.weight holds -inf at [3, 17]")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("fp6_e4m2", ", did you mean 'fp6_e3m2'?"),
        ("reference", ""),
        ("", ""),
    ],
)
def test_did_you_mean(word: str, expected: str) -> None:
    assert did_you_mean(word, ["fp6_e3m2", "int4"]) == expected


def test_did_you_mean_takes_any_iterable() -> None:
    assert did_you_mean("qunatize", iter(("eval", "quantize"))) == ", did you mean 'quantize'?"
