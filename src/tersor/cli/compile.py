"""`tersor compile`: compile the kernels of a compressed model ahead of its first run."""

from __future__ import annotations

from typing import Annotated

import typer

from tersor.cli import chips, console, options, planned
from tersor.engine.config import EngineConfig

_ENGINE = EngineConfig()


def command(
    model: options.Model,
    revision: options.Revision = None,
    chip: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compile for this GPU, such as h200, not for those here.")
    ] = None,
    activations: Annotated[
        str, typer.Option(help="16bit, fp8, int8 or int8:g128, as `--activations` elsewhere.")
    ] = "16bit",
    fuse: Annotated[bool, typer.Option("--fuse", help="Compile what joined layers need, too: gate with up.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the engine's activations: auto, float16 or bfloat16.")] = "auto",
    kv_dtype: options.KvDtype = _ENGINE.kv_dtype,
    max_step_tokens: options.MaxStepTokens = _ENGINE.max_step_tokens,
    tensor_parallel: options.TensorParallel = _ENGINE.tensor_parallel,
    pipeline_parallel: options.PipelineParallel = _ENGINE.pipeline_parallel,
    expert_parallel: options.ExpertParallel = _ENGINE.expert_parallel,
    placement: options.Placed = None,
    plan: options.Planned = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Taken as elsewhere; no code of a model is needed here.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Fill the kernel cache: for `generate`, and for `serve` and `batch` with the same options."""
    from tersor.engine import ahead
    from tersor.formats import Activations

    config = EngineConfig(
        dtype=dtype,
        activations=str(Activations.of(activations)),
        kv_dtype=kv_dtype,
        max_rows=1,
        max_step_tokens=max_step_tokens,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        expert_parallel=expert_parallel,
        placement=planned.placement(model, revision, placement, plan),
    )
    for_chips = chips.wanted(chip, "to compile for")
    with console.progress("compiling kernels") as move:
        compiled = ahead.compile_ahead(model, for_chips, config, fuse=fuse, revision=revision, progress=move)
    if json:
        console.print_json(compiled.to_dict())
        return
    where = ", ".join(compiled.architectures)
    print(
        f"{model}: {compiled.kernels} kernels for {where}, {compiled.from_cache} of them there before; "
        f"{compiled.seconds:.1f} s"
    )
