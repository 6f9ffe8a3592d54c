"""What does `quantization_config` in config.json say? Parsed strictly, asked by module name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from tersor.errors import CheckpointError, FormatError, InputError, did_you_mean
from tersor.formats import FLOAT_DTYPES, Mix, Outliers, Plain, Scheme, Sparse, get_scheme, plain_values

QUANT_METHOD = "tersor"
VERSION = 5
"""The newest version that is read: that of tables. Outliers are written as 4, pruned weights as 3, mixed ones as 2, the
others as 1, which older readers know."""
_OUTLIERS_VERSION = 4
_SPARSE_VERSION = 3
_MIXED_VERSION = 2
MIXED_FORMAT = "mixed"
"""What `format` says where every output feature has a scheme of its own, one of `levels`."""
_REQUIRED = ("quant_method", "version", "format")
_SCHEME_KEYS = ("format", "group_size", "scale_dtype", "sparse", "outliers")
_OUTLIER_KEYS = ("percent", "dtype")
_KEYS = (*_REQUIRED, *_SCHEME_KEYS[1:], "levels", "overrides", "ignore", "provenance")
_GROUP = re.compile(r"g-?[0-9]{1,9}")

Alike: TypeAlias = Scheme | Sparse
"""How weights are represented of which all output features are alike: in a scheme, or pruned where that is smaller."""

Represented: TypeAlias = Alike | Mix
"""How a weight is represented: as these, or each output feature at one of the levels of a mix."""


@dataclass(frozen=True, slots=True)
class Override:
    """A scheme for the modules whose name a regular expression finds."""

    pattern: str
    scheme: Alike


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """Which module is stored how.

    Attributes:
        scheme: the scheme, or the mix, of every linear module that neither an override nor `ignore` names.
        overrides: schemes for other modules; the first whose pattern `re.search` finds in the module name decides.
        ignore: patterns of modules left as they are; they win over overrides.
        provenance: who made the checkpoint, from what, how: free text values.
    """

    scheme: Represented
    overrides: tuple[Override, ...] = ()
    ignore: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that a weight, or a part of one, may have; one may stand there twice."""
        own = self.scheme.levels if isinstance(self.scheme, Mix) else (self.scheme,)
        said = (*own, *(override.scheme for override in self.overrides))
        found = (one.scheme if isinstance(one, Sparse) else one for one in said)
        return tuple(scheme for scheme in found if scheme is not None)

    @property
    def version(self) -> int:
        """The version that is written: the oldest that can say this."""
        said = (self.scheme, *(override.scheme for override in self.overrides))
        if any(scheme.has_table for scheme in self.schemes):
            return VERSION
        if any(isinstance(one, Scheme) and one.outliers is not None for one in said):
            return _OUTLIERS_VERSION
        if any(isinstance(one, Sparse) for one in said):
            return _SPARSE_VERSION
        return _MIXED_VERSION if isinstance(self.scheme, Mix) else 1

    @property
    def mixes(self) -> tuple[Mix, ...]:
        """Every mix of schemes that a weight may have."""
        return (self.scheme,) if isinstance(self.scheme, Mix) else ()

    @property
    def uniform(self) -> tuple[Scheme, ...]:
        """Every scheme that a whole weight may have; one may stand there twice."""
        own = () if isinstance(self.scheme, Mix) else (self.scheme,)
        return (*own, *(override.scheme for override in self.overrides))

    def resolve(self, *names: str) -> Represented | None:
        """Return the scheme of a linear module, or its mix; `None` where it is left alone.

        Args:
            names: the module's name (without `.weight`), and others that patterns may find it by.
        """
        if any(finds(pattern, names) for pattern in self.ignore):
            return None
        for override in self.overrides:
            if finds(override.pattern, names):
                return override.scheme
        return self.scheme

    def to_dict(self) -> dict[str, Any]:
        """Return the value of `quantization_config`, ready for JSON."""
        return {
            "quant_method": QUANT_METHOD,
            "version": self.version,
            **_represented_to_dict(self.scheme),
            "overrides": {pattern: scheme_to_dict(scheme) for pattern, scheme in _in_sorted_order(self.overrides)},
            "ignore": list(self.ignore),
            "provenance": dict(self.provenance),
        }

    @staticmethod
    def from_dict(raw: Any) -> QuantizationConfig:
        """Parse the value of `quantization_config`.

        Raises:
            CheckpointError: another method, a newer version, unknown or missing keys, values of the wrong type.
            FormatError: unknown formats.
        """
        where = "quantization_config"
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{where} is {raw!r}, not an object")
        method = raw.get("quant_method")
        if method != QUANT_METHOD:
            raise CheckpointError(f"{where}: quant_method is {method!r}, not {QUANT_METHOD!r}")
        version = raw.get("version")
        if type(version) is not int or version < 1:
            raise CheckpointError(f"{where}: version is {version!r}, not a positive whole number")
        if version > VERSION:
            raise CheckpointError(
                f"the checkpoint has {where} version {version} and this Tersor reads up to version {VERSION}: update it"
            )
        _check_keys(raw, _KEYS, _REQUIRED, where)
        overrides = raw.get("overrides") or {}
        ignore = raw.get("ignore") or []
        provenance = raw.get("provenance") or {}
        if not isinstance(overrides, Mapping):
            raise CheckpointError(f"{where}: overrides is {overrides!r}, not an object of patterns")
        if not isinstance(ignore, Sequence) or isinstance(ignore, str):
            raise CheckpointError(f"{where}: ignore is {ignore!r}, not a list of patterns")
        if not isinstance(provenance, Mapping):
            raise CheckpointError(f"{where}: provenance is {provenance!r}, not an object")
        return QuantizationConfig(
            scheme=_represented(raw, where),
            overrides=tuple(
                Override(
                    check_pattern(pattern, f"{where}: overrides"),
                    _scheme(entry, f"{where}: override {pattern!r}"),
                )
                for pattern, entry in overrides.items()
            ),
            ignore=tuple(check_pattern(pattern, f"{where}: ignore") for pattern in ignore),
            provenance={str(key): str(value) for key, value in provenance.items()},
        )


