"""`tersor doctor`: what is installed, which kernel would serve what, and where are compiled kernels?"""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

import _tersor_hook
from tersor import hardware, settings
from tersor.cli import console, options
from tersor.errors import UnsupportedError
from tersor.version import __version__

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
)
DTYPES = ("float16", "bfloat16", "float32")
TOKENS = (1, 1024)
"""A decode step and a prompt: the two regimes of a linear."""

PRUNED = ("float16", "bfloat16", "fp8_e4m3", "fp6_e3m2", "int8", "int4", "int4:g128", "uint4")
"""Values of pruned weights, half of which are left."""

_DRIVERS = {12: 525, 13: 580}
"""Major version of NVRTC -> the oldest driver that loads its binaries (CUDA Toolkit release notes, Linux)."""
_CHANNELS = 4096
_HOOK = {
    True: "in place: every program here loads compressed checkpoints",
    False: "not in place: a program that does not import tersor loads a compressed checkpoint as random weights",
}


def command(json: options.Json = False) -> None:
    """Report on this installation and machine."""
    found = examine()
    if json:
        console.print_json(found)
    else:
        _print(found)


def examine() -> dict[str, Any]:
    """Return everything that `tersor doctor` prints, as JSON values."""
    from tersor.kernels.jit import cache

    advice: list[str] = []
    found: dict[str, Any] = {"versions": _versions(advice), "gpus": _gpus(advice), "kernels": _kernels()}
    found["pruned"] = _pruned()
    entries, nbytes = cache.size()
    found["cache"] = {"directory": str(cache.directory()), "entries": entries, "bytes": nbytes}
    found["environment"] = {name: _shown(name) for name in settings.SETTINGS}
    found["hook"] = _tersor_hook.started
    found["advice"] = advice
    return found


def _shown(name: str) -> str | None:
    """A variable as it stands; of a secret only that it is set."""
    value = os.environ.get(name)
    return "(set)" if value and settings.SETTINGS[name].secret else value


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
    advice += _old_driver(found["NVRTC"], found["NVIDIA driver"])
    if found["transformers"] is None:
        advice.append("transformers is missing, so no model can be loaded: install it with: pip install transformers")
    return found


def _old_driver(compiler: str | None, driver: str | None) -> list[str]:
    """Return a line where the driver is older than what NVRTC compiles for."""
    if compiler is None or driver is None:
        return []
    least = _DRIVERS.get(int(compiler.split(".")[0]), 0)
    if int(driver.split(".")[0]) >= least:
        return []
    return [
        f"NVRTC {compiler} makes binaries for NVIDIA drivers from {least} on, this one is {driver}: update it, or "
        "install an older NVRTC with: pip install 'cuda-bindings<13' nvidia-cuda-nvrtc-cu12"
    ]


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
        scheme = formats.get_scheme(name)
        if scheme.has_table and dtype_name in formats.TABLE_DTYPES:
            scheme = formats.get_scheme(name, None, dtype_name)
        reason = ops.explain(scheme, _CHANNELS, _CHANNELS, tokens, dtype)
        return {
            "format": name,
            "dtype": dtype_name,
            "tokens": tokens,
            "kernel": reason.kernel,
            "why": reason.why,
        }

    names = formats.scheme_names()
    return [entry(name, dtype, tokens) for name in names for dtype in DTYPES for tokens in TOKENS]


def _pruned() -> list[dict[str, Any]]:
    import torch

    from tersor import ops
    from tersor.checkpoint.config import parse_scheme
    from tersor.formats import Sparse, plain_values

    def entry(name: str, dtype_name: str, tokens: int) -> dict[str, Any]:
        sparse = Sparse(plain_values(name) or parse_scheme(name, None, None, name))
        dtype: torch.dtype = getattr(torch, dtype_name)
        reason = ops.explain_sparse(sparse, (_CHANNELS, _CHANNELS), 0.5, tokens, dtype)
        return {
            "values": name,
            "dtype": dtype_name,
            "tokens": tokens,
            "kernel": reason.kernel,
            "why": reason.why,
        }

    return [entry(name, dtype, tokens) for name in PRUNED for dtype in DTYPES for tokens in TOKENS]


def _print(found: dict[str, Any]) -> None:
    versions = found["versions"]
    console.print_section("Versions", [(name, value or "-") for name, value in versions.items()])
    gpus = [
        (
            f"cuda:{gpu['index']}",
            f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, "
            f"{console.size(gpu['free_bytes'])} of {console.size(gpu['memory_bytes'])} free, "
            + (f"kernels are built for {gpu['arch']}" if gpu["arch"] else "no kernel can be built for it"),
        )
        for gpu in found["gpus"]
    ]
    console.print_section("GPUs", gpus or [("none", "torch sees no CUDA device")])
    _print_kernels(found["kernels"], "format", "Who serves a linear")
    _print_kernels(found["pruned"], "values", "Who serves a linear that is half pruned")
    cache = found["cache"]
    size = f"{cache['entries']} kernels, {console.size(cache['bytes'])}"
    console.print_section("Compiled kernels", [("directory", cache["directory"]), ("holds", size)])
    lines = []
    for name, setting in settings.SETTINGS.items():
        value = found["environment"][name]
        lines.append((name, f"{setting.default} (not set)" if value is None else value))
    lines.append(("import hook", _HOOK[found["hook"]]))
    console.print_section("Environment", lines)
    if found["advice"]:
        console.print_section("Advice", [("-", line) for line in found["advice"]])


def _print_kernels(entries: list[dict[str, Any]], what: str, title: str) -> None:
    """Print one row for all formats that fare alike; `what` is the key of their names."""
    reasons: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        reasons.setdefault((entry[what], entry["dtype"]), []).append(entry)
    alike: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for pair, of_pair in reasons.items():
        few, many = of_pair
        why = few["why"] if few["kernel"] != "fused" else ""
        alike.setdefault((few["kernel"], many["kernel"], why), []).append(pair)
    rows = []
    names = list(dict.fromkeys(entry[what] for entry in entries))
    for (few_kernel, many_kernel, why), pairs in alike.items():
        formats_of: dict[str, list[str]] = {}
        for name, dtype in pairs:
            formats_of.setdefault(dtype, []).append(name)
        dtypes_of: dict[str, list[str]] = {}
        for dtype, with_dtype in formats_of.items():
            words = "all" if with_dtype == names else ", ".join(with_dtype)
            dtypes_of.setdefault(words, []).append(dtype)
        for words, dtypes in dtypes_of.items():
            rows.append([", ".join(dtypes), words, few_kernel, many_kernel, why])
    columns = [
        "activations",
        f"{what}s" if what == "format" else what,
        f"{TOKENS[0]} token",
        f"{TOKENS[1]} tokens",
        "why no kernel",
    ]
    console.print_table(columns, rows, title=title, words=True)
