"""How linears run now: one mode of the process, which contexts override for themselves."""

from __future__ import annotations

import threading

import pytest
import torch

from tersor import formats, ops
from tersor.compress import quantize_rtn
from tersor.errors import InputError
from tersor.layouts import PackedWeight
from tersor.ops import mode, prepared
from tersor.ops import multiply as by_type


def packed(oc: int = 16, ic: int = 64) -> PackedWeight:
    scheme = formats.get_scheme("fp6_e3m2")
    weight = torch.randn(oc, ic, generator=torch.Generator().manual_seed(3))
    return PackedWeight.from_encoded(quantize_rtn(weight, scheme))


def test_the_environment_is_read_once_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSOR_KERNEL", "reference")
    assert mode.current() == ops.Mode(reference=True)
    monkeypatch.setenv("TERSOR_KERNEL", "auto")
    assert mode.current().reference
    prepared.forget()
    assert mode.current() == ops.Mode()


def test_contexts_nest_and_end() -> None:
    with ops.using(batch_invariant=True) as outer:
        assert mode.current() is outer and ops.batch_invariant()
        with ops.using(early=False):
            assert ops.batch_invariant() and not mode.current().early
        assert mode.current() is outer
    assert mode.current() == ops.Mode()


def test_a_context_is_its_threads_own() -> None:
    seen: list[bool] = []
    with ops.using(batch_invariant=True):
        thread = threading.Thread(target=lambda: seen.append(ops.batch_invariant()))
        thread.start()
        thread.join()
        assert ops.batch_invariant()
    assert seen == [False]


def test_what_is_set_holds_for_every_thread_but_for_contexts() -> None:
    seen: list[bool] = []
    with ops.using(early=True):
        ops.set_batch_invariant(True)
        assert not ops.batch_invariant()
        thread = threading.Thread(target=lambda: seen.append(ops.batch_invariant()))
        thread.start()
        thread.join()
    assert seen == [True] and ops.batch_invariant()


def test_a_prepared_call_serves_only_the_mode_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        (reference, invariant): ops.Mode(reference=reference, batch_invariant=invariant).key
        for reference in (False, True)
        for invariant in (False, True)
    }
    assert len(set(keys.values())) == 4
    assert {ops.Mode(early=early).key for early in (False, True)} == {ops.Mode().key}


def test_the_type_of_a_weight_says_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled:
        """A weight of another type: it stands for twice a packed one."""

        def __init__(self, weight: PackedWeight) -> None:
            self.weight = weight

    def multiply(
        x: torch.Tensor, weight: Doubled, bias: torch.Tensor | None, residual: torch.Tensor | None, gated: bool
    ) -> torch.Tensor:
        product = ops.gated_linear if gated else ops.linear
        return 2 * product(x, weight.weight, bias, residual=residual)

    monkeypatch.setattr(by_type, "_multiply", dict(by_type._multiply))
    weight, x = packed(), torch.randn(2, 64)
    with pytest.raises(InputError, match="the weight is a Doubled, expected one of: PackedWeight"):
        ops.linear(x, Doubled(weight))  # type: ignore[arg-type]
    by_type.serve_with(Doubled, multiply)
    assert torch.equal(ops.linear(x, Doubled(weight)), 2 * ops.linear(x, weight))  # type: ignore[arg-type]
    assert torch.equal(ops.gated_linear(x, Doubled(weight)), 2 * ops.gated_linear(x, weight))  # type: ignore[arg-type]

    class Quietly(Doubled):
        """A subclass is served as its base."""

    assert torch.equal(ops.linear(x, Quietly(weight)), 2 * ops.linear(x, weight))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"multiplied by .* already"):
        by_type.serve_with(Doubled, lambda *arguments: x)
