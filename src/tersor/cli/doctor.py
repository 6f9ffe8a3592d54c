"""`tersor doctor`: what is installed, which kernel would serve what, where compiled kernels are; compile ahead."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor import hardware, settings
from tersor.cli import console
from tersor.errors import InputError, UnsupportedError
from tersor.version import __version__

if TYPE_CHECKING:
    import torch

    from tersor.formats import Activations, Scheme
    from tersor.kernels.jit import KernelSource

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
)
DTYPES = ("float16", "bfloat16", "float32")
TOKENS = (1, 1024)
"""A decode step and a prompt: the two regimes of a linear."""

_CHANNELS = 4096


def command(
    warm: Annotated[
        str | None,
        typer.Option("--warm", metavar="MODEL", help="Compile every kernel that this compressed model needs."),
    ] = None,
    chip: Annotated[
        str | None,
        typer.Option("--chip", metavar="NAME", help="Compile for this GPU ('NVIDIA H100'), not for those here."),
    ] = None,
    activations: Annotated[
        str, typer.Option(help="What --warm compiles for: 16bit, or fp8 as with `generate --activations fp8`.")
    ] = "16bit",
    fuse: Annotated[bool, typer.Option("--fuse", help="Let --warm compile what `generate --fuse` needs, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report on this installation and machine."""

    Activations.of(activations)
    for given, option in ((chip is not None, "--chip"), (activations != "16bit", "--activations"), (fuse, "--fuse")):
        if given and warm is None:
            raise InputError(f"{option} says what --warm compiles for: add --warm MODEL")
    compiled = None if warm is None else compile_ahead(warm, chip, activations, fuse)
    found = examine()
    if compiled is not None:
        found["warm"] = compiled
    if json:
        console.print_json(found)
    else:
        _print(found)


def examine() -> dict[str, Any]:
    """Return everything that `tersor doctor` prints, as JSON values."""
    from tersor.kernels.jit import cache

    advice: list[str] = []
    found: dict[str, Any] = {"versions": _versions(advice), "gpus": _gpus(advice), "kernels": _kernels()}
    entries, nbytes = cache.size()
    found["cache"] = {"directory": str(cache.directory()), "entries": entries, "bytes": nbytes}
    found["environment"] = {name: os.environ.get(name) for name in settings.SETTINGS}
    found["advice"] = advice
    return found


def compile_ahead(model: str, chip_name: str | None, activations: str = "16bit", fuse: bool = False) -> dict[str, Any]:
    """Compile the kernels that a compressed model can ask for, for a named chip or every GPU here.

    Raises:
        InputError: not a model compressed by Tersor, an unknown chip, or neither chip nor GPU.
        KernelError: a kernel does not compile.
        UnsupportedError: NVRTC is not installed, or 8-bit activations are asked for that weights or chip do not take.
    """
    import torch

    from tersor import ops
    from tersor.checkpoint.source import open_source
    from tersor.kernels.jit import arch_for, cache, compile_many

    with open_source(model) as source:
        schemes, dtypes = _needs(model, source.config)
    for scheme in schemes:
        ops.preferred_layout(scheme, torch.float16, torch.device("cpu"), activations)
    wanted: dict[str, dict[KernelSource, None]] = {}
    for chip in _chips(chip_name):
        needed = dict.fromkeys(_sources(schemes, dtypes, chip, activations, fuse))
        if activations != "16bit" and not needed:
            raise UnsupportedError(f"8-bit activations need compute capability 9.0: {chip.name} has no kernel for them")
        wanted.setdefault(arch_for(chip.capability), {}).update(needed)
    total = sum(map(len, wanted.values()))
    known = sum(cache.load(cache.key(source, arch)) is not None for arch in wanted for source in wanted[arch])
    start = time.monotonic()
    done = 0
    with console.progress("compiling kernels") as move:
        move(0, total)

        def advance(source: KernelSource, binary: object) -> None:
            nonlocal done
            done += 1
            move(done, total)

        for arch, sources in wanted.items():
            compile_many(sources, arch, on_done=advance)
    return {
        "model": model,
        "schemes": [scheme.key() for scheme in schemes],
        "dtypes": dtypes,
        "architectures": sorted(wanted),
        "kernels": total,
        "from_cache": known,
        "seconds": round(time.monotonic() - start, 3),
    }


def _needs(model: str, config: dict[str, Any]) -> tuple[list[Scheme], list[str]]:
    """Return the schemes a checkpoint uses and the dtypes its activations may have."""
    from tersor.checkpoint import QuantizationConfig
    from tersor.checkpoint.source import quantization_of

    quantization = quantization_of(config)
    if quantization is None:
        raise InputError(f"{model} is not compressed, so it needs no kernels: run tersor quantize first")
    parsed = QuantizationConfig.from_dict(quantization)
    schemes = dict.fromkeys([parsed.scheme, *(override.scheme for override in parsed.overrides)])
    holders = [config, config.get("text_config") or {}]
    stored = next((holder[key] for holder in holders for key in ("dtype", "torch_dtype") if holder.get(key)), None)
    kernel_dtypes = DTYPES[:2]
    return list(schemes), [stored] if stored in kernel_dtypes else list(kernel_dtypes)


def _chips(name: str | None) -> list[hardware.Chip]:
    import torch

    if name is not None:
        return [hardware.chip_named(name)]
    if not hardware.cuda_available():
        known = ", ".join(hardware.CHIPS)
        raise InputError(f"torch sees no GPU to compile for: name one with --chip ({known})")
    return [hardware.of_device(index) for index in range(torch.cuda.device_count())]


