"""Are decode steps on several GPUs as long as the planner says, and is the way that it would choose the fastest?

    tersor plan calibrate -o links.json
    torchrun --nproc-per-node 2 bench/planner_measured.py --links links.json

As many rows of texts of one length are spread over all GPUs in every way that uses them all: a copy on each with its
part of the rows, one copy cut as Megatron cuts it, stages with micro-batches, both. Each is timed as `tersor bench
latency` times steps, with random weights. What counts is the time until every row has a token. To every other
configuration of several ranks two numbers are fitted, the time beyond the tables that a sum over ranks takes in a chain
of kernels, and that a step takes which one stage hands to the next; the others are held out. Printed and written:
predicted and measured times, mean errors of both halves, and the regret: how much longer the way takes that is
predicted to be the fastest than the one that is. `--from FILE` times nothing: what a file has is fitted again.

`--add` keeps what the output has of other models: a model at a time may be measured. `--device cpu` runs all of it over
gloo, to try it out; its times say nothing.

    torchrun --nproc-per-node 2 bench/planner_measured.py --device cpu --model examples/tiny-lm:16bit --rows 2,4 \
        --contexts 64 --steps 2 -o measured.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import results_file
import torch
from torch import distributed

from tersor.bench import latency, report
from tersor.checkpoint.config import parse_scheme
from tersor.checkpoint.source import read_config
from tersor.engine import workers
from tersor.engine.config import EngineConfig
from tersor.hardware import chip_named
from tersor.models.config import DecoderConfig
from tersor.models.geometries import GEOMETRIES
from tersor.models.parts import of_config
from tersor.planner import links, rules
from tersor.planner.asked import Asked
from tersor.planner.cost import Kernels
from tersor.planner.made import Unfit
from tersor.planner.mesh import Axes, Mesh
from tersor.planner.parts import Workload
from tersor.planner.placement import Placement, Stage

MODELS = ("llama-3-8b:fp6_e3m2", "llama-3-8b:16bit", "llama-2-70b:fp6_e3m2", "llama-2-70b:16bit")
ROWS, CONTEXTS = "2,16,64", "512,2048"
METHOD = (
    "milliseconds until each of `rows` rows has a token, spread over all GPUs; measured as tersor bench latency does, "
    "in copies and stages with their part of the rows, times the micro-batches; predicted by tersor.planner with the "
    "tables of links that are named; corrected: so much longer for each sum over ranks, and for each step that is "
    "handed from stage to stage, as half of the configurations say"
)


@dataclass(kw_only=True)
class Row:
    """One configuration.

    Attributes:
        model, format: what was timed; the folder's name of one that has a folder.
        tensor, pipeline, copies: how all GPUs are dealt out.
        rows, context: on all GPUs, and tokens of each text.
        predicted: milliseconds, by tables.
        exchanges: of a pass.
        fitted: whether what exchanges take was fitted to it.
        measured: milliseconds; 0 until it is.
        corrected: milliseconds predicted, with what was fitted.
    """

    model: str
    format: str
    tensor: int
    pipeline: int
    copies: int
    rows: int
    context: int
    predicted: float
    exchanges: int
    fitted: bool = False
    measured: float = 0.0
    corrected: float = 0.0

    @property
    def batch(self) -> int:
        """Rows of one step of one copy."""
        return self.rows // self.copies // self.pipeline

    @property
    def counts(self) -> tuple[int, int]:
        """Sums over ranks in a pass, and steps that stages hand on until every row has a token."""
        return self.exchanges - (self.pipeline - 1), self.pipeline if self.pipeline > 1 else 0


def ways(ranks: int) -> list[tuple[int, int, int]]:
    """Return (tensor, pipeline, copies) of every way: a copy a rank, or one copy on all."""
    one = [(tensor, ranks // tensor, 1) for tensor in range(ranks, 0, -1) if ranks % tensor == 0]
    return [*one, (1, 1, ranks)] if ranks > 1 else one


def planned(
    label: str, format: str, raw: dict[str, Any], ranks: int, rows: Sequence[int], contexts: Sequence[int], prices: Any
) -> Iterator[tuple[Row, Placement]]:
    """Yield every configuration of a model that fits, with where its layers are.

    Args:
        label, format: of the model.
        raw: its config.json.
        ranks: GPUs.
        rows, contexts: every pair is one, of every way.
        prices: chip, dtype of activations, and tables of links.
    """
    chip, dtype, tables = prices
    model, kernels = of_config(raw, label, scheme_of(format)), Kernels(chip, dtype)
    for tensor, pipeline, copies in ways(ranks):
        for context in contexts:
            for count in rows:
                work = Workload(batch=count // copies, context=context, prompt=1, phases=("decode",))
                mesh = Mesh((ranks // copies,))
                setting = Asked(model, mesh, work, kernels, tables).ruled(Axes(mesh, 1, pipeline, tensor))
                try:
                    made = rules.by_ways(setting, rules.MEGATRON, min(pipeline, work.batch), "even")
                except Unfit as error:
                    print(f"not measured: {error}", flush=True)
                    continue
                bounds = [*made.starts, len(model.layers)]
                stages = [Stage(layers=span, ranks=tensor) for span in pairwise(bounds)]
                sent = sum(part.count for part in made.times if part.kind in ("sums", "pipeline"))
                found = Row(
                    model=label, format=format, tensor=tensor, pipeline=pipeline, copies=copies, rows=count,
                    context=context, predicted=1e3 * made.step, exchanges=sent,
                )  # fmt: skip
                yield found, Placement(tuple(stages))


def scheme_of(format: str) -> Any:
    """Return the scheme of weights; `None` is plain."""
    return None if format == "16bit" else parse_scheme(format, None, None, "--model")


def measure(
    found: Sequence[tuple[Row, Placement]], geometry: DecoderConfig, options: argparse.Namespace, hosts: Any
) -> None:
    """Time configurations of one model, each placement once; the first rank gets the times."""
    dtype = torch.float16 if options.device == "cuda" else torch.float32
    placements: list[Placement] = []
    for _, placement in found:
        if placement not in placements:
            placements.append(placement)
    for placement in placements:
        own = [row for row, other in found if other == placement]
        distributed.barrier(hosts)
        alone = placement.ranks == 1
        if alone and distributed.get_rank():
            continue
        config = EngineConfig(device=options.device, placement=None if alone else placement)
        team = workers.Team(workers.Seat(torch.device(options.device, 0 if options.device == "cuda" else None)))
        if not alone:
            team = workers.joined(config, placement, torch.device(options.device))
        batches, contexts = sorted({row.batch for row in own}), sorted({row.context for row in own})
        scheme, graphs = scheme_of(own[0].format), options.device == "cuda"
        runner = latency.runner_of(
            team.seat, config, geometry, scheme, dtype, batches, contexts, cuda_graph=graphs, head=scheme
        )
        if team.first:
            times = latency.measure(runner, own[0].model, own[0].format, batches, contexts, options.steps)
            for time in times:
                for row in own:
                    if (row.batch, row.context) == (time.batch, time.context):
                        row.measured = time.milliseconds * row.pipeline
                        print(f"{_words(row)}: {row.measured:.3f} ms, predicted {row.predicted:.3f}", flush=True)
        else:
            latency.fill(runner.caches)
            runner.follow()
        team.before_end(runner.release)
        team.close()
        del runner
        if options.device == "cuda":
            torch.cuda.empty_cache()


def fit(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the milliseconds beyond the tables of a sum over ranks and of a step that is handed on.

    By every other configuration of each kind that has several ranks: least squares of what is missing, as a share of
    what was measured. `fitted` and `corrected` of all rows are set.
    """
    for handed in (False, True):
        for number, row in enumerate(row for row in rows if row.exchanges and (row.pipeline > 1) == handed):
            row.fitted = number % 2 == 0
    half = [row for row in rows if row.fitted]
    shares = np.array([row.counts for row in half], dtype=float).reshape(-1, 2)
    measured = np.array([row.measured for row in half])
    missing = np.array([row.measured - row.predicted for row in half])
    found, *_ = np.linalg.lstsq(shares / measured[:, None], missing / measured, rcond=None)
    of_sum, of_step = (float(each) for each in found)
    for row in rows:
        sums, steps = row.counts
        row.corrected = row.predicted + of_sum * sums + of_step * steps
    return of_sum, of_step


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the mean errors and the regret of measured rows, by tables alone (`predicted`) and `corrected`."""
    of_sum, of_step = fit(rows)
    held = [row for row in rows if not row.fitted]
    found: dict[str, Any] = {"configurations": len(rows), "held_out": len(held)}
    found |= {"us_a_sum": 1e3 * of_sum, "us_a_step_handed_on": 1e3 * of_step}
    for name in ("predicted", "corrected"):
        lost = regrets(rows, name)
        found[name] = {
            "mean_error": _mean([error(row, name) for row in rows]),
            "mean_error_held_out": _mean([error(row, name) for row in held]),
            "largest_error": max(error(row, name) for row in rows),
            "mean_regret": _mean(lost),
            "largest_regret": max(lost, default=0.0),
            "choices": len(lost),
        }
    return found


def error(row: Row, name: str) -> float:
    """Return by which share of it a measured time is missed."""
    return abs(float(getattr(row, name)) / row.measured - 1)


def regrets(rows: Sequence[Row], name: str) -> list[float]:
    """Return how much longer the chosen way takes, of every model, rows and context that have two ways or more."""
    asked: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        asked.setdefault((row.model, row.format, row.rows, row.context), []).append(row)
    found = []
    for own in asked.values():
        if len(own) > 1:
            chosen = min(own, key=lambda row: float(getattr(row, name)))
            found.append(chosen.measured / min(row.measured for row in own) - 1)
    return found


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def _words(row: Row) -> str:
    return (
        f"{row.model} {row.format}, {row.rows} rows, {row.context} tokens, DP{row.copies} PP{row.pipeline} "
        f"TP{row.tensor}"
    )


def show(rows: Sequence[Row], found: dict[str, Any]) -> None:
    """Print a line for every configuration, and what they say."""
    for row in rows:
        print(
            f"{_words(row)} | measured {row.measured:.3f} ms | predicted {row.predicted:.3f} ms "
            f"{100 * (row.predicted / row.measured - 1):+.1f} % | corrected "
            f"{100 * (row.corrected / row.measured - 1):+.1f} %{' | fitted' if row.fitted else ''}"
        )
    for name in ("predicted", "corrected"):
        own = found[name]
        print(
            f"{name}: mean error {100 * own['mean_error']:.1f} %, held out {100 * own['mean_error_held_out']:.1f} %, "
            f"largest {100 * own['largest_error']:.1f} %; regret of {own['choices']} choices "
            f"{100 * own['mean_regret']:.1f} % in the mean, {100 * own['largest_regret']:.1f} % at most"
        )
    print(
        f"a sum over ranks takes {found['us_a_sum']:+.2f} us beside its table, a step that is handed on "
        f"{found['us_a_step_handed_on']:+.0f} us"
    )


def main() -> None:
    """Be one rank of torchrun; the first prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="NAME:FORMAT, a geometry's or a folder's; repeatable")
    parser.add_argument("--rows", default=ROWS, help="on all GPUs; multiples of their number")
    parser.add_argument("--contexts", default=CONTEXTS, help="tokens of a text")
    parser.add_argument("--steps", type=int, default=latency.STEPS, help="of a timed run")
    parser.add_argument("--links", type=Path, help="what tersor plan calibrate wrote; else the chip's tables")
    parser.add_argument("--chip", default="h200", help="whose kernels are predicted")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--add", action="store_true", help="keep what the output has of other models")
    parser.add_argument("-o", "--output", type=Path, help="default: results/planner_measured_xN.json, of N GPUs")
    parser.add_argument(
        "--from", dest="measured", type=Path, metavar="FILE", help="time nothing: fit and show that again"
    )
    options = parser.parse_args()
    if options.measured is not None:
        _again(options.measured, options.output)
        return
    if not distributed.is_torchelastic_launched():
        raise SystemExit("start all ranks: torchrun --nproc-per-node 2 bench/planner_measured.py")
    distributed.init_process_group("nccl" if options.device == "cuda" else "gloo")
    try:
        _run(options)
    finally:
        distributed.destroy_process_group()


