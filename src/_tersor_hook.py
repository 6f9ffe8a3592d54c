"""Who tells transformers and peft of Tersor, and when? An import hook that imports nothing before they need it.

The line of `tersor.pth` imports this module whenever Python starts, so that a checkpoint loads in programs that do not
know Tersor; `import tersor` does, too. That line runs in every program of the environment: so this module is beside the
package, not in it, and what it imports is built into the interpreter.
"""

import os
import sys
from _thread import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SETTING = "TERSOR_HOOK"
"""The environment variable that keeps `start` from doing anything; see `settings.SETTINGS`."""

started = False
"""Whether `start` has put the hook in place in this process, as it does wherever Tersor is installed."""

_QUANTIZERS = "transformers.quantizers.auto"
_LORA = "peft.tuners.lora.model"
_OURS = "tersor.integrations.transformers.quantizer"


def start() -> None:
    """Do what `register` does at the start of Python: unless it is switched off, and whatever state Tersor is in."""
    global started
    if os.environ.get(SETTING) != "0":
        started = True
        _install()
        for name in _ENTER:
            _enter_or_warn(sys.modules.get(name))


def register() -> None:
    """Make transformers know `quant_method: tersor`, and peft packed layers: now or once loaded. Idempotent."""
    _install()
    for name, enter in _ENTER.items():
        if name in sys.modules:
            enter(sys.modules[name])


def _install() -> None:
    if not any(getattr(finder, "serves_tersor", False) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]  # the abstract classes take long to import


class _Finder:
    """Finds the modules of `_ENTER`, by asking the other finders, and lets its loader say when it has been executed."""

    serves_tersor = True

    def __init__(self) -> None:
        self._asking: set[int] = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname not in _ENTER or get_ident() in self._asking:
            return None
        self._asking.add(get_ident())
        try:
            for finder in list(sys.meta_path):
                find = getattr(finder, "find_spec", None)
                spec = find(fullname, path, target) if find is not None and finder is not self else None
                if spec is not None:
                    break
            else:
                return None
        finally:
            self._asking.discard(get_ident())
        if spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """Another loader, after whose work our classes are entered."""

    def __init__(self, loader: "Any") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> "Any":
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        return self._loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _enter_or_warn(module)


def _enter_or_warn(module: "ModuleType | None") -> None:
    if module is None:
        return
    try:
        from tersor.settings import get

        get(SETTING)  # a malformed value is said here: nothing can be raised when Python starts
        _ENTER[module.__name__](module)
    except Exception as error:  # others must stay usable without us
        if isinstance(error, ModuleNotFoundError) and error.name in ("tersor", "tersor.settings"):
            return  # Tersor was removed, and this file forgotten.
        import warnings

        package, lost = module.__name__.partition(".")[0], _LOST[module.__name__]
        message = f"tersor could not register with {package}, so {lost}: {error!r}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _enter_quantizer(module: "ModuleType") -> None:
    if not hasattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        return  # It is being imported right now.
    import importlib

    ours: Any = sys.modules.get(_OURS) or importlib.import_module(_OURS)
    if not hasattr(ours, "TersorHfQuantizer"):
        return  # It is being imported right now, and calls `register` when it is done.
    if ours.NAME not in module.AUTO_QUANTIZATION_CONFIG_MAPPING:
        module.register_quantization_config(ours.NAME)(ours.TersorConfig)
    if ours.NAME not in module.AUTO_QUANTIZER_MAPPING:
        module.register_quantizer(ours.NAME)(ours.TersorHfQuantizer)


def _enter_lora(module: "ModuleType") -> None:
    if not hasattr(module, "LoraModel"):
        return  # It is being imported right now.
    import importlib

    importlib.import_module("tersor.integrations.peft").register()


_ENTER = {_QUANTIZERS: _enter_quantizer, _LORA: _enter_lora}
"""Module of another library -> what makes Tersor known there."""
_LOST = {_QUANTIZERS: "tersor checkpoints will not load", _LORA: "LoRA will not take packed layers"}
"""The same modules -> what does not work without."""
