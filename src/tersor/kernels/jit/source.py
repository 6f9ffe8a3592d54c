"""What is compiled? A header of `kernels/cuda` with its constants chosen, and every header it reaches."""

from __future__ import annotations

import functools
import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

from tersor.errors import KernelError

ENTRY_MACRO = "TERSOR_ENTRY"
"""The macro a header uses as the name of its one kernel: `extern "C" __global__ void TERSOR_ENTRY(...)`."""

_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include\b[ \t]*(.*?)[ \t]*(?://.*)?$", re.MULTILINE)
_QUOTED = re.compile(r'"([^"]+)"')
_MACRO = re.compile(r"[A-Z][A-Z0-9_]*")
_TOKENS = re.compile(r"[A-Za-z0-9_:<>,.+\-*/() ]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ARGUMENTS = re.compile(r"[PiIqQfT]+")

# Turns a disagreement between the host's argument string and the kernel's signature into a compile error.
_CHECK = """
template <class T, char C> struct tersor_is { enum { value = 0 }; };
template <class T> struct tersor_is<T*, 'P'> { enum { value = 1 }; };
template <> struct tersor_is<int, 'i'> { enum { value = 1 }; };
template <> struct tersor_is<unsigned, 'I'> { enum { value = 1 }; };
template <> struct tersor_is<long long, 'q'> { enum { value = 1 }; };
template <> struct tersor_is<unsigned long long, 'Q'> { enum { value = 1 }; };
template <> struct tersor_is<float, 'f'> { enum { value = 1 }; };
template <class T> struct tersor_is<T, 'T'> { enum { value = sizeof(T) == 128 }; };
template <class F, char... C> struct tersor_takes { enum { value = 0 }; };
template <> struct tersor_takes<void()> { enum { value = 1 }; };
template <class T, class... A, char C, char... D> struct tersor_takes<void(T, A...), C, D...> {
    enum { value = tersor_is<T, C>::value && tersor_takes<void(A...), D...>::value };
};
"""


@dataclass(frozen=True, eq=False)
class KernelSource:
    """One kernel: a header with its constants chosen. Hashable; equal sources give equal binaries.

    Attributes:
        name: symbol of the kernel in the binary, and its name in messages and profiles.
        header: file under `kernels/cuda` (or a key of `texts`) that defines
            `extern "C" __global__ void TERSOR_ENTRY(...)`.
        parameters: `#define`s ahead of the header: upper-case names; integers, booleans (0 or 1) or text
            that is a C++ expression or type.
        arguments: what the host passes, one letter an argument: P pointer, i int, I unsigned, q long long,
            Q unsigned long long, f float, T a tensor map of 128 bytes (first, it is aligned to 64). The translation
            unit checks it against the kernel.
        texts: headers that are no files of the package, name to text (tests and experiments).
    """

    name: str
    header: str
    parameters: Mapping[str, int | bool | str]
    arguments: str
    texts: Mapping[str, str] = field(default_factory=dict)
    _defines: tuple[tuple[str, str], ...] = field(init=False, repr=False)
    _identity: tuple[object, ...] = field(init=False, repr=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise KernelError(f"kernel name {self.name!r} is not a C identifier")
        compact = self.arguments.replace(" ", "")
        if not _ARGUMENTS.fullmatch(compact):
            raise KernelError(f"kernel {self.name}: arguments {self.arguments!r} are not letters of PiIqQfT")
        defines = tuple((key, _render(self.name, key, value)) for key, value in sorted(self.parameters.items()))
        object.__setattr__(self, "arguments", compact)
        object.__setattr__(self, "_defines", defines)
        identity = (self.name, self.header, defines, compact, tuple(sorted(self.texts.items())))
        object.__setattr__(self, "_identity", identity)
        object.__setattr__(self, "_hash", hash(identity))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KernelSource) and self._identity == other._identity

    def __hash__(self) -> int:
        return self._hash

    @property
    def layout(self) -> struct.Struct:
        """How Python values become the kernel's parameter memory, aligned as in C."""
        return struct.Struct(_native(self.arguments))

    @property
    def offsets(self) -> tuple[int, ...]:
        """Byte offset of each argument in that memory."""
        ends = (struct.calcsize(_native(self.arguments[: i + 1])) for i in range(len(self.arguments)))
        return tuple(end - struct.calcsize(_native(letter)) for end, letter in zip(ends, self.arguments, strict=True))

    def text(self) -> str:
        """Return the translation unit: defines, the header, and the check of the arguments."""
        lines = [f"#define {ENTRY_MACRO} {self.name}"]
        lines += [f"#define {key} {value}" for key, value in self._defines]
        lines += [f'#include "{self.header}"', _CHECK.strip()]
        letters = "".join(f", '{letter}'" for letter in self.arguments)
        check = f"tersor_takes<decltype({ENTRY_MACRO}){letters}>::value"
        lines.append(f'static_assert({check}, "the host passes {self.arguments}, the kernel takes something else");')
        return "\n".join(lines) + "\n"

    def files(self) -> dict[str, str]:
        """Return every header the kernel reaches, include name to text, in the order of inclusion.

        Raises:
            KernelError: an include that is not a quoted name under `kernels/cuda` (or in `texts`).
        """
        return reached(self.header, f"kernel {self.name}", self.texts)

    def digest(self) -> str:
        """Return the sha256, in hex, of everything of this source that can change the binary."""
        digest = hashlib.sha256(self.text().encode())
        for name, text in sorted(self.files().items()):
            for part in (name, text):
                encoded = part.encode()
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()


def reached(header: str, includer: str, texts: Mapping[str, str]) -> dict[str, str]:
    """Return a header and every header it reaches: `KernelSource.files`, which needs no whole kernel.

    Args:
        header: file under `kernels/cuda`, or a key of `texts`.
        includer: who asks for it, in messages.
        texts: headers that are no files of the package, name to text.

    Raises:
        KernelError: an include that is not a quoted name under `kernels/cuda` (or in `texts`).
    """
    found: dict[str, str] = {}
    waiting = [(header, includer)]
    while waiting:
        name, includer = waiting.pop(0)
        if name in found:
            continue
        text = texts[name] if name in texts else _package_header(name, includer)
        found[name] = text
        for match in _INCLUDE.finditer(text):
            quoted = _QUOTED.fullmatch(match[1])
            if quoted is None:
                raise KernelError(f'{name}: cannot follow #include {match[1]}: expected "name" of kernels/cuda')
            waiting.append((quoted[1], name))
    return found


def _native(letters: str) -> str:
    """Return the `struct` format of argument letters: a tensor map is 128 bytes."""
    return "@" + letters.replace("T", "128s")


def _render(kernel: str, key: str, value: int | bool | str) -> str:
    if not _MACRO.fullmatch(key) or key == ENTRY_MACRO:
        raise KernelError(f"kernel {kernel}: parameter {key!r} is not an upper-case macro name")
    if isinstance(value, str):
        if not _TOKENS.fullmatch(value):
            raise KernelError(f"kernel {kernel}: parameter {key} is {value!r}, expected a C++ expression")
        return value
    if not isinstance(value, int):
        raise KernelError(f"kernel {kernel}: parameter {key} is {value!r}, expected int, bool or str")
    return f"({int(value)})" if value < 0 else str(int(value))


@functools.cache
def _package_header(name: str, includer: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise KernelError(f'{includer}: cannot follow #include "{name}": it leaves kernels/cuda')
    file = resources.files("tersor.kernels").joinpath("cuda", *name.split("/"))
    if not file.is_file():
        raise KernelError(f'{includer}: cannot follow #include "{name}": no such file under kernels/cuda')
    return file.read_text(encoding="utf-8")
