"""Prune a checkpoint: zeros chosen layer by layer on a text, the other weights fitted to them and packed."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tersor.checkpoint.config import Override, check_pattern, finds, parse_ignore, parse_scheme
from tersor.checkpoint.conversion import Conversion, make_conversion
from tersor.checkpoint.exports import get_export
from tersor.checkpoint.released import read_released
from tersor.checkpoint.source import open_source
from tersor.checkpoint.writer import shard_names, split_into_shards
from tersor.compress.prune import Pattern, get_algorithm
from tersor.compress.prune.allocate import allocate as allocate_shares
from tersor.convert.beside import model_dtype, write_beside
from tersor.convert.calibrate import Calibration, Plan, calibrate, costs, discard, plan
from tersor.convert.calibrate.pruning import PruneCoder
from tersor.convert.calibrate.units import Units
from tersor.convert.checks import (
    DEFAULT_SHARD_BYTES,
    check_apart,
    check_destination,
    check_shard_bytes,
    check_space,
)
from tersor.convert.layers import write_layers
from tersor.convert.mix import STAND_IN
from tersor.convert.pipeline import Pipeline, Progress
from tersor.convert.report import Report
from tersor.convert.resume import Workplace
from tersor.errors import InputError
from tersor.formats import Scheme
from tersor.formats.dtypes import FLOAT_DTYPES
from tersor.hardware import resolve_device
from tersor.integrations.transformers.architecture import read_architecture
from tersor.version import __version__

DEAD_NEURONS = ("report", "drop")
"""What can be done about MLP units that never fire on the calibration text."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Which zeros are asked for.

    Attributes:
        usual: of every layer that no override finds.
        overrides: (regular expression of modules, their pattern); the first that finds a module decides.
    """

    usual: Pattern
    overrides: tuple[tuple[str, Pattern], ...]

    @staticmethod
    def parse(sparsity: Any, block: str, scope: str, overrides: Sequence[str]) -> Asked:
        """Return what options mean.

        Args:
            sparsity, block, scope: as `Pattern.parse` takes them.
            overrides: `REGEX=SPARSITY[:n:m][:row|:layer]`.

        Raises:
            InputError: one of them means nothing, or a share is out of reach; it is named.
        """
        usual = Pattern.parse(sparsity, block, scope)
        found: dict[str, Pattern] = {}
        for text in overrides:
            pattern, separator, value = text.rpartition("=") if isinstance(text, str) else ("", "", "")
            if not separator or not pattern or not value:
                raise InputError(f"override {text!r} is not REGEX=SPARSITY, such as 'down_proj=0.3'")
            if check_pattern(pattern, "override") in found:
                raise InputError(f"override {pattern!r} stands there twice: keep one of them")
            share, *details = value.split(":")
            own = details.pop() if details and details[-1] in ("row", "layer") else scope
            try:
                found[pattern] = Pattern.parse(share, ":".join(details) or block, own)
            except InputError as error:
                raise InputError(f"override {text!r}: {error}") from None
        return Asked(usual, tuple(found.items()))

    def of(self, names: Sequence[str]) -> Pattern:
        """Return the pattern of a module that has these names."""
        return next((pattern for regex, pattern in self.overrides if finds(regex, names)), self.usual)

    def identity(self) -> dict[str, Any]:
        """Return what was asked for, as JSON values."""
        return {"sparsity": self.usual.key(), "overrides": {regex: found.key() for regex, found in self.overrides}}


def parse_values(text: str | None, group_size: int | None, scale_dtype: str | None) -> Scheme | torch.dtype | None:
    """Return the scheme or the dtype that a name of values means; `None` is the dtype of the source.

    Args:
        text: `bf16`, `fp16`, `fp32` or such a dtype in full, or `FORMAT[:gN|:row][:SCALE_DTYPE]`.
        group_size, scale_dtype: where a format names none.

    Raises:
        FormatError: there is no such format.
        InputError: groups or scales of values that have none.
    """
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    if text is None or short.get(text, text) in FLOAT_DTYPES:
        if (group_size, scale_dtype) != (None, None):
            raise InputError("group size and scale dtype are for values with codes, such as --values fp6")
        return None if text is None else FLOAT_DTYPES[short.get(text, text)]
    return parse_scheme(text, group_size, scale_dtype, f"values {text!r}")


def prune(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    *,
    sparsity: float | str | None = None,
    pattern: str = "",
    scope: str | None = None,
    algorithm: str = "admm",
    values: str | None = None,
    group_size: int | None = None,
    scale_dtype: str | None = None,
    update: bool = True,
    allocate: bool = False,
    dead_neurons: str | None = None,
    ignore: Sequence[str] = (),
    overrides: Sequence[str] = (),
    calibration: str | os.PathLike[str] | None = None,
    calibration_tokens: int | None = None,
    calibration_window: int | None = None,
    seed: int = 0,
    resume: bool = False,
    device: str | None = None,
    shard_size: float = DEFAULT_SHARD_BYTES,
    revision: str | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Prune the linear layers of a checkpoint's decoder blocks.

    Memory does not grow with the model: blocks are pruned one by one, each on what it reads in the model pruned so far.
    The output directory appears under its name when it is complete; until then the work is in `<output>.partial`.

    Args:
        model: a checkpoint directory, or a Hub id that is downloaded.
        output: the directory to make, which must not exist.
        sparsity: the share of weights that become zero.
        pattern: `n:m`: at most n weights of m consecutive input channels stay; empty is none.
        scope: `layer` or `row`, where the share holds; `None` is what the algorithm's paper has.
        algorithm: which weights stay, a key of `compress.prune.ALGORITHMS`.
        values: of the weights that stay: a dtype such as `bf16`, or a format such as `fp6`; `None` is the dtype that they
            come in.
        group_size, scale_dtype: of a format.
        update: whether the weights that stay are fitted to their mask.
        allocate: whether matrices without an override get shares of their own, by what zeros in each cost.
        dead_neurons: `report` counts the MLP units that never fire on the text, `drop` makes them zero as well; `None`
            does not look for them.
        ignore: regular expressions of modules to leave alone.
        overrides: `REGEX=SPARSITY[:n:m][:row|:layer]`; the first that finds a module decides.
        calibration: a file of text (UTF-8), a file of JSON lines (`.jsonl`), or the id of a dataset.
        calibration_tokens, calibration_window: as for `convert.quantize`.
        seed: of the labels by which costs are measured.
        resume: continue the work that an interrupted run left in `<output>.partial`.
        device: where blocks are pruned: `cpu` (also `None`), `cuda`, `cuda:N` or `auto`.
        shard_size: bytes of tensors in an output file.
        revision: branch, tag or commit of a Hub id.
        progress: called with bytes done, bytes in all, and a name.
        trust_remote_code: whether Python code that comes with the model is run.

    Returns:
        What was done, tensor by tensor.

    Raises:
        InputError: bad options or a bad checkpoint; nothing is left behind.
        OutputError: the output cannot be written; the work so far stays for `resume`.
    """
    started = time.monotonic()
    chosen = get_algorithm(algorithm)
    asked = Asked.parse(sparsity, pattern, chosen.scope if scope is None else scope, overrides)
    if allocate and asked.usual.exact:
        raise InputError(f"{asked.usual.most}:{asked.usual.of} leaves no share to allocate: give a larger --sparsity")
    if dead_neurons not in (None, *DEAD_NEURONS):
        raise InputError(f"dead neurons {dead_neurons!r} is neither of {', '.join(DEAD_NEURONS)}")
    units = None if dead_neurons is None else Units(drop=dead_neurons == "drop")
    numbers = parse_values(values, group_size, scale_dtype)
    if calibration is None:
        raise InputError("pruning needs a text to calibrate on: add --calibration FILE")
    text = Calibration(os.fspath(calibration), calibration_tokens, calibration_window, seed=seed)
    where = resolve_device(device or "cpu")
    shard_bytes = check_shard_bytes(shard_size)
    patterns = parse_ignore(ignore)
    destination = check_destination(output, dry_run=False)
    assert destination is not None
    with open_source(model, revision) as source:
        check_apart(source, destination)
        released = read_released(source)
        if released is not None:
            source.tensors = released.tensors
        scheme = numbers if isinstance(numbers, Scheme) else STAND_IN
        provenance = {
            "tersor": __version__,
            "algorithm": algorithm,
            "sparsity": asked.usual.key(),
            "source": source.label,
            **({"source_revision": revision} if revision is not None else {}),
            **({"source_method": released.method} if released is not None else {}),
        }
        export = get_export("tersor", model_dtype(source))
        architecture = read_architecture(source.directory, trust_remote_code=trust_remote_code)
        conversion = make_conversion(
            source,
            architecture,
            scheme=scheme,
            ignore=patterns,
            overrides=[Override(regex, scheme) for regex, _ in asked.overrides],
            export=export,
            shard_bytes=shard_bytes,
            provenance=provenance,
        )
        layers = _patterns_of(conversion, asked)
        companions = source.companions()
        targets = architecture.find(source.tensors)
        del architecture  # with the model behind it
        given = plan(source, targets, conversion, text, where, trust_remote_code=trust_remote_code, scored=allocate)
        outside = sorted(set(layers) - {task.name for task in given.tasks})
        if outside:
            raise InputError(f"{outside[0]} is in no decoder block and cannot be pruned: ignore it")
        provenance.update(given.provenance)
        identity = {
            "tersor": __version__,
            "verb": "prune",
            "model": source.label,
            "shard size": shard_bytes,
            "algorithm": algorithm,
            "values": str(numbers.key() if isinstance(numbers, Scheme) else numbers),
            "update": update,
            "allocate": allocate,
            "dead neurons": dead_neurons,
            **asked.identity(),
            "ignore": list(patterns),
            "source's compression": dict(released.settings) if released is not None else None,
            **given.identity,
            "weights": source.fingerprint(),
        }
        work = Workplace(destination, identity, resume)
        try:
            first = len(work.rows)
            try:
                check_space(conversion, work, given.disk_bytes(work.directory))
                if allocate:
                    layers = _allocated(layers, asked, given, conversion, work.directory, progress)
                coder = PruneCoder(layers, algorithm, numbers, update=update, units=units)
                ready = calibrate(given, conversion, algorithm, work.directory, progress, coder, units)
                final = conversion if isinstance(numbers, Scheme) else _dense(conversion)
                names = [name for name, _ in final.shards]
                pipeline = Pipeline(final, "rtn", work.directory, where, progress, ready)
                streaming = time.monotonic()
                pipeline.run(first, lambda number, rows: work.finished(rows, names[: number + 1]))
                stream_seconds = time.monotonic() - streaming
                write_beside(source, final, export, "rtn", companions, work.directory)
                write_layers(final, (row for rows in work.rows for row in rows), work.directory)
                discard(work.directory)
                work.publish()
            except InputError:
                work.discard()
                raise
            done = {row.name: row for rows in work.rows for row in rows}
            return Report(
                source=source.label,
                output=str(destination),
                scheme=scheme.key(),
                export=export.name,
                rows=tuple(done[step.source.spec.name] for step in final.steps),
                files=tuple(names),
                seconds=time.monotonic() - started,
                stream_seconds=stream_seconds,
                bytes_read=conversion.input_bytes,
                source_method=released.method if released is not None else "",
            )
        finally:
            work.close()


