"""`tersor serve`: answer over HTTP by OpenAI's API, until told to end."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from typing import Annotated

import typer

from tersor.cli import console, options, planned
from tersor.engine.config import SERVED_ROWS, EngineConfig
from tersor.errors import UnsupportedError
from tersor.server.options import ServerOptions

_SERVER, _ENGINE = ServerOptions(api_key=None), EngineConfig()


def command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.")],
    revision: options.Revision = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = _SERVER.host,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is a free one.")] = _SERVER.port,
    api_key: Annotated[
        str | None, typer.Option(help="What clients must send as their bearer token; or set TERSOR_API_KEY.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the model is called; else MODEL's last part.")] = None,
    max_queue: Annotated[
        int, typer.Option(help="Prompts that may wait for a first token before others are told to come again.")
    ] = _SERVER.max_queue,
    tool_parser: options.ToolParser = _SERVER.tool_parser,
    reasoning_parser: options.ReasoningParser = _SERVER.reasoning_parser,
    drain_seconds: Annotated[
        int, typer.Option(help="How long open requests may go on once the server is told to end.")
    ] = _SERVER.drain_seconds,
    data_parallel: options.DataParallel = 1,
    device: options.Device = _ENGINE.device,
    dtype: options.Dtype = _ENGINE.dtype,
    activations: options.Activations = _ENGINE.activations,
    kv_dtype: options.KvDtype = _ENGINE.kv_dtype,
    max_length: options.MaxLength = _ENGINE.max_length,
    max_rows: options.MaxRows = SERVED_ROWS,
    max_step_tokens: options.MaxStepTokens = _ENGINE.max_step_tokens,
    memory: options.Memory = _ENGINE.memory,
    kv_bytes: options.KvBytes = _ENGINE.kv_bytes,
    prefix_caching: options.PrefixCaching = _ENGINE.prefix_caching,
    tensor_parallel: options.TensorParallel = _ENGINE.tensor_parallel,
    offload: options.Offload = _ENGINE.offload,
    resident_layers: options.ResidentLayers = _ENGINE.resident_layers,
    offload_directory: options.OffloadDirectory = _ENGINE.offload_directory,
    pipeline_parallel: options.PipelineParallel = _ENGINE.pipeline_parallel,
    expert_parallel: options.ExpertParallel = _ENGINE.expert_parallel,
    placement: options.Placed = None,
    plan: options.Planned = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Answer over HTTP until told to end."""
    if any(importlib.util.find_spec(package) is None for package in ("fastapi", "uvicorn")):
        raise UnsupportedError("serving needs FastAPI and uvicorn: pip install 'tersor[serve]'")
    from tersor.formats import Activations
    from tersor.hardware import resolve_device
    from tersor.integrations.transformers import load
    from tersor.server import serving

    Activations.check(activations)
    server = ServerOptions(
        host=host,
        port=port,
        name=name,
        max_queue=max_queue,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        drain_seconds=drain_seconds,
    )
    if api_key is not None:
        server = replace(server, api_key=api_key)
    given = planned.placement(model, revision, placement, plan)
    data_parallel, placed = planned.copies(given, plan, data_parallel)
    engine = EngineConfig(
        device=device,
        dtype=dtype,
        activations=activations,
        kv_dtype=kv_dtype,
        max_length=max_length,
        max_rows=max_rows,
        max_step_tokens=max_step_tokens,
        memory=memory,
        kv_bytes=kv_bytes,
        prefix_caching=prefix_caching,
        tensor_parallel=tensor_parallel,
        offload=offload,
        resident_layers=resident_layers,
        offload_directory=offload_directory,
        pipeline_parallel=pipeline_parallel,
        expert_parallel=expert_parallel,
        placement=placed,
        trust_remote_code=trust_remote_code,
    )
    where = resolve_device(device)
    console.choose_threads(load.locate(model, revision).weight_bytes, where)
    load.quiet()
    with console.telling():
        serving.serve_model(
            model,
            server,
            engine,
            revision=revision,
            copies=data_parallel,
            threads=console.threads_each(data_parallel, where),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
