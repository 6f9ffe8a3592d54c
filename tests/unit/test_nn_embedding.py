"""PackedEmbedding and TiedLinear: what they look up, hold, share, cast, save and compile."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tersor import ops
from tersor.checkpoint.names import stored_tensors
from tersor.compress import quantize_rtn
from tersor.errors import FormatError, ShapeError
from tersor.formats import Scheme, get_scheme
from tersor.layouts import PackedWeight
from tersor.nn import PackedEmbedding, PackedLinear, TiedLinear
from tersor.ops import reference

SCHEMES = [
    get_scheme("fp6_e3m2"),
    get_scheme("fp5_e2m2", 8, "bfloat16"),
    get_scheme("int4", 16, "float32"),
    get_scheme("uint3", 8),
    get_scheme("mxfp6_e2m3"),
]
TILES = "tiles_float16"
IDS = torch.tensor([[3, 0, 23], [3, 7, 11]])


def weight_of(scheme: Scheme, rows: int = 24, columns: int = 64, seed: int = 0) -> PackedWeight:
    torch.manual_seed(seed)
    return PackedWeight.from_encoded(quantize_rtn(torch.randn(rows, columns), scheme))


def make(
    scheme: Scheme = SCHEMES[0], rows: int = 24, columns: int = 64, dtype: torch.dtype = torch.float32, **options: Any
) -> PackedEmbedding:
    layer = PackedEmbedding(rows, columns, scheme, dtype=dtype, **options)
    layer._set_weight(weight_of(scheme, rows, columns))
    return layer


def tied(scheme: Scheme = SCHEMES[0], dtype: torch.dtype = torch.float32) -> Any:
    """An embedding and the head that shares its weight, as a model holds them."""
    model = torch.nn.ModuleDict({"embedding": make(scheme, dtype=dtype)})
    head = TiedLinear(64, 24, scheme, dtype=dtype)
    head.tie(model["embedding"])
    model["head"] = head
    return model


def shared(model: Any) -> bool:
    names = ("weight_packed", "weight_scale")
    return all(getattr(model["embedding"], n).data_ptr() == getattr(model["head"], n).data_ptr() for n in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.key())
def test_rows_are_those_of_the_decoded_weight(scheme: Scheme, dtype: torch.dtype) -> None:
    layer = make(scheme, dtype=dtype)
    decoded = layer.packed_weight().dequantize().to(dtype)
    for ids in (IDS, IDS.int(), IDS[0, 0], IDS[:, :0], IDS.T):
        rows = layer(ids)
        assert rows.dtype == dtype
        assert rows.shape == (*ids.shape, 64)
        assert torch.equal(rows, decoded[ids.long()])


def test_blocks_of_rows_join(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    expected = layer(IDS)
    monkeypatch.setitem(reference.BLOCK_ELEMENTS, "cpu", 128)
    assert torch.equal(layer(IDS), expected)


def test_columns_that_do_not_fill_words() -> None:
    layer = make(get_scheme("fp5_e3m1"), rows=9, columns=50)
    assert torch.equal(layer(torch.arange(9)), layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factor_of_gemma_is_rounded_to_the_dtype(dtype: torch.dtype) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

    layer = make(embed_scale=3072**0.5, dtype=dtype)
    plain = GemmaTextScaledWordEmbedding(24, 64, None, embed_scale=3072**0.5)
    plain.weight = torch.nn.Parameter(layer.weight)
    assert torch.equal(layer(IDS), plain(IDS))
    assert not torch.equal(layer(IDS), make(dtype=dtype)(IDS))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.key())
@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casting_changes_the_rows_only(scheme: Scheme, cast: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    model = tied(scheme)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cast(model)
    after = model.state_dict()
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model["embedding"](IDS).dtype == model["embedding"].dtype == model["head"].dtype != torch.float32
    assert shared(model)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.key())
def test_the_head_multiplies_with_the_weight_of_the_embedding(scheme: Scheme) -> None:
    model = tied(scheme)
    x = torch.randn(3, 64)
    expected = torch.nn.functional.linear(x.double(), model["embedding"].weight.double())
    torch.testing.assert_close(model["head"](x).double(), expected, rtol=1e-5, atol=1e-5)
    stored = stored_tensors(scheme, 24, 64)
    assert set(model.state_dict()) == {f"embedding.{name}" for name in stored}
    assert shared(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_among_themselves(duplicate: Callable[[Any], Any]) -> None:
    model = tied()
    other = duplicate(model)
    assert shared(other)
    assert other["head"].source is other["embedding"]
    assert other["embedding"].weight_packed.data_ptr() != model["embedding"].weight_packed.data_ptr()


def test_the_head_follows_a_state_dict_in_any_layout() -> None:
    scheme = SCHEMES[0]
    state = {f"embedding.{n}": t for n, t in PackedLinear.from_packed(weight_of(scheme, seed=5)).state_dict().items()}
    for layout in ("stream", TILES):
        model = tied(scheme)
        model["head"]._set_weight(model["head"].packed_weight().to_layout(layout))
        assert set(model.state_dict()) == set(state)
        old = model["head"].weight
        model.load_state_dict(state)
        assert not torch.equal(model["head"].weight, old)
        assert torch.equal(model["head"].weight, model["embedding"].weight)
        model["head"](torch.randn(1, 64))
        assert shared(model)


def test_moving_away_and_back_shares_again() -> None:
    model = tied()
    state = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert shared(model)
    assert torch.equal(model["head"].weight, tied()["head"].weight)


def test_compiles_in_one_graph() -> None:
    model = tied(SCHEMES[2])

    def run(ids: torch.Tensor) -> torch.Tensor:
        return model["head"](torch.nn.functional.silu(model["embedding"](ids)))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ids in (IDS, IDS[:1], IDS.T):
        assert torch.equal(compiled(ids), run(ids))


def test_bad_input_is_named() -> None:
    with pytest.raises(FormatError, match="group size 48 does not divide the 64 input channels"):
        PackedEmbedding(8, 64, get_scheme("int4", 48))
    layer = make()
    with pytest.raises(ShapeError, match=r"ids are torch\.float32, expected int64 or int32"):
        layer(IDS.float())
    with pytest.raises(ShapeError, match="ids are on meta, the weight on cpu"):
        layer(IDS.to("meta"))
    with pytest.raises(IndexError):
        layer(torch.tensor([24]))
    with pytest.raises(ShapeError, match=f"lies in {TILES}"):
        ops.embedding(IDS, layer.packed_weight().to_layout(TILES), torch.float32)
    with pytest.raises(RuntimeError, match=r"weight_packed is torch.int32 \[24, 8\]; fp6_e3m2:row:float16 stores"):
        layer.load_state_dict(make(get_scheme("int4")).state_dict())


def test_repr_says_shape_and_scheme() -> None:
    text = repr(make(padding_idx=2, embed_scale=8.0))
    assert "24, 64, padding_idx=2, embed_scale=8.0, scheme=fp6_e3m2:row:float16, bits_per_weight=6.250" in text