def _sources(
    schemes: Iterable[Scheme],
    dtypes: Iterable[str],
    chip: hardware.Chip,
    activations: str = "16bit",
    fuse: bool = False,
) -> list[KernelSource]:
    import torch

    from tersor import ops

    wanted = [
        (scheme, getattr(torch, dtype), gated)
        for scheme in schemes
        for dtype in dtypes
        for gated in ((False, True) if fuse else (False,))
    ]
    return [
        source for scheme, dtype, gated in wanted for source in ops.kernels_for(scheme, dtype, chip, activations, gated)
    ]


def _versions(advice: list[str]) -> dict[str, str | None]:
    from importlib import metadata

    import torch

    from tersor.kernels.jit import nvrtc

    found: dict[str, str | None] = {"tersor": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["CUDA of torch"] = torch.version.cuda
    try:
        found["NVRTC"] = "{}.{}".format(*nvrtc.version())
    except UnsupportedError as error:
        found["NVRTC"] = None
        advice.append(str(error))
    found["NVIDIA driver"] = hardware.driver_version()
    if found["transformers"] is None:
        advice.append("transformers is missing, so no model can be loaded: install it with: pip install transformers")
    return found


def _gpus(advice: list[str]) -> list[dict[str, Any]]:
    import torch

    from tersor.kernels.jit import arch_for

    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            advice.append("torch is built without CUDA: everything runs on the CPU")
        else:
            advice.append(
                f"torch is built for CUDA {torch.version.cuda} but sees no GPU: look at nvidia-smi and "
                "CUDA_VISIBLE_DEVICES"
            )
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            arch = arch_for((properties.major, properties.minor))
        except UnsupportedError:
            arch = None
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "arch": arch,
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": total,
                "free_bytes": free,
            }
        )
    return found


def _kernels() -> list[dict[str, Any]]:
    import torch

    from tersor import formats, ops

    def entry(name: str, dtype_name: str, tokens: int) -> dict[str, Any]:
        dtype: torch.dtype = getattr(torch, dtype_name)
        reason = ops.explain(formats.get_scheme(name), _CHANNELS, _CHANNELS, tokens, dtype)
        return {
            "format": name,
            "dtype": dtype_name,
            "tokens": tokens,
            "kernel": reason.kernel,
            "why": reason.why,
        }

    names = formats.scheme_names()
    return [entry(name, dtype, tokens) for name in names for dtype in DTYPES for tokens in TOKENS]


def _print(found: dict[str, Any]) -> None:
    versions = found["versions"]
    _section("Versions", [(name, value or "-") for name, value in versions.items()])
    gpus = [
        (
            f"cuda:{gpu['index']}",
            f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, "
            f"{console.size(gpu['free_bytes'])} of {console.size(gpu['memory_bytes'])} free, "
            + (f"kernels are built for {gpu['arch']}" if gpu["arch"] else "no kernel can be built for it"),
        )
        for gpu in found["gpus"]
    ]
    _section("GPUs", gpus or [("none", "torch sees no CUDA device")])
    _print_kernels(found["kernels"])
    cache = found["cache"]
    size = f"{cache['entries']} kernels, {console.size(cache['bytes'])}"
    _section("Compiled kernels", [("directory", cache["directory"]), ("holds", size)])
    lines = []
    for name, setting in settings.SETTINGS.items():
        value = found["environment"][name]
        lines.append((name, f"{setting.default} (not set)" if value is None else value))
    _section("Environment", lines)
    if "warm" in found:
        warm = found["warm"]
        what = f"{warm['kernels']} kernels for {', '.join(warm['architectures'])}, {warm['from_cache']} of them there"
        _section("Compiled ahead", [(warm["model"], f"{what}, {warm['seconds']:.1f} s")])
    if found["advice"]:
        _section("Advice", [("-", line) for line in found["advice"]])


def _section(title: str, lines: Iterable[tuple[str, str]]) -> None:
    from rich.table import Table

    screen = _screen()
    screen.print(f"[bold]{title}[/bold]")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=18, no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in lines:
        grid.add_row(f"  {_plain(name)}", _plain(value))
    screen.print(grid)
    screen.print()


def _print_kernels(entries: list[dict[str, Any]]) -> None:
    """Print one row for all formats that fare alike."""
    from rich import box
    from rich.table import Table

    reasons: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        reasons.setdefault((entry["format"], entry["dtype"]), []).append(entry)
    alike: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for pair, of_pair in reasons.items():
        few, many = of_pair
        why = few["why"] if few["kernel"] == "reference" else ""
        alike.setdefault((few["kernel"], many["kernel"], why), []).append(pair)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True)
    for column in ("activations", "formats", f"{TOKENS[0]} token", f"{TOKENS[1]} tokens", "why no kernel"):
        table.add_column(column, overflow="fold")
    names = list(dict.fromkeys(entry["format"] for entry in entries))
    for (few_kernel, many_kernel, why), pairs in alike.items():
        formats_of: dict[str, list[str]] = {}
        for name, dtype in pairs:
            formats_of.setdefault(dtype, []).append(name)
        dtypes_of: dict[str, list[str]] = {}
        for dtype, with_dtype in formats_of.items():
            words = "all" if with_dtype == names else ", ".join(with_dtype)
            dtypes_of.setdefault(words, []).append(dtype)
        for words, dtypes in dtypes_of.items():
            table.add_row(", ".join(dtypes), words, few_kernel, many_kernel, _plain(why))
    screen = _screen()
    screen.print("[bold]Who serves a linear[/bold]")
    screen.print(table)


def _screen() -> Any:
    from rich.console import Console

    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen.width = console.PLAIN_WIDTH
    return screen


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
