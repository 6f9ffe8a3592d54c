"""A model whose classes are Python files beside its weights, as `trust_remote_code` is for: the bundled one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import tiny_lm

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path({marker!r}).touch()
class MineConfig(LlamaConfig):
    model_type = "mine"
"""
MODELING = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig
Path({marker!r}).touch()
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""
TOKENIZATION = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).touch()
class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
TOKENIZER_MAP = {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]}


def make(
    directory: Path,
    config: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
) -> Path:
    """Write the bundled model with code of its own, which leaves a file `ran` beside the directory when it is run.

    Args:
        directory: where to write it.
        config: changes to config.json; by default its classes are the code's, and transformers knows none of them.
        tokenizer_config: changes to tokenizer_config.json.
    """
    tiny_lm.copy(directory)
    marker = str(ran(directory))
    for name, source in (
        ("configuration_mine.py", CONFIGURATION),
        ("modeling_mine.py", MODELING),
        ("tokenization_mine.py", TOKENIZATION),
        ("custom_generate/generate.py", "from pathlib import Path\nPath({marker!r}).touch()\ndef generate(): ...\n"),
    ):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(source.format(marker=marker))
    if config is None:
        config = {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": AUTO_MAP}
    edit(directory / "config.json", config)
    edit(directory / "tokenizer_config.json", tokenizer_config or {})
    return directory


def ran(directory: Path) -> Path:
    """The file that is there once the code of the model in `directory` was run."""
    return directory.parent / f"{directory.name} ran"


def edit(path: Path, changes: dict[str, Any]) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
