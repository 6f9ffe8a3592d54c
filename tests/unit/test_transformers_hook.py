"""`import tersor` is quick, imports nothing heavy, and yet transformers knows our quantizer. Each test is a process.

Most processes see a stand-in for transformers and for our classes, which load in no time; a few see the real ones.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

STAND_INS = {
    "transformers/__init__.py": "",
    "transformers/quantizers/__init__.py": "from transformers.quantizers import auto",
    "transformers/quantizers/base.py": "",
    "transformers/quantizers/auto.py": """
        import time
        from transformers.quantizers import base
        AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING = {"gptq": int}, {"gptq": int}
        def register(mapping, name):
            def enter(cls):
                if name in mapping:
                    raise ValueError("already registered")
                mapping[name] = cls
                return cls
            return enter
        time.sleep(0.05)
        def register_quantization_config(name): return register(AUTO_QUANTIZATION_CONFIG_MAPPING, name)
        def register_quantizer(name): return register(AUTO_QUANTIZER_MAPPING, name)
    """,
    "stand_in.py": """
        import sys, textwrap, importlib.abc, importlib.machinery
        PACKAGE = "tersor.integrations.transformers"
        QUANTIZER = PACKAGE + ".quantizer"
        SOURCE = textwrap.dedent('''
            from transformers.quantizers import base
            from tersor.integrations import register
            NAME = "tersor"
            class TersorConfig: pass
            class TersorHfQuantizer: pass
            register()
        ''')
        class Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
            def find_spec(self, name, path, target=None):
                if name == PACKAGE:
                    return importlib.machinery.ModuleSpec(name, self, is_package=True)
                if name == QUANTIZER:
                    return importlib.machinery.ModuleSpec(name, self)
            def get_source(self, name):
                return SOURCE if name == QUANTIZER else f"from {QUANTIZER} import NAME, TersorConfig, TersorHfQuantizer"
        sys.meta_path.insert(0, Finder())
    """,
}
KNOWN = """
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["tersor"].__name__ == "TersorHfQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["tersor"] is tersor.TersorConfig
"""


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand_ins")
    for name, source in STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(source))
    return folder


def run(script: str, stand_ins: Path | None = None) -> str:
    text = textwrap.dedent(script) + KNOWN
    if stand_ins is not None:
        text = f"import sys; sys.path.insert(0, {str(stand_ins)!r}); import stand_in\n{text}"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_light_and_transformers_knows(stand_ins: Path) -> None:
    script = """
    import sys, time
    start = time.perf_counter()
    import tersor
    print(time.perf_counter() - start)
    heavy = {"torch", "transformers", "numpy", "rich", "typer", "huggingface_hub", "safetensors"} & set(sys.modules)
    assert not heavy, heavy
    """
    assert min(float(run(script, stand_ins)) for _ in range(3)) < 0.15


def test_with_the_real_transformers() -> None:
    run(
        """
        import tersor
        from transformers import AutoConfig
        from transformers.quantizers.auto import AutoQuantizationConfig
        config = tersor.TersorConfig("int4", ignore=["x"])
        assert AutoQuantizationConfig.from_dict(config.to_dict()) == config
        """
    )


@pytest.mark.parametrize(
    "order",
    [
        "import tersor",
        "import tersor, transformers.quantizers",
        "import transformers.quantizers, tersor",
        "import transformers.quantizers.auto; import tersor",
        "import transformers.quantizers.base; import tersor",
        "import tersor; tersor.TersorConfig",
        "from tersor.integrations.transformers import TersorConfig; import tersor",
    ],
)
def test_every_order(stand_ins: Path, order: str) -> None:
    run(order, stand_ins)


def test_twice_reloaded_and_removed(stand_ins: Path) -> None:
    run(
        """
        import importlib, sys
        import tersor
        def finders(): return sum(getattr(finder, "serves_tersor", False) for finder in sys.meta_path)
        assert finders() == 1
        importlib.reload(tersor)
        import transformers.quantizers.auto as auto
        assert "tersor" in auto.AUTO_QUANTIZER_MAPPING
        importlib.reload(auto)
        assert "tersor" in auto.AUTO_QUANTIZER_MAPPING
        assert type(auto.__loader__).__name__ == type(auto.__spec__.loader).__name__ == "SourceFileLoader"
        importlib.reload(tersor)
        for gone in ("tersor", "transformers"):
            for name in [name for name in sys.modules if name.split(".")[0] == gone]:
                del sys.modules[name]
        import tersor
        import transformers.quantizers.auto
        assert finders() == 1
        """,
        stand_ins,
    )


def test_many_threads(stand_ins: Path) -> None:
    script = """
    import threading
    import tersor
    errors = []
    barrier = threading.Barrier(8)

    def load(number):
        try:
            barrier.wait()
            if number % 2:
                tersor.TersorConfig
            else:
                from transformers.quantizers import auto
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    """
    for _ in range(3):
        run(script, stand_ins)


def test_another_hook_on_the_same_module_lives_beside_ours(stand_ins: Path) -> None:
    run(
        """
        import importlib.abc, importlib.util, sys
        seen = []

        class Other(importlib.abc.MetaPathFinder):
            busy = False

            def find_spec(self, name, path, target=None):
                if name != "transformers.quantizers.auto" or self.busy:
                    return None
                self.busy = True
                try:
                    seen.append(name)
                    return importlib.util.find_spec(name)
                finally:
                    self.busy = False

        sys.meta_path.insert(0, Other())
        import tersor
        sys.meta_path.insert(0, Other())
        import transformers.quantizers.auto
        assert seen
        """,
        stand_ins,
    )


def test_a_failure_of_ours_leaves_transformers_usable(stand_ins: Path) -> None:
    run(
        """
        import sys, warnings
        import tersor
        sys.modules["tersor.integrations.transformers"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from transformers.quantizers import auto
        assert any("could not register" in str(warning.message) for warning in caught)
        assert "gptq" in auto.AUTO_QUANTIZER_MAPPING
        del sys.modules["tersor.integrations.transformers"]
        tersor.TersorConfig
        """,
        stand_ins,
    )
