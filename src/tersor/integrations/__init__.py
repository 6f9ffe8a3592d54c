"""What do others call it? Registration with transformers and peft, without importing them."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_TARGET = "transformers.quantizers.auto"
_OURS = "tersor.integrations.transformers.quantizer"
_PEFT = "peft.tuners.lora.model"


def register() -> None:
    """Make transformers know `quant_method: tersor`: now if it is loaded, else at the moment it is. Idempotent."""
    if not any(getattr(finder, "serves_tersor", False) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    module = sys.modules.get(_TARGET)
    if module is not None and hasattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        _enter(module)
    if hasattr(sys.modules.get(_PEFT), "LoraModel"):
        _enter_peft(sys.modules[_PEFT])


class _Finder(importlib.abc.MetaPathFinder):
    """Finds two modules, by asking the other finders, and lets its loader say when it has been executed."""

    serves_tersor = True

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in (_TARGET, _PEFT) or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            for finder in list(sys.meta_path):
                find = getattr(finder, "find_spec", None)
                spec = find(fullname, path, target) if find is not None and finder is not self else None
                if spec is not None:
                    break
            else:
                return None
        finally:
            self._asking.now = False
        if spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, after whose work our classes are entered."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        try:
            _ENTER[module.__name__](module)
        except Exception as error:  # others must stay usable without us
            package, lost = module.__name__.partition(".")[0], _LOST[module.__name__]
            warnings.warn(
                f"tersor could not register with {package}, so {lost}: {error!r}", RuntimeWarning, stacklevel=2
            )


def _enter(module: ModuleType) -> None:
    ours: Any = sys.modules.get(_OURS) or importlib.import_module(_OURS)
    if not hasattr(ours, "TersorHfQuantizer"):
        return  # It is being imported right now, and calls `register` when it is done.
    if ours.NAME not in module.AUTO_QUANTIZATION_CONFIG_MAPPING:
        module.register_quantization_config(ours.NAME)(ours.TersorConfig)
    if ours.NAME not in module.AUTO_QUANTIZER_MAPPING:
        module.register_quantizer(ours.NAME)(ours.TersorHfQuantizer)


def _enter_peft(module: ModuleType) -> None:
    importlib.import_module("tersor.integrations.peft").register()


_ENTER = {_TARGET: _enter, _PEFT: _enter_peft}
_LOST = {_TARGET: "tersor checkpoints will not load", _PEFT: "LoRA will not take packed layers"}
