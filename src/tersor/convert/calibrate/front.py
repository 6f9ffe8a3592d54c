"""What is asked of a calibration, checked before the work starts, and what it hands to the pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tersor.checkpoint.conversion import Conversion, Step
from tersor.checkpoint.modules import Target
from tersor.checkpoint.source import Source
from tersor.compress import get_recipe
from tersor.compress.salience import KL
from tersor.convert.beside import model_dtype
from tersor.convert.calibrate.coder import Coder, RecipeCoder
from tersor.convert.calibrate.run import Run
from tersor.convert.calibrate.scores import Scoring
from tersor.convert.calibrate.sensitivity import Sensitivity
from tersor.convert.calibrate.store import VALUE, Store
from tersor.convert.calibrate.tasks import Task, find_tasks, parameters_of, replaced
from tersor.convert.calibrate.text import Calibration, read_windows, source_label
from tersor.convert.calibrate.units import Units
from tersor.convert.pipeline import Progress, Ready
from tersor.convert.transforms import CALIBRATED, ROTATE
from tersor.errors import InputError, TersorError
from tersor.formats import Mix
from tersor.formats.dtypes import float_dtype
from tersor.integrations.transformers.blocks import BlockModel
from tersor.integrations.transformers.load import load_tokenizer


def check_options(
    algorithm: str, calibration: Calibration | None, transforms: Sequence[str] = (), *, scored: bool = False
) -> None:
    """Check that a text is there where the algorithm, a transform or a score needs one, and nowhere else.

    Args:
        algorithm: a key of `compress.RECIPES`.
        calibration: the text.
        transforms: what is done beside choosing codes.
        scored: whether output features are scored.

    Raises:
        InputError: it is not so, or there is no such algorithm.
    """
    needs = get_recipe(algorithm).needs
    changing = [name for name in transforms if name in CALIBRATED]
    if needs and calibration is None:
        raise InputError(f"algorithm {algorithm!r} needs a text to calibrate on: add --calibration FILE")
    if changing and calibration is None:
        raise InputError(f"transform {changing[0]!r} needs a text to calibrate on: add --calibration FILE")
    if scored and calibration is None:
        raise InputError("a target needs a text by which output features are scored: add --calibration FILE")
    if not needs and not scored and not changing and calibration is not None:
        raise InputError(f"algorithm {algorithm!r} takes no calibration text: leave it out, or use --algorithm gptq")


@dataclass(frozen=True, slots=True)
class Plan:
    """A calibration that can start.

    Attributes:
        ids: int64 [W, T], the windows.
        model: built, nothing loaded.
        tasks: what is calibrated.
        parameters: for every step of the conversion the parameter that its tensor becomes, or a part of.
        calibration: what was asked for.
        scored: whether output features are scored, by a backward pass.
    """

    ids: torch.Tensor
    model: BlockModel
    tasks: tuple[Task, ...]
    parameters: tuple[str, ...]
    calibration: Calibration
    scored: bool = False

    @property
    def backward(self) -> bool:
        """Whether there is a backward pass."""
        return self.scored or self.calibration.effort == "high"

    @property
    def words(self) -> str:
        """What the model is calibrated on, such as `128 windows of 2048 tokens of calibration.txt`."""
        count, window = self.ids.shape
        return f"{count} windows of {window} tokens of {source_label(self.calibration.source)}"

    @property
    def provenance(self) -> dict[str, str]:
        """What config.json says of it."""
        return {"calibration": self.words, "effort": self.calibration.effort, "seed": str(self.calibration.seed)}

    def disk_bytes(self, directory: Path) -> int:
        """Return how many bytes more are taken while the work lasts: by finished blocks, and by gradients."""
        needed = sum(task.step.output_bytes for task in self.tasks)
        if self.backward:
            hidden = self.model.model.config.get_text_config().hidden_size
            stream = self.ids.numel() * hidden * self.model.dtype.itemsize
            needed += (len(self.model.blocks) + 2) * stream
        return max(0, needed - Store.held_bytes(directory))

    @property
    def identity(self) -> dict[str, Any]:
        """What the result depends on, as JSON values: the tokens, the options, and what computes."""
        device = self.model.device
        on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        return {
            "calibration": self.words,
            "calibration tokens": hashlib.sha256(self.ids.numpy().tobytes()).hexdigest(),
            "effort": self.calibration.effort,
            "seed": self.calibration.seed,
            "torch": torch.__version__,
            "calibration on": f"{on}, {str(self.model.dtype).removeprefix('torch.')}",
        }


def plan(
    source: Source,
    targets: Mapping[str, Target],
    conversion: Conversion,
    calibration: Calibration,
    device: torch.device,
    *,
    trust_remote_code: bool,
    scored: bool = False,
) -> Plan:
    """Read the text and build the model, so that whatever is wrong is said before the work starts.

    Args:
        source: what is compressed.
        targets: where its tensors go in the model.
        conversion: what becomes of them.
        calibration: what was asked for.
        device: where blocks compute.
        trust_remote_code: whether Python code that comes with the model is run.

    Raises:
        InputError: the text is not as asked for, or the model cannot be calibrated.
        UnsupportedError: a dataset is asked for, and its package is not installed.
    """
    parameters = parameters_of(conversion, targets)
    weights = [
        (parameter, step.source.spec.numel)
        for step, parameter in zip(conversion.steps, parameters, strict=True)
        if step.scheme is not None
    ]
    dtype = _dtype(source, device, scored or calibration.effort == "high")
    untied = ROTATE in calibration.transforms
    model = BlockModel(source.directory, device, dtype, weights, trust_remote_code=trust_remote_code, untied=untied)
    tokenizer = load_tokenizer(source.directory, trust_remote_code=trust_remote_code)
    count, window = calibration.shape(model.positions)
    vocabulary = int(model.model.config.get_text_config().vocab_size)
    ids = read_windows(calibration.source, tokenizer, count, window, vocabulary)
    tasks = find_tasks(conversion, targets, model)
    return Plan(ids, model, tuple(tasks), tuple(parameters), calibration, scored)


def planned_again(given: Plan, targets: Mapping[str, Target], conversion: Conversion) -> Plan:
    """Return the same calibration for another conversion of the same tensors."""
    parameters = parameters_of(conversion, targets)
    return replace(given, tasks=tuple(find_tasks(conversion, targets, given.model)), parameters=tuple(parameters))


def score(
    given: Plan,
    conversion: Conversion,
    modules: Container[str],
    mix: Mix,
    directory: Path,
    progress: Progress | None,
    by: str = KL,
) -> dict[str, torch.Tensor]:
    """Return what each output feature of modules loses at each level of a mix, float64 [levels, OC].

    Args:
        given: what to do.
        conversion: of any schemes; what becomes of every tensor is of no account here.
        modules: which are scored.
        mix: the levels.
        directory: where the output is made; scores stand in its folder `calibration`.
        progress: called after every block.
        by: a key of `salience.SCORES`; MixLLM's takes the labels of the text, whose gradients nothing else needs.

    Raises:
        InputError, CheckpointError, OutputError: as `Scoring.run` says.
        TersorError: the device's memory runs out.
    """
    steps = list(zip(conversion.steps, given.parameters, strict=True))
    tasks = [task for task in given.tasks if task.name in modules]
    scoring = Scoring(given.model, steps, tasks, mix, Store(directory), progress, by)
    keep = given.calibration.effort == "high" and by == KL
    with _memory(given.model.device):
        return scoring.run(given.ids, seed=given.calibration.seed if by == KL else None, keep_gradients=keep)


def costs(
    given: Plan, conversion: Conversion, modules: Container[str], directory: Path, progress: Progress | None
) -> dict[str, torch.Tensor]:
    """Return how many weights of modules cost how much, as `compress.prune.allocate` counts them.

    Arguments and errors are those of `score`.
    """
    steps = list(zip(conversion.steps, given.parameters, strict=True))
    tasks = [task for task in given.tasks if task.name in modules]
    scoring = Sensitivity(given.model, steps, tasks, Store(directory), progress)
    with _memory(given.model.device):
        return scoring.run(given.ids, seed=given.calibration.seed, keep_gradients=False)


def calibrate(
    given: Plan,
    conversion: Conversion,
    recipe: str,
    directory: Path,
    progress: Progress | None,
    coder: Coder | None = None,
    units: Units | None = None,
) -> tuple[Conversion, dict[int, Ready]]:
    """Calibrate all blocks that are not finished yet, and write the log.

    Args:
        given: what to do.
        conversion: what becomes of every tensor.
        recipe: what the log calls the algorithm; without a `coder` how codes are chosen, a key of `compress.RECIPES`.
        directory: where the output is made; what is finished stands in its folder `calibration`.
        progress: called after every block.
        coder: what becomes of weights, where it is not codes by a recipe.
        units: learns which units never fire, where that is wanted.

    Returns:
        The conversion, in which norms and biases that transforms changed are seen as they are now; and the packed
        weights by their steps.

    Raises:
        InputError, CheckpointError, OutputError: as `Run.run` says.
        TersorError: as it says, and where the device's memory runs out.
    """
    store = Store(directory)
    steps = list(zip(conversion.steps, given.parameters, strict=True))
    run = Run(given.model, steps, given.tasks, coder or RecipeCoder(recipe), store, progress, given.calibration, units)
    with _memory(given.model.device):
        run.run(given.ids)
    ready: dict[int, Ready] = {}
    changed: dict[int, Step] = {}
    records = [store.record(block) for block in sorted({task.block for task in given.tasks})]
    for record in records:
        ready |= store.ready(record)
        for number in record["changed"]:
            changed[number] = replaced(conversion.steps[number], store.tensors(record["block"], number)[VALUE])
    store.write_log(_log(given, conversion, recipe, records, ready))
    now = tuple(changed.get(number, step) for number, step in enumerate(conversion.steps))
    return replace(conversion, steps=now), ready


@contextmanager
def _memory(device: torch.device) -> Iterator[None]:
    """Say in one line where a device's memory runs out; what is finished stays."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise TersorError(f"the memory of {device} ran out: free some, and run again with --resume") from None


