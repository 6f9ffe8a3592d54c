"""`tersor bench`: what it measures. Options that its verbs share, and how they are read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor import files, hardware
from tersor.errors import InputError, OutputError, UnsupportedError, did_you_mean

if TYPE_CHECKING:
    import torch

    from tersor.bench.blend import Blend
    from tersor.bench.thinned import Thinned
    from tersor.formats import Activations, Scheme

VERBS: dict[str, tuple[str, str]] = {
    "linear": ("tersor.cli.bench_linear", "Time packed linears against their rivals and the memory."),
    "experts": ("tersor.cli.bench_experts", "Time layers of experts against their rivals and the memory."),
    "latency": ("tersor.cli.bench_latency", "Time decode steps of whole models against the memory."),
    "throughput": ("tersor.cli.bench_throughput", "Answer workloads of requests, planned and not."),
    "tune": ("tersor.cli.bench_tune", "Find the fastest kernel configurations of this GPU."),
}
"""verb -> (module of this package that defines `command`, one line of help)."""

DTYPES = ("float16", "bfloat16")
SHAPES_HELP = "Models (llama-3-8b), folders with a config.json, or sizes OCxIC."


def numbers(option: str, text: str) -> list[int]:
    """Read `1,16,64`: numbers of tokens, each once, in order.

    Raises:
        InputError: a word that is no number, or less than 1.
    """
    found = []
    for word in text.split(","):
        if not word.strip().isdecimal() or int(word) < 1:
            raise InputError(f"{option} {text!r}: expected numbers of at least 1, such as 1,16,64")
        found.append(int(word))
    return list(dict.fromkeys(found))


def schemes(names: Sequence[str], shapes: Sequence[Any]) -> list[Scheme]:
    """Read formats such as `fp6_e3m2` and `int4:g128`.

    Raises:
        FormatError: an unknown format, or groups that do not divide the input channels of a shape.
    """
    from tersor.checkpoint.config import parse_scheme

    found = list(dict.fromkeys(parse_scheme(name, None, None, f"--format {name}") for name in names))
    for scheme in found:
        for shape in shapes:
            scheme.groups(shape.ic)
    return found


def blends(names: Sequence[str], shapes: Sequence[Any], in_order: bool) -> list[Scheme | Blend]:
    """Read formats as `schemes` does, and mixes such as `uint4:g128=90+int8=10`.

    Args:
        names: of formats and mixes.
        shapes: of weights.
        in_order: whether the rows of a mix stand in the order of their levels.

    Raises:
        FormatError: as `schemes`, or two levels of one format.
        InputError: a level without its share of the rows, or shares that do not come to 100.
    """
    from tersor.bench import blend
    from tersor.checkpoint.config import parse_scheme

    found: list[Scheme | Blend] = []
    for name in names:
        if blend.SHARE not in name and blend.LEVEL not in name:
            found += schemes([name], shapes)
            continue
        words = [word.partition(blend.SHARE)[0] for word in name.split(blend.LEVEL)]
        levels = [parse_scheme(word, None, None, f"--format {name}") for word in words]
        found.append(blend.parse(name, levels, in_order))
        for shape in shapes:
            found[-1].groups(shape.ic)
    return list(dict.fromkeys(found))


def thinned(names: Sequence[str], shapes: Sequence[Any], text: str) -> list[Thinned]:
    """Read values of pruned weights, formats or `float16` and the like, and parts that are pruned such as `0.5,0.7`.

    Raises:
        FormatError: as `schemes`.
        InputError: a part that is no number from 0 to 1.
    """
    from tersor.bench.thinned import Thinned
    from tersor.formats import plain_values

    parts = [sparsity(word) for word in text.split(",")]
    values = [plain_values(name) or schemes([name], shapes)[0] for name in names]
    return list(dict.fromkeys(Thinned(value, part) for value in values for part in parts))


def check_pruned(schemes: Sequence[Any], activations: Sequence[Activations]) -> None:
    """Hold that pruned weights among some can be multiplied with such activations.

    Raises:
        UnsupportedError: no kernel multiplies their values with them.
    """
    from tersor.bench.thinned import Thinned
    from tersor.ops import check_sparse_activations

    for scheme in schemes:
        if isinstance(scheme, Thinned):
            for one in activations:
                check_sparse_activations(scheme.sparse, one)


def sparsity(text: str) -> float:
    """Read which part of weights is pruned.

    Raises:
        InputError: no number from 0 to 1.
    """
    try:
        part = float(text)
    except ValueError:
        part = -1.0
    if not 0 <= part <= 1:
        raise InputError(f"--sparsity {text.strip()!r}: expected parts from 0 to 1 that are pruned, such as 0.5,0.7")
    return part


def activations(text: str) -> tuple[Activations, ...]:
    """Read `16bit`, `fp8`, `int8`, or several such as `16bit,fp8`: what weights are multiplied with.

    Raises:
        InputError: no such activations.
    """
    from tersor.formats import Activations

    return tuple(dict.fromkeys(Activations.of(name.strip()) for name in text.split(",")))


def dtype_named(name: str) -> torch.dtype:
    """Return the torch dtype of activations.

    Raises:
        InputError: not one that kernels take.
    """
    import torch

    if name not in DTYPES:
        raise InputError(f"--dtype {name!r}{did_you_mean(name, DTYPES)}: use {' or '.join(DTYPES)}")
    return getattr(torch, name)


def need_gpu(instead: str) -> None:
    """Refuse to go on without a GPU.

    Raises:
        UnsupportedError: torch sees none; the message says what to do instead.
    """
    if not hardware.cuda_available():
        raise UnsupportedError(f"timing needs a CUDA device, and torch sees none here: {instead}")


def check_folder(option: str, path: Path) -> None:
    """Say before a long measurement that its result could not be written after it.

    Raises:
        InputError: the folder does not exist.
        OutputError: the file cannot be written there.
    """
    try:
        if not files.check_target(files.user_path(path)):
            raise InputError(f"{option} {path}: the folder {path.parent} does not exist")
    except OSError as error:
        raise OutputError(f"{option} {path}: cannot be written: {error.strerror}") from None


def give(
    result: dict[str, Any],
    show: Callable[[dict[str, Any], bool], None],
    draw: Callable[[dict[str, Any], Path], None],
    *,
    json: bool,
    plot: Path | None,
    output: Path | None,
) -> None:
    """Show a result, draw it where that is asked for, and name the files.

    Args:
        result: what was measured.
        show: prints it, as JSON where that is asked for.
        draw: writes its picture.
        json: whether JSON is asked for.
        plot, output: files of the picture, and of the result, which is written already; `None` without.
    """
    show(result, json)
    if plot is not None:
        draw(result, plot)
    say_written(json, output, plot)


def say_written(json: bool, *paths: Path | None) -> None:
    """Name the files that were written, on stdout unless JSON stands there."""
    for path in paths:
        if path is not None:
            print(f"written to {path}", file=sys.stderr if json else sys.stdout)
