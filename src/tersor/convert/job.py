"""Compress a checkpoint: from a directory or Hub id to a directory that appears when it is complete."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

from torch import nn

from tersor.checkpoint.config import Represented, parse_ignore
from tersor.checkpoint.conversion import Conversion, make_conversion
from tersor.checkpoint.exports import get_export
from tersor.checkpoint.modules import Architecture
from tersor.compress import CALIBRATED_RECIPE, DEFAULT_RECIPE, get_recipe
from tersor.compress.salience import KL
from tersor.convert import kernels
from tersor.convert.beside import model_dtype
from tersor.convert.calibrate import (
    Calibration,
    calibrate,
    check_options,
    plan,
    planned_again,
)
from tersor.convert.checks import (
    DEFAULT_FORMAT,
    DEFAULT_SHARD_BYTES,
    check_destination,
    check_growth,
    check_in_place,
    check_levels,
    check_shard_bytes,
    check_space,
)
from tersor.convert.making import Making
from tersor.convert.mix import STAND_IN, Mixable, fingerprint, mix_of
from tersor.convert.module import quantize_module
from tersor.convert.pipeline import Progress
from tersor.convert.report import Report
from tersor.convert.resume import Workplace
from tersor.convert.rotate import rotate
from tersor.convert.survey import Asked, Survey
from tersor.convert.target import parse_target
from tersor.convert.transforms import ROTATE, parse_transforms
from tersor.errors import InputError
from tersor.formats import Assignment
from tersor.hardware import resolve_device
from tersor.integrations.transformers.architecture import read_architecture


@overload
def quantize(
    model: nn.Module,
    output: None = None,
    *,
    format: str = ...,
    group_size: int | None = ...,
    scale_dtype: str | None = ...,
    algorithm: str | None = ...,
    ignore: Sequence[str] = ...,
    overrides: Mapping[str, Any] | Sequence[str] = ...,
    dry_run: bool = ...,
    device: str | None = ...,
    progress: Progress | None = ...,
    outliers: str | None = ...,
) -> Report: ...


@overload
def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = ...,
    *,
    format: str = ...,
    group_size: int | None = ...,
    scale_dtype: str | None = ...,
    algorithm: str | None = ...,
    ignore: Sequence[str] = ...,
    overrides: Mapping[str, Any] | Sequence[str] = ...,
    dry_run: bool = ...,
    resume: bool = ...,
    device: str | None = ...,
    calibration: str | os.PathLike[str] | None = ...,
    calibration_tokens: int | None = ...,
    calibration_window: int | None = ...,
    effort: str = ...,
    seed: int = ...,
    export: str = ...,
    shard_size: float = ...,
    revision: str | None = ...,
    progress: Progress | None = ...,
    trust_remote_code: bool = ...,
    transforms: Sequence[str] = ...,
    sparse: str = ...,
    outliers: str | None = ...,
    assignments: Mapping[str, Assignment] | None = ...,
    levels: Sequence[str] = ...,
    target_bits: float | None = ...,
    target_size: float | None = ...,
    target_latency: float | None = ...,
    batch: int | None = ...,
    chip: str | None = ...,
    target_shares: Sequence[float] | None = ...,
    score: str = ...,
) -> Report: ...


def quantize(
    model: nn.Module | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    format: str = DEFAULT_FORMAT,
    group_size: int | None = None,
    scale_dtype: str | None = None,
    algorithm: str | None = None,
    ignore: Sequence[str] = (),
    overrides: Mapping[str, Any] | Sequence[str] = (),
    dry_run: bool = False,
    resume: bool = False,
    device: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    calibration_tokens: int | None = None,
    calibration_window: int | None = None,
    effort: str = "normal",
    seed: int = 0,
    export: str = "tersor",
    shard_size: float = DEFAULT_SHARD_BYTES,
    revision: str | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    transforms: Sequence[str] = (),
    sparse: str = "auto",
    outliers: str | None = None,
    assignments: Mapping[str, Assignment] | None = None,
    levels: Sequence[str] = (),
    target_bits: float | None = None,
    target_size: float | None = None,
    target_latency: float | None = None,
    batch: int | None = None,
    chip: str | None = None,
    target_shares: Sequence[float] | None = None,
    score: str = KL,
) -> Report:
    """Compress the linear weights of a checkpoint, tensor by tensor, or those of a module, in place.

    A module in memory (any `nn.Module`; `convert.module`) takes neither output nor calibration, nor `resume`, `export`,
    `shard_size`, transforms, targets and assignments.

    A checkpoint that another method compressed (`checkpoint.released`) is decoded block by block on the way.

    Memory does not grow with the model: weights are read, encoded and written in blocks of rows. The output directory
    appears under its name when it is complete; until then the work is in `<output>.partial`.

    Args:
        model: a checkpoint directory, or a Hub id that is downloaded; or a module.
        output: the directory to make, which must not exist; `None` only for a dry run or a module.
        format: element format of the weights, such as `fp6` (`fp6_e2m3`), `int4` or `mxfp6_e2m3`; `bf16`, `fp16` or
            `fp32`, the dtype of the checkpoint, only repacks weights that are pruned, without loss.
        group_size: consecutive input channels that share a scale; `None` is one scale a row.
        scale_dtype: `float16` (default), `bfloat16`, `float32` or `e8m0`; exports and tables
            default to the model's dtype.
        algorithm: how codes are chosen, a key of `compress.RECIPES`: `rtn`, round to nearest, or `gptq`, which needs a
            text to calibrate on, and the transformers code of the model; `None` is `gptq` where there is a text.
        ignore: regular expressions of modules to leave alone; found anywhere in the module's name.
        overrides: `REGEX=FORMAT[:gN|:row][:SCALE_DTYPE]`, or a mapping of the two (or of a pattern to a mapping with
            `format`, `group_size`, `scale_dtype`); the first that is found decides. The output head, embeddings and
            routers are left alone unless a pattern spells their name.
        dry_run: only report what would be done.
        resume: continue the work that an interrupted run left in `<output>.partial`.
        device: where weights are encoded and blocks are calibrated: `cpu`, `cuda`, `cuda:N` or `auto`; `None` is the
            CPU, or where a module's weights are.
        calibration: a file of text (UTF-8), a file of JSON lines (`.jsonl`) with `text` or `messages`, or the id of a
            dataset, `owner/name`.
        calibration_tokens: how many tokens of it are used; `None` is 128 windows.
        calibration_window: tokens in a window; `None` is 2,048, or as many as the model takes.
        effort: `normal`, or `high`: a backward pass through the model says which outputs matter.
        seed: of the labels which that pass draws from the model, and of what transforms draw.
        export: checkpoint format: `tersor`, `humming`, `compressed-tensors` or `quark`.
        shard_size: bytes of tensors in an output file.
        revision: branch, tag or commit of a Hub id.
        progress: called with bytes done, bytes in all, and a tensor's name.
        trust_remote_code: whether Python code that comes with the model is run, to know its layers.
        transforms: what is done to the model beside choosing codes, of `convert.transforms.TRANSFORMS`.
        sparse: `auto`: a weight that was pruned, one with zeros, is stored as a mask and what is left of it where that
            takes fewer bytes; `off`: never. Recipes that calibrate, targets and exports store dense weights.
        outliers: a share of the weights of every row, such as `0.5%`, kept in 16 bits beside the codes of `format`, not
            of overrides: those that codes lose most on by the calibration text, without one the largest.
        assignments: linear module -> the level of each of its output features, all of one mix (`convert.mix.assign`
            makes them): what has no override gets its levels in place of `format`.
        levels: `FORMAT[:gN|:row][:SCALE_DTYPE]`, of which each output feature gets one by its score on the calibration
            text; where there is a target and none is given, those of `convert.mix.LEVELS`.
        target_bits: true bits a weight that all of them take.
        target_size: bytes of the checkpoint's tensors, in place of bits.
        target_latency: seconds that the products with all of them are predicted to take in a step, in place of bits.
        batch, chip: rows of that step, 1 for `None`, and the GPU by its name; `None` is an H200.
        target_shares: in place of all that, which part of all output features gets each level: MixLLM's count rule.
        score: by what output features are compared: `kl`, the divergence expected of each, or `mixllm`, its score.

    Returns:
        What was done, tensor by tensor.

    Raises:
        InputError: bad options or a bad checkpoint; nothing is left behind.
        OutputError: the output cannot be written; the work so far stays for `resume`.
    """
    limits = (target_bits, target_size, target_latency, batch, chip)
    target = parse_target(levels, *limits, group_size, scale_dtype, target_shares, score)
    mix = mix_of(assignments)
    wanted = parse_transforms(transforms)
    scales = (group_size, scale_dtype) != (None, None)
    check_levels(target is not None, mix is not None, dry_run, export, outliers, scales, format)
    algorithm = algorithm or (DEFAULT_RECIPE if calibration is None else CALIBRATED_RECIPE)
    text = None
    if calibration is not None:
        text = Calibration(os.fspath(calibration), calibration_tokens, calibration_window, effort, seed, wanted)
    elif (calibration_tokens, calibration_window, effort, 0 if ROTATE in wanted else seed) != (None, None, "normal", 0):
        raise InputError("calibration tokens, window, effort and seed say nothing without a calibration text")
    if isinstance(model, nn.Module):
        if mix is not None or target is not None:
            raise InputError("output features get levels in a checkpoint on disk: a module is compressed in place")
        check_in_place(output, resume, export, shard_size, wanted)
        if text is not None:
            raise InputError("a module in memory is rounded to nearest: save it, and calibrate the checkpoint")
        return quantize_module(
            model,
            format=format,
            group_size=group_size,
            scale_dtype=scale_dtype,
            algorithm=algorithm,
            ignore=ignore,
            overrides=overrides,
            dry_run=dry_run,
            device=device,
            progress=progress,
            outliers=outliers,
        )
    get_export(export)
    if not dry_run or text is not None:
        check_options(algorithm, text, wanted, scored=target is not None)
    where = resolve_device(device or "cpu")
    shard_bytes = check_shard_bytes(shard_size)
    asked = Asked(format, group_size, scale_dtype, overrides, outliers=outliers)
    destination = check_destination(output, dry_run)
    patterns = parse_ignore(ignore)
    dense = text or target or mix or wanted or outliers or export != "tersor"
    asked = asked.check(sparse, "a calibration, levels, transforms, outliers and exports store none" if dense else "")
    with Making.of(model, revision, destination, algorithm, where, progress) as making:
        source, released, untied = making.source, making.released, ROTATE in wanted
        if untied:
            rotate(source, seed, trust_remote_code=trust_remote_code)
        chosen_export = get_export(export, model_dtype(source))
        asked = asked.with_scales(chosen_export.default_scale_dtype).beside(model_dtype(source))
        scheme: Represented = mix or (STAND_IN if target else asked.scheme())
        provenance = making.provenance
        if wanted:
            provenance |= {"transforms": ", ".join(wanted), "seed": str(seed)}
        given_overrides, survey = asked.parsed_overrides(), Survey()

        def converted(architecture: Architecture) -> Conversion:
            return make_conversion(
                source,
                architecture,
                scheme=scheme,
                ignore=patterns,
                overrides=given_overrides,
                export=chosen_export,
                shard_bytes=shard_bytes,
                provenance=provenance,
                assignments=assignments,
                find_pruned=survey.find if asked.looked else None,
            )

        architecture = read_architecture(source.directory, trust_remote_code=trust_remote_code, untied=untied)
        conversion = converted(architecture)
        if released is not None:
            check_growth(source, conversion, released, patterns)
        if export == "tersor":
            mixed = target.mix(Mixable.of(conversion)).levels if target is not None else ()
            kernels.tell(conversion, model_dtype(source), where, mixed)
        if dry_run or destination is None:
            return making.planned(conversion, chosen_export)
        given, targets, scored = None, architecture.find(source.tensors) if text is not None else {}, target is not None
        if text is not None:
            given = plan(source, targets, conversion, text, where, trust_remote_code=trust_remote_code, scored=scored)
            provenance |= given.provenance
        identity = {
            "export": export,
            "shard size": shard_bytes,
            **{key: value for key, value in conversion.config.to_dict().items() if key != "provenance"},
            **({"transforms": list(wanted), "seed": seed} if wanted else {}),
            **({"levels of output features": fingerprint(assignments)} if assignments else {}),
            **(target.identity(conversion) if target is not None else {}),
            **(given.identity if given is not None else {}),
        }
        if target is not None:
            assert given is not None
            target.check(conversion, given)
            provenance["target"] = target.words
        with Workplace(destination, making.identity(identity), resume) as work:
            mixing = None
            if target is not None:
                assert given is not None
                mixing = target.assign(conversion, given, work, progress)
                assignments = mixing.assignments
                scheme = mix_of(assignments) or scheme
                conversion = converted(architecture)
                given = planned_again(given, targets, conversion)
            del architecture  # with the model behind it
            unfinished, ready = len(work.rows) < len(conversion.shards), None
            check_space(conversion, work, given.disk_bytes(work.directory) if given is not None and unfinished else 0)
            if given is not None and unfinished and (get_recipe(algorithm).needs or given.calibration.changes):
                conversion, ready = calibrate(given, conversion, algorithm, work.directory, progress)
            # What calibration does not reach, such as an embedding that is asked for, is rounded to nearest.
            rounding = DEFAULT_RECIPE if given is not None else algorithm
            report = making.write(conversion, chosen_export, work, rounding, ready)
        return report if mixing is None else replace(report, mix=mixing.to_dict())
