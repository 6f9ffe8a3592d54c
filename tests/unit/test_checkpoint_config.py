"""`quantization_config`: strict to read, exact to write, asked by module name."""

from __future__ import annotations

import json

import pytest

from tersor.checkpoint import Override, QuantizationConfig
from tersor.checkpoint.config import parse_override, parse_overrides
from tersor.errors import CheckpointError, FormatError, InputError
from tersor.formats import get_scheme

FP6, INT8, MX = get_scheme("fp6_e3m2"), get_scheme("int8", 64), get_scheme("mxfp6_e2m3")
PLAIN = {"quant_method": "tersor", "version": 1, "format": "fp6_e3m2"}


def test_the_first_override_decides_and_ignore_wins() -> None:
    config = QuantizationConfig(
        FP6, (Override("down_proj", INT8), Override(r"layers\.1\.", MX)), ("lm_head", r"\.0\..*up")
    )
    assert config.resolve("model.layers.1.mlp.down_proj") == INT8
    assert config.resolve("model.layers.1.mlp.up_proj") == MX
    assert config.resolve("model.layers.2.mlp.up_proj") == FP6
    assert config.resolve("model.layers.0.mlp.up_proj") is None
    assert config.resolve("lm_head") is None


@pytest.mark.parametrize("patterns", [("a", "b"), ("b", "a"), ("b", "(?i)A", r"c\.d")])
def test_what_is_written_is_read_even_with_sorted_keys(patterns: tuple[str, ...]) -> None:
    overrides = tuple(Override(pattern, scheme) for pattern, scheme in zip(patterns, (INT8, MX, FP6), strict=False))
    config = QuantizationConfig(FP6, overrides, ("lm_head",), {"tersor": "1"})
    read = QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True)))
    assert (read.scheme, read.ignore, read.provenance) == (config.scheme, config.ignore, config.provenance)
    for name in ("xa", "xb", "ab", "ba", "c.d", "xyz"):
        assert read.resolve(name) == config.resolve(name)


def test_defaults() -> None:
    config = QuantizationConfig.from_dict(PLAIN)
    assert config == QuantizationConfig(FP6)
    assert config.to_dict()["group_size"] is None and config.to_dict()["scale_dtype"] == "float16"


