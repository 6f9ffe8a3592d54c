"""Where Tersor is installed, programs that do not import it load its checkpoints: `tersor.pth` and what goes wrong."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_lm
from transformers import AutoModelForCausalLM

import tersor
from tersor.integrations.transformers import load

ROOT = Path(__file__).resolve().parents[2]
HOST = sysconfig.get_path("purelib")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
AUTO = """
AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING = {}, {}
def register_quantization_config(name): return lambda cls: AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(name, cls)
def register_quantizer(name): return lambda cls: AUTO_QUANTIZER_MAPPING.setdefault(name, cls)
"""
QUANTIZER = """
from tersor.integrations import register
NAME = "tersor"
class TersorConfig: pass
class TersorHfQuantizer: pass
register()
"""
KNOWN = "from transformers.quantizers import auto; print(sorted(auto.AUTO_QUANTIZER_MAPPING))"


class Environment:
    """A virtual environment made for a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = str(folder / "bin" / "python")
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))

    def share(self) -> None:
        """See the packages of the environment that runs the tests, without what those run when Python starts."""
        (self.site / "host.pth").write_text(f"{HOST}\n")

    def install(self, *what: str) -> None:
        """Install with pip, and nothing that it depends on."""
        options = ["install", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
        subprocess.run([*PIP, "--python", self.python, *options, *what], check=True)

    def run(
        self, code: str, *options: str, arguments: Sequence[str] = (), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run code in a fresh process, in the environment's own folder."""
        command = [self.python, *options, "-c", code, *arguments]
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=240, env=variables
        )
        assert done.returncode == 0, done.stderr
        return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with what is installed from a wheel, a stand-in for transformers and one for our quantizer."""
    folder = tmp_path_factory.mktemp("hook")
    subprocess.run(
        [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    found = Environment(folder / "venv")
    found.install(str(wheel))
    (found.site / "transformers" / "quantizers").mkdir(parents=True)
    (found.site / "transformers" / "__init__.py").touch()
    (found.site / "transformers" / "quantizers" / "__init__.py").touch()
    (found.site / "transformers" / "quantizers" / "auto.py").write_text(AUTO)
    (found.site / "tersor" / "integrations" / "transformers" / "quantizer.py").write_text(QUANTIZER)
    return found


@pytest.fixture
def changed(installed: Environment, tmp_path: Path) -> Environment:
    """An environment of the same files, which a test may change."""
    found = Environment(tmp_path / "venv")
    shutil.copytree(installed.site, found.site, dirs_exist_ok=True)
    return found


def test_transformers_knows_the_quantizer_though_nobody_imports_tersor(installed: Environment) -> None:
    for options in ((), ("-I",), ("-E",), ("-W", "error")):
        done = installed.run(KNOWN, *options)
        assert (done.stdout, done.stderr) == ("['tersor']\n", "")


def test_a_program_that_does_not_touch_transformers_pays_for_one_small_module(installed: Environment) -> None:
    loaded = "import sys; print(*sys.modules)"
    others = set(installed.run(loaded, TERSOR_HOOK="0").stdout.split())
    without = set(installed.run(loaded, "-S").stdout.split())
    (found,) = {name for name in others - without if "tersor" in name}
    assert found == "_tersor_hook"
    imported = set(re.findall(r"^(?:import|from) (\w+)", (ROOT / "src" / "_tersor_hook.py").read_text(), re.MULTILINE))
    assert imported == {"os", "sys", "_thread"}  # there whenever Python starts
    microseconds = []
    for _ in range(8):
        times = installed.run("pass", "-X", "importtime").stderr
        microseconds.append(int(re.findall(r"(\d+) \| +_tersor_hook$", times, re.MULTILINE)[0]))
    assert min(microseconds) < 1000


def test_a_variable_switches_the_hook_off(installed: Environment) -> None:
    assert installed.run(KNOWN, TERSOR_HOOK="0").stdout == "[]\n"
    assert installed.run(f"import tersor; {KNOWN}", TERSOR_HOOK="0").stdout == "['tersor']\n"
    assert installed.run(KNOWN, TERSOR_HOOK="").stdout == "['tersor']\n"


def test_a_process_knows_whether_the_hook_is_in_place(installed: Environment) -> None:
    code = "import _tersor_hook, tersor; print(_tersor_hook.started)"
    assert installed.run(code).stdout == "True\n"
    assert installed.run(code, TERSOR_HOOK="0").stdout == "False\n"


def test_a_malformed_variable_is_said_when_transformers_comes(installed: Environment) -> None:
    assert installed.run("pass", TERSOR_HOOK="no").stderr == ""
    assert "TERSOR_HOOK is 'no': expected 0 or 1" in installed.run(KNOWN, TERSOR_HOOK="no").stderr


def test_a_process_that_was_spawned_has_the_hook(installed: Environment) -> None:
    script = installed.folder / "spawns.py"
    script.write_text(
        "import multiprocessing\n"
        "def known(_):\n"
        "    from transformers.quantizers import auto\n"
        "    return sorted(auto.AUTO_QUANTIZER_MAPPING)\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(known, [0]))\n"
    )
    assert installed.run("import runpy; runpy.run_path('spawns.py', run_name='__main__')").stdout == "[['tersor']]\n"


def test_python_without_its_site_folder_starts_as_ever(installed: Environment) -> None:
    done = installed.run("import sys; print([name for name in sys.modules if 'tersor' in name])", "-S")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_what_an_uninstall_forgot_does_nothing(changed: Environment) -> None:
    shutil.rmtree(changed.site / "tersor")
    done = changed.run(KNOWN)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    (changed.site / "tersor" / "integrations").mkdir(parents=True)  # folders with somebody's files in them stay
    done = changed.run(KNOWN)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    (changed.site / "_tersor_hook.py").unlink()
    shutil.rmtree(changed.site / "__pycache__")
    done = changed.run(KNOWN)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_broken_tersor_warns_where_transformers_is_used_and_nowhere_else(changed: Environment) -> None:
    (changed.site / "tersor" / "version.py").write_text("0.1.0 is no Python")
    done = changed.run("print('fine')")
    assert (done.stdout, done.stderr) == ("fine\n", "")
    done = changed.run(KNOWN)
    assert done.stdout == "[]\n"
    assert "tersor could not register with transformers" in done.stderr
    assert "SyntaxError" in done.stderr


def test_no_transformers_is_no_matter(changed: Environment) -> None:
    shutil.rmtree(changed.site / "transformers")
    done = changed.run("import importlib.util; print(importlib.util.find_spec('transformers'))")
    assert (done.stdout, done.stderr) == ("None\n", "")


def test_transformers_may_be_there_before_the_hook(changed: Environment) -> None:
    (changed.site / "a.pth").write_text("import transformers.quantizers.auto\n")
    done = changed.run(KNOWN)
    assert (done.stdout, done.stderr) == ("['tersor']\n", "")


def test_pip_removes_the_hook_with_the_package(changed: Environment) -> None:
    subprocess.run([*PIP, "--python", changed.python, "uninstall", "--yes", "--quiet", "tersor"], check=True)
    assert not [path for path in changed.site.iterdir() if "tersor" in path.name and path.suffix in (".pth", ".py")]


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with an editable install, and with everything that Tersor depends on."""
    found = Environment(tmp_path_factory.mktemp("editable"))
    found.share()
    found.install("--editable", str(ROOT))
    return found


def test_an_editable_install_has_the_hook(editable: Environment) -> None:
    done = editable.run("import sys, _tersor_hook; print(_tersor_hook.__file__, sys.meta_path[0])")
    assert done.stdout.startswith(f"{ROOT / 'src' / '_tersor_hook.py'} <_tersor_hook._Finder")


TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
LM_EVAL = """
import functools
from lm_eval import tasks
# The harness's own tasks are ten thousand files, which take it longer to list than all the rest.
tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def test_lm_eval_scores_a_checkpoint_as_its_decoded_weights_score(editable: Environment, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    texts = [text[start : start + 300] for start in (0, 300)]
    tersor.quantize(tiny_lm.TINY, tmp_path / "packed", format="int4", group_size=64)
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(documents=documents))
    words = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'packed'},dtype=float32", "--device", "cpu"]
    words += [
        "--tasks",
        "local",
        "--include_path",
        str(tmp_path / "tasks"),
        "--output_path",
        str(tmp_path / "out.json"),
    ]
    variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    editable.run(LM_EVAL, arguments=words, PATH=os.environ["PATH"], **variables)
    (results,) = tmp_path.glob("out*.json")
    score = json.loads(results.read_text())["results"]["local"]["bits_per_byte,none"]

    model = load.load_model(tmp_path / "packed", "cpu")
    decoded = bits_per_byte(model.dequantize(), texts)
    assert score == pytest.approx(decoded, rel=1e-4)
    assert score != pytest.approx(bits_per_byte(tiny_lm.model(), texts), rel=1e-3)
    assert bits_per_byte(AutoModelForCausalLM.from_config(model.config), texts) > 1.5 * score


def bits_per_byte(model: Any, texts: list[str]) -> float:
    """Return how many bits a model needs for a byte of texts, each from an empty context on."""
    tokenizer = tiny_lm.tokenizer()
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[start, *tokenizer.encode(text, add_special_tokens=False)]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits
        nats += torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len("".join(texts).encode())
