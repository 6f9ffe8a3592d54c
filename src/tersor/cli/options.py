"""Options that verbs share, called the same and said in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.engine.config import MANY_ROWS

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model, as if it were yours.")
]

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]

# Of conversions of a checkpoint.
GroupSize = Annotated[int | None, typer.Option(help="Input channels that share a scale; one scale a row if not given.")]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX", help="Leave modules alone whose name it finds; repeatable."),
]
CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="A text to calibrate on (UTF-8), JSON lines (.jsonl) with text or messages, or the id of a dataset.",
    ),
]
CalibrationTokens = Annotated[
    int | None, typer.Option(help="Tokens of it that are used, in windows spread evenly; 128 windows if not given.")
]
CalibrationWindow = Annotated[
    int | None, typer.Option(help="Tokens in a window; 2048, or as many as the model takes, if not given.")
]
ShardSize = Annotated[str, typer.Option(help="Size of an output file, such as 5GB or 500MB.")]
WorkDevice = Annotated[str, typer.Option("--device", help="Where the work is done: auto, cpu, cuda or cuda:N.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what an interrupted run left.")]

# What a model writes, as `serve` and `batch` read it.
ToolParser = Annotated[str, typer.Option(help="How the model calls tools: auto, hermes, llama3, mistral or none.")]
ReasoningParser = Annotated[str, typer.Option(help="How the model marks reasoning: auto, think, gpt-oss or none.")]

# Of an engine: fields of `EngineConfig`.
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(help="float32, float16, bfloat16; auto: float32 on a CPU, the checkpoint's on a GPU.")
]
Activations = Annotated[
    str,
    typer.Option(help="16bit; fp8, int8, int8:g128: linears quantise activations so; 8bit: int8 or fp8."),
]
KvDtype = Annotated[str, typer.Option(help="Keys and values: auto, float16, bfloat16, float32 or fp8.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Tokens of the longest text, at most the model's context, which it is if not given.")
]
MaxRows = Annotated[int, typer.Option(help="Requests of a step at most.")]
ManyRows = Annotated[
    int | None, typer.Option(help=f"Requests of a step at most; else {MANY_ROWS}, or fewer where memory is short.")
]
MaxStepTokens = Annotated[int, typer.Option(help="Tokens of a step at most; longer prompts are read in several.")]
Memory = Annotated[float, typer.Option(help="Share of the GPU's memory for weights, graphs and pages together.")]
KvBytes = Annotated[
    int | None, typer.Option(help="Bytes of all keys and values, instead of what --memory leaves; on a CPU else 1 GiB.")
]
PrefixCaching = Annotated[
    bool, typer.Option("--prefix-caching/--no-prefix-caching", help="Keep pages of prompts for those that begin alike.")
]
TensorParallel = Annotated[
    int,
    typer.Option(min=1, help="Ranks that compute the model together: a process and a GPU each; on a CPU a process."),
]
PipelineParallel = Annotated[
    int, typer.Option(min=1, help="Stages of as many ranks each, one behind the other, with some of the layers.")
]
ExpertParallel = Annotated[
    int, typer.Option(min=1, help="Groups of as many ranks each in a stage, which have whole experts.")
]
DataParallel = Annotated[
    int, typer.Option(min=1, help="Engines with a copy of the model each, in a process on devices of its own.")
]
Placed = Annotated[
    str | None,
    typer.Option("--placement", metavar="FILE", help="Who has what, in JSON, instead of the three (docs/parallel.md)."),
]
Planned = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="A plan of tersor plan for this model, instead of the three."),
]

Offload = Annotated[
    str | None,
    typer.Option(
        metavar="host|disk",
        help="Weights of layers that do not fit on the GPU are in pinned host memory or in a file, and stream.",
    ),
]
ResidentLayers = Annotated[
    int | None, typer.Option(help="With --offload: layers that stay on the GPU; else as many as fit beside pages.")
]
OffloadDirectory = Annotated[
    str | None, typer.Option(metavar="DIR", help="Of the file of --offload disk; else in Tersor's cache.")
]

# Of measurements of whole models.
AgainstVllm = Annotated[
    str | None,
    typer.Option(
        "--against",
        help=(
            "Rivals, where vLLM is installed: vllm (16-bit weights), vllm:fp8, vllm:humming, vllm:tersor; default: "
            "none. For `bench throughput` random weights are in memory (/dev/shm), or else in TMPDIR, while they run."
        ),
    ),
]