def discard(directory: Path) -> None:
    """Remove what a calibration kept while it ran, if there is any; its log stays."""
    Store.discard(directory)


def _log(
    given: Plan, conversion: Conversion, recipe: str, records: list[dict[str, Any]], ready: Mapping[int, Ready]
) -> dict[str, Any]:
    """Return the log as JSON values."""
    count, window = given.ids.shape
    layers = [{"block": record["block"], **line} for record in records for line in record["layers"]]
    return {
        "algorithm": recipe,
        "source": source_label(given.calibration.source),
        "windows": count,
        "window": window,
        "effort": given.calibration.effort,
        "seed": given.calibration.seed,
        "transforms": list(given.calibration.transforms),
        "computed_on": given.identity["calibration on"],
        "seconds": round(sum(record["seconds"] for record in records), 3),
        "blocks": [{"block": record["block"], "seconds": record["seconds"]} for record in records],
        "layers": layers,
        **_dead(records),
        **{
            kind: [{"block": record["block"], **line} for record in records for line in record[kind]]
            for kind in ("scales", "norms")
            if any(record[kind] for record in records)
        },
        "rarely_hit_experts": [
            line["layer"] if not isinstance(line["tokens"], list) else f"{line['layer']}[{expert}]"
            for line in layers
            for expert in line.get("rarely_hit", ())
        ],
        "rounded_to_nearest": [
            step.layer.module
            for index, step in enumerate(conversion.steps)
            if step.scheme is not None and step.layer is not None and index not in ready
        ],
    }


def _dead(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the units that never fire, by layer, where they were looked for."""
    if not any("dead_units" in record for record in records):
        return {}
    return {"dead_units": {name: units for record in records for name, units in record["dead_units"].items()}}


def _dtype(source: Source, device: torch.device, gradients: bool) -> torch.dtype:
    """Return the dtype that blocks compute in: float32 on a CPU, else the model's.

    Gradients are too small for float16: there bfloat16 takes its place.
    """
    dtype = torch.float32 if device.type == "cpu" else float_dtype(model_dtype(source))
    return torch.bfloat16 if dtype == torch.float16 and gradients else dtype