def _again(path: Path, output: Path | None) -> None:
    """Fit and show what a file has, and write it where a place is named."""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**one) for one in result["rows"]]
    result |= {"method": METHOD, "summary": summary(rows), "rows": [asdict(row) for row in rows]}
    show(rows, result["summary"])
    if output is not None:
        report.write(output, report.text(result))


def _run(options: argparse.Namespace) -> None:
    ranks, hosts = distributed.get_world_size(), distributed.new_group(backend="gloo", timeout=timedelta(hours=2))
    if options.device == "cuda":
        torch.cuda.set_device(distributed.get_node_local_rank())
    rows, contexts = ([int(word) for word in words.split(",")] for words in (options.rows, options.contexts))
    if ranks < 2 or any(count % ranks for count in rows):
        raise SystemExit(f"rows {options.rows} are dealt out to {ranks} ranks: at least 2, and multiples of them")
    chip = chip_named(options.chip)
    tables = links.of_chip(chip) if options.links is None else links.read(options.links)
    path = options.output or results_file.RESULTS / f"planner_measured_x{ranks}.json"
    done: list[Row] = []
    names = [name.rpartition(":")[::2] for name in options.model or MODELS]
    if options.add and path.exists():
        before = [Row(**one) for one in json.loads(path.read_text(encoding="utf-8"))["rows"]]
        done = [row for row in before if (row.model, row.format) not in [(Path(name).name, one) for name, one in names]]
    for name, format in names:
        raw = GEOMETRIES[name] if name in GEOMETRIES else read_config(Path(name))
        prices = chip, torch.float16, tables
        found = list(planned(Path(name).name, format, raw, ranks, rows, contexts, prices))
        geometry = DecoderConfig.from_dict(raw)
        measure(found, replace(geometry, context=max(geometry.context, *contexts)), options, hosts)
        done += [row for row, _ in found]
        if distributed.get_rank() == 0:
            said = summary(done)
            result = {
                "kind": "planner measured", "version": 1, "method": METHOD, "ranks": ranks, "chip": chip.name,
                "links": {"label": tables.label, "sources": tables.sources}, "device": options.device,
                "summary": said, "rows": [asdict(row) for row in done],
            }  # fmt: skip
            report.write(path, report.text({"environment": report.environment(), **result}))
    distributed.barrier(hosts)
    if distributed.get_rank() == 0:
        show(done, said)
        print(f"written to {path}")


if __name__ == "__main__":
    main()