BROKEN = {
    "not an object": ([], "not an object"),
    "other method": ({**PLAIN, "quant_method": "awq"}, "quant_method is 'awq', not 'tersor'"),
    "newer": ({**PLAIN, "version": 7}, "version 7 and this Tersor reads up to version 5: update it"),
    "no version": ({"quant_method": "tersor", "format": "int4"}, "version is None"),
    "unknown key": ({**PLAIN, "groupsize": 64}, "unknown key 'groupsize', did you mean 'group_size'"),
    "no format": ({"quant_method": "tersor", "version": 1}, "format missing"),
    "format": ({**PLAIN, "format": "fp6_e4m2"}, "unknown format 'fp6_e4m2', did you mean"),
    "group size": ({**PLAIN, "group_size": "64"}, "group_size is '64', not a whole number"),
    "scale dtype": ({**PLAIN, "scale_dtype": "half"}, "unknown scale dtype 'half'"),
    "ignore": ({**PLAIN, "ignore": "lm_head"}, "ignore is 'lm_head', not a list"),
    "ignore pattern": ({**PLAIN, "ignore": ["("]}, r"'\(' is not a regular expression"),
    "overrides": ({**PLAIN, "overrides": ["a"]}, "overrides is .*, not an object"),
    "override key": ({**PLAIN, "overrides": {"a": {"format": "int4", "bits": 4}}}, "override 'a': unknown key 'bits'"),
    "override format": ({**PLAIN, "overrides": {"a": {"format": "int9"}}}, "override 'a': unknown format 'int9'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_configs_are_one_line(case: str) -> None:
    raw, message = BROKEN[case]
    with pytest.raises((CheckpointError, FormatError, InputError), match=message) as caught:
        QuantizationConfig.from_dict(raw)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("down=int8", ("down", "int8:g128:bfloat16")),
        ("down=int8:g64", ("down", "int8:g64:bfloat16")),
        ("down=int8:row", ("down", "int8:row:bfloat16")),
        ("down=int8:g32:float32", ("down", "int8:g32:float32")),
        ("down=mxfp4_e2m1", ("down", "fp4_e2m1:g32:e8m0")),
        ("(?=a)b=fp6", ("(?=a)b", "fp6_e2m3:g128:bfloat16")),
    ],
)
def test_overrides_take_what_they_do_not_name_from_the_rest(text: str, expected: tuple[str, str]) -> None:
    override = parse_override(text, 128, "bfloat16")
    assert (override.pattern, override.scheme.key()) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("down", "'down' is not REGEX=FORMAT"),
        ("=int8", "is not REGEX=FORMAT"),
        ("down=", "is not REGEX=FORMAT"),
        ("[=int8", "not a regular expression"),
        ("down=int9", "override 'down=int9': unknown format 'int9'"),
        ("down=int8:x64", "unknown scale dtype 'x64'"),
        ("down=int8:64", "64 is no scale dtype: a group size is written g64"),
        ("down=int8:g64:g32:row", "g64 and g32 and row both say who shares a scale: keep one of them"),
        ("down=int8:row:row", "row and row both say who shares a scale"),
        ("down=int8:g64:row", "g64 and row both say"),
        ("down=int8:float16:g64:bfloat16", "float16 and bfloat16 both say the scales' dtype"),
        ("down=int8:", "nothing stands after a colon"),
        ("down=int8::row", "nothing stands after a colon"),
        ("down=:g64", "unknown format ''"),
        ("down=int8:g0", "group size 0 is not a positive .* or write row in an override"),
        ("down=int8:g-1", "group size -1 is not a positive .* or write row in an override"),
        ("down=mxfp4_e2m1:row", "mxfp4_e2m1 has groups of 32, not one scale a row"),
        ("down=mxfp4_e2m1:g64", "has groups of 32 with e8m0 scales"),
        ("down=mxfp9", "unknown format 'mxfp9', did you mean 'mx"),
        ("down=FP6_E3M3", "unknown format 'FP6_E3M3', did you mean 'fp"),
    ],
)
def test_malformed_overrides(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_override(text)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["down=int8", "up=int4", "down=int4"], r"'down' stands there twice \(int8:row:float16 and int4:row:float16\)"),
        (["down=int8", "down=int8"], "'down' stands there twice"),
        ({"down": None}, "override 'down' is None: give a format"),
        ({"down": 8}, "override 'down' is 8: give a format"),
        ({"down": {"format": "int8", "bits": 8}}, "override 'down': unknown key 'bits'"),
        ({"down": {"format": "int8", "group_size": True}}, "group_size is True, not a whole number"),
        ({"": "int8"}, "an empty pattern finds every module"),
        ({3: "int8"}, "3 is not a pattern"),
        ([("down", "int8")], r"is not REGEX=FORMAT"),
        (7, "overrides is 7: give a list"),
        (["a{99999999999999999999}=int8"], "is not a regular expression"),
    ],
)
def test_overrides_that_contradict_or_are_none_are_one_line(overrides: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_overrides(overrides)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_overrides_are_the_same_as_texts_and_as_mappings() -> None:
    texts = parse_overrides(["down=int8:g64", "up=int4:row"], 32, "bfloat16")
    assert texts == parse_overrides({"down": "int8:g64", "up": "int4:row"}, 32, "bfloat16")
    full = {"format": "int8", "group_size": 64, "scale_dtype": "bfloat16"}
    assert texts[:1] == parse_overrides({"down": full})


@pytest.mark.parametrize("size", [0, -1, 64.0, "64", True, False, float("nan")])
def test_a_group_size_that_is_none_says_what_to_write(size: object) -> None:
    with pytest.raises(FormatError, match=r"is not a positive whole number .* for one scale a row leave it out"):
        get_scheme("int8", size)  # type: ignore[arg-type]


def test_a_scheme_in_place_of_a_format_says_where_the_rest_goes() -> None:
    with pytest.raises(FormatError, match="give 'int8', and group size and scale dtype apart"):
        get_scheme("int8:g64")
