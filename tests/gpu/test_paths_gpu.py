"""Ways in which users come to a GPU, by verbs and by options: what each computes there is what a CPU does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import offloaded, packed_models
from helpers.asked import schema_of
from helpers.served import serving
from helpers.tiny_lm import TINY

import tersor
from tersor import integrations
from tersor.cli import main
from tersor.convert import quantize
from tersor.engine.threaded import ThreadedEngine

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