def _in_sorted_order(overrides: Sequence[Override]) -> list[tuple[str, Alike]]:
    """Return patterns and schemes such that sorting the patterns keeps their order.

    transformers sorts the keys of config.json when it saves a model, and the first override that is found decides.
    Patterns that sorting would reorder get a numbered comment, `(?#0)`, which no name has to match; flags, `(?i)`, have
    to stand in front, so they become a group.
    """
    patterns = [override.pattern for override in overrides]
    if patterns != sorted(patterns):
        digits = len(str(len(patterns) - 1))
        scoped = [re.sub(r"^\(\?([aiLmsux]+)\)(.*)", r"(?\1:\2)", pattern) for pattern in patterns]
        patterns = [f"(?#{number:0{digits}}){pattern}" for number, pattern in enumerate(scoped)]
    return [(pattern, override.scheme) for pattern, override in zip(patterns, overrides, strict=True)]


def _represented_to_dict(scheme: Represented) -> dict[str, Any]:
    if isinstance(scheme, Mix):
        return {"format": MIXED_FORMAT, "levels": [scheme_to_dict(level) for level in scheme.levels]}
    return scheme_to_dict(scheme)


def scheme_to_dict(scheme: Alike) -> dict[str, Any]:
    """Return a scheme as three JSON values, with a fourth where weights in it may be pruned or some are outliers."""
    if isinstance(scheme, Sparse):
        values = scheme.values
        said = {"format": values.dtype} if isinstance(values, Plain) else scheme_to_dict(values)
        return {**said, "sparse": True}
    said = {"format": scheme.name, "group_size": scheme.group_size, "scale_dtype": scheme.scale_dtype}
    kept = scheme.outliers
    return said if kept is None else {**said, "outliers": {"percent": kept.percent, "dtype": kept.dtype}}


