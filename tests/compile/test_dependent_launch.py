"""Kernels around the products of a step wait for those ahead and let the next one start: else its chain has gaps.

PTX is asked: both instructions are volatile there, and ptxas keeps them.
"""

from __future__ import annotations

import pytest
from compile import around, catalogue, mixtures
from helpers.fakes import argument_names

from tersor.kernels.jit import KernelSource, nvrtc

ARCH = "compute_90a"
SOURCES = [*around.products(), *catalogue.routers(), *around.quantizing(), *mixtures.deciders()]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_a_kernel_triggers_the_next_and_waits_before_it_touches_memory(source: KernelSource) -> None:
    """The trigger comes first; ahead of the first wait nothing is stored or loaded."""
    text = nvrtc.compile_source(source, ARCH).data.decode()
    body = text[text.index(".entry") :]
    assert body.count("griddepcontrol.launch_dependents") == 1
    assert body.count("griddepcontrol.wait") == (2 if "ready" in argument_names(source) else 1)
    ahead = body[: body.index("griddepcontrol.wait")]
    assert "griddepcontrol.launch_dependents" in ahead
    assert "st.global" not in ahead and "atom" not in ahead and "ld.global" not in ahead