def _patterns_of(conversion: Conversion, asked: Asked) -> Mapping[str, Pattern]:
    """Return the pattern of every layer that is pruned, each checked against its channels."""
    found = {}
    for step in conversion.steps:
        if step.layer is not None and step.scheme is not None:
            found[step.layer.module] = asked.of(step.layer.names)
            found[step.layer.module].check(step.layer.shape[-1], step.layer.module)
    return found


def _allocated(
    layers: Mapping[str, Pattern],
    asked: Asked,
    given: Plan,
    conversion: Conversion,
    directory: Path,
    progress: Progress | None,
) -> dict[str, Pattern]:
    """Return patterns with the share of every matrix by what its zeros cost; experts and overrides keep theirs."""
    apart = {task.name for task in given.tasks if task.site.part}
    alike = [name for name, found in layers.items() if found == asked.usual and name not in apart]
    counts = costs(given, conversion, set(alike), directory, progress)
    least = 1 - asked.usual.most / asked.usual.of if asked.usual.of else 0.0
    shares = allocate_shares({name: counts[name] for name in alike}, asked.usual.sparsity)
    return {**layers, **{name: replace(asked.usual, sparsity=max(share, least)) for name, share in shares.items()}}


def _dense(conversion: Conversion) -> Conversion:
    """Return the conversion that writes pruned weights as the dense tensors that they were."""
    steps = tuple(
        replace(step, scheme=None, stored=None, note="pruned, dense") if step.scheme is not None else step
        for step in conversion.steps
    )
    shards = split_into_shards([step.outputs for step in steps], 5_000_000_000)
    named = zip(shard_names(len(shards)), (tuple(indices) for indices in shards), strict=True)
    return replace(conversion, steps=steps, shards=tuple(named))