def finds(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern finds one of the names of a module."""
    return any(re.search(pattern, name) for name in names)


def check_pattern(pattern: Any, where: str) -> str:
    """Return `pattern` when it is a regular expression.

    Raises:
        InputError: it is not; the message says where it stands and what is wrong with it.
    """
    if not isinstance(pattern, str):
        raise InputError(f"{where}: {pattern!r} is not a pattern")
    if not pattern:
        raise InputError(f"{where}: an empty pattern finds every module: name some, or write '.' where all are meant")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: {pattern!r} is not a regular expression: {error}") from None
    return pattern


def parse_ignore(ignore: Sequence[str]) -> list[str]:
    """Return patterns of modules to leave alone, each once.

    Raises:
        InputError: no list, or a pattern that is none.
    """
    if isinstance(ignore, str) or not isinstance(ignore, Iterable):
        raise InputError(f"ignore is {ignore!r}: give a list of patterns")
    return list(dict.fromkeys(check_pattern(pattern, "ignore") for pattern in ignore))


def parse_overrides(
    overrides: Mapping[str, Any] | Sequence[str],
    group_size: int | None = None,
    scale_dtype: str | None = None,
    table_dtype: str = "float16",
) -> list[Override]:
    """Parse what a user gives as overrides, in order.

    Args:
        overrides: `REGEX=FORMAT` texts, or a mapping of a pattern to `FORMAT[:gN|:row][:SCALE_DTYPE]` or to a mapping
            with `format` and, where wanted, `group_size` and `scale_dtype`.
        group_size, scale_dtype: used where a text names none.
        table_dtype: as `get_scheme` takes it.

    Raises:
        InputError: neither, a broken pattern, one that stands there twice, or an unknown format.
    """
    if isinstance(overrides, str) or not isinstance(overrides, Iterable):
        raise InputError(f"overrides is {overrides!r}: give a list of REGEX=FORMAT or a mapping")
    if isinstance(overrides, Mapping):
        parsed = [_mapped_override(*one, group_size, scale_dtype, table_dtype) for one in overrides.items()]
    else:
        parsed = [parse_override(text, group_size, scale_dtype, table_dtype) for text in overrides]
    first: dict[str, Override] = {}
    for override in parsed:
        if override.pattern in first:
            schemes = f"{first[override.pattern].scheme.key()} and {override.scheme.key()}"
            raise InputError(f"override {override.pattern!r} stands there twice ({schemes}): keep one of them")
        first[override.pattern] = override
    return parsed


def _mapped_override(
    pattern: Any, entry: Any, group_size: int | None, scale_dtype: str | None, table_dtype: str
) -> Override:
    where = f"override {pattern!r}"
    check_pattern(pattern, "override")
    if isinstance(entry, Mapping):
        return Override(pattern, _scheme(entry, where))
    if not isinstance(entry, str):
        raise InputError(f"{where} is {entry!r}: give a format such as 'int8:g64', or put the pattern into ignore")
    return Override(pattern, _parse_alike(entry, group_size, scale_dtype, where, table_dtype))


def parse_override(
    text: str, group_size: int | None = None, scale_dtype: str | None = None, table_dtype: str = "float16"
) -> Override:
    """Parse `REGEX=FORMAT`, where FORMAT may be followed by `:g64` or `:row` and by `:SCALE_DTYPE`.

    Args:
        text: what the user wrote.
        group_size, scale_dtype: used where the text names none and the format does not fix them (`mx...` does).
        table_dtype: as `get_scheme` takes it.

    Raises:
        InputError: no `=`, a broken pattern, or an unknown format.
    """
    pattern, separator, value = text.rpartition("=") if isinstance(text, str) else ("", "", "")
    if not separator or not pattern or not value:
        raise InputError(f"override {text!r} is not REGEX=FORMAT, such as 'down_proj=int8' or 'down_proj=int8:g64'")
    alike = _parse_alike(value, group_size, scale_dtype, f"override {text!r}", table_dtype)
    return Override(check_pattern(pattern, "override"), alike)


def _parse_alike(text: str, group_size: int | None, scale_dtype: str | None, where: str, table_dtype: str) -> Alike:
    """Parse what `parse_scheme` does, or the plain numbers that pruned weights keep, such as `bf16`."""
    plain = plain_values(text)
    return parse_scheme(text, group_size, scale_dtype, where, table_dtype) if plain is None else Sparse(plain)


def parse_scheme(
    text: str, group_size: int | None, scale_dtype: str | None, where: str, table_dtype: str = "float16"
) -> Scheme:
    """Parse `FORMAT[:gN|:row][:SCALE_DTYPE]`; what it does not name comes from the arguments.

    Raises:
        FormatError: an unknown format, a part that is none, or two that say the same thing.
    """
    name, *details = text.split(":")
    mx = name.startswith("mx")
    if mx:
        group_size, scale_dtype = None, None
    groups = [detail for detail in details if detail == "row" or _GROUP.fullmatch(detail)]
    scales = [detail for detail in details if detail not in groups]
    for parts, what in ((groups, "who shares a scale"), (scales, "the scales' dtype")):
        if len(parts) > 1:
            raise FormatError(f"{where}: {' and '.join(parts)} both say {what}: keep one of them")
    if "" in details:
        raise FormatError(f"{where}: nothing stands after a colon: write FORMAT, FORMAT:g64 or FORMAT:row:bfloat16")
    if groups == ["row"] and mx:
        raise FormatError(f"{where}: {name} has groups of 32, not one scale a row: leave out row, or use {name[2:]}")
    if groups:
        group_size = None if groups[0] == "row" else int(groups[0][1:])
    if scales:
        scale_dtype = scales[0]
        if scale_dtype.isdecimal():
            raise FormatError(f"{where}: {scale_dtype} is no scale dtype: a group size is written g{scale_dtype}")
    try:
        return get_scheme(name, group_size, scale_dtype, table_dtype)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None


def _scheme(entry: Any, where: str) -> Alike:
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{where} is {entry!r}, not an object")
    _check_keys(entry, _SCHEME_KEYS, ("format",), where)
    name, group_size, scale_dtype, sparse, outliers = (entry.get(key) for key in _SCHEME_KEYS)
    if not isinstance(name, str):
        raise CheckpointError(f"{where}: format is {name!r}, not a name")
    if group_size is not None and type(group_size) is not int:
        raise CheckpointError(f"{where}: group_size is {group_size!r}, not a whole number or null")
    if scale_dtype is not None and not isinstance(scale_dtype, str):
        raise CheckpointError(f"{where}: scale_dtype is {scale_dtype!r}, not a name")
    if sparse is not None and type(sparse) is not bool:
        raise CheckpointError(f"{where}: sparse is {sparse!r}, not true or false")
    if sparse and name in FLOAT_DTYPES:
        if (group_size, scale_dtype, outliers) != (None, None, None):
            raise CheckpointError(
                f"{where}: {name} numbers have no scales and no outliers, and so none of {', '.join(_SCHEME_KEYS[1:])}"
            )
        return Sparse(Plain(name))
    try:
        scheme = replace(get_scheme(name, group_size, scale_dtype), outliers=_outliers(outliers, where))
        return Sparse(scheme) if sparse else scheme
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None


def _outliers(entry: Any, where: str) -> Outliers | None:
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{where}: outliers is {entry!r}, not an object")
    _check_keys(entry, _OUTLIER_KEYS, _OUTLIER_KEYS, f"{where}: outliers")
    percent, dtype = (entry[key] for key in _OUTLIER_KEYS)
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not isinstance(dtype, str):
        raise CheckpointError(f"{where}: outliers is {entry!r}, expected a number percent and the name of a dtype")
    return Outliers(float(percent), dtype)


def _level(entry: Any, where: str) -> Scheme:
    found = _scheme(entry, where)
    if isinstance(found, Sparse):
        raise CheckpointError(f"{where}: a level is not sparse")
    return found


def _represented(raw: Mapping[str, Any], where: str) -> Represented:
    levels = raw.get("levels")
    if raw["format"] != MIXED_FORMAT:
        if levels is not None:
            raise CheckpointError(f"{where}: format {raw['format']!r} has no levels; {MIXED_FORMAT!r} has")
        return _scheme({key: raw.get(key) for key in _SCHEME_KEYS}, where)
    beside = [key for key in _SCHEME_KEYS[1:] if raw.get(key) not in (None, False)]
    if beside:
        raise CheckpointError(
            f"{where}: {beside[0]} stands beside format {MIXED_FORMAT!r}: it belongs into every level"
        )
    if not isinstance(levels, Sequence) or isinstance(levels, str):
        raise CheckpointError(f"{where}: levels is {levels!r}, not a list")
    try:
        return Mix(tuple(_level(entry, f"{where}: level {index}") for index, entry in enumerate(levels)))
    except FormatError as error:
        raise FormatError(str(error) if where in str(error) else f"{where}: {error}") from None


def _check_keys(raw: Mapping[str, Any], known: Iterable[str], required: Iterable[str], where: str) -> None:
    known = tuple(known)
    unknown = [key for key in raw if key not in known]
    if unknown:
        near = did_you_mean(str(unknown[0]), known)
        names = ", ".join(repr(key) for key in unknown)
        raise CheckpointError(f"{where}: unknown key {names}{near} (known: {', '.join(known)})")
    missing = [key for key in required if key not in raw]
    if missing:
        raise CheckpointError(f"{where}: {', '.join(missing)} missing")
