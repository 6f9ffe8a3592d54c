"""Prune a checkpoint: zeros chosen layer by layer on a text, the other weights fitted to them and packed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tersor.checkpoint.config import Override, parse_ignore
from tersor.checkpoint.conversion import Conversion, make_conversion
from tersor.checkpoint.exports import get_export
from tersor.checkpoint.modules import Architecture, LinearLayer
from tersor.checkpoint.names import MASK
from tersor.checkpoint.pruned import FindPruned
from tersor.checkpoint.source import StoredTensor
from tersor.compress import DEFAULT_RECIPE
from tersor.compress.prune import Pattern, get_algorithm
from tersor.compress.prune.allocate import allocate as allocate_shares
from tersor.convert import kernels
from tersor.convert.beside import model_dtype
from tersor.convert.calibrate import Calibration, Plan, calibrate, costs, plan
from tersor.convert.calibrate.alone import alone_bytes, code_alone
from tersor.convert.calibrate.pruning import PruneCoder
from tersor.convert.calibrate.store import LOG_NAME
from tersor.convert.calibrate.units import Units
from tersor.convert.checks import DEFAULT_SHARD_BYTES, check_destination, check_shard_bytes, check_space
from tersor.convert.making import Making
from tersor.convert.pipeline import Progress, Ready
from tersor.convert.report import Report
from tersor.convert.resume import Workplace
from tersor.convert.survey import dense_bytes
from tersor.convert.zeros import DEAD_NEURONS, Asked, check_without_text, parse_values
from tersor.errors import InputError
from tersor.formats import Pruned, Sparse
from tersor.hardware import resolve_device
from tersor.integrations.transformers.architecture import read_architecture
from tersor.layouts import bitmap


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
    update: bool | None = None,
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
    """Prune the linear layers of a checkpoint's decoder blocks; without a text, all linear layers.

    Memory does not grow with the model: blocks are pruned one by one, each on what it reads in the model pruned so far,
    and without a text weights one by one. The output directory appears under its name when it is complete; until then
    the work is in `<output>.partial`.

    Args:
        model: a checkpoint directory, or a Hub id that is downloaded.
        output: the directory to make, which must not exist.
        sparsity: the share of weights that become zero.
        pattern: `n:m`: at most n weights of m consecutive input channels stay; empty is none.
        scope: `layer` or `row`, where the share holds; `None` is what the algorithm's paper has.
        algorithm: which weights stay, a key of `compress.prune.ALGORITHMS`.
        values: of the weights that stay: a format such as `fp6`, or a dtype such as `bf16`; `None` is the model's.
        group_size, scale_dtype: of a format.
        update: whether the weights that stay are fitted to their mask; `None` is with a text.
        allocate: whether matrices without an override get shares of their own, by what zeros in each cost.
        dead_neurons: `report` counts the MLP units that never fire on the text, `drop` makes them zero as well; `None`
            does not look for them.
        ignore: regular expressions of modules to leave alone.
        overrides: `REGEX=SPARSITY[:n:m][:row|:layer]`; the first that finds a module decides.
        calibration: a file of text (UTF-8), a file of JSON lines (`.jsonl`), or the id of a dataset; `magnitude` needs
            none.
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
    chosen = get_algorithm(algorithm)
    asked = Asked.parse(sparsity, pattern, chosen.scope if scope is None else scope, overrides)
    if allocate and asked.usual.exact:
        raise InputError(f"{asked.usual.most}:{asked.usual.of} leaves no share to allocate: give a larger --sparsity")
    if dead_neurons not in (None, *DEAD_NEURONS):
        raise InputError(f"dead neurons {dead_neurons!r} is neither of {', '.join(DEAD_NEURONS)}")
    units = None if dead_neurons is None else Units(drop=dead_neurons == "drop")
    parse_values(values, group_size, scale_dtype, "float32")
    text = None
    if calibration is not None:
        text = Calibration(os.fspath(calibration), calibration_tokens, calibration_window, seed=seed)
    else:
        tokens = (calibration_tokens, calibration_window, seed) != (None, None, 0)
        check_without_text(algorithm, update=update, allocate=allocate, dead_neurons=dead_neurons, tokens=tokens)
    fitted = text is not None if update is None else update
    where = resolve_device(device or "cpu")
    shard_bytes = check_shard_bytes(shard_size)
    patterns = parse_ignore(ignore)
    destination = check_destination(output, dry_run=False)
    assert destination is not None
    with Making.of(model, revision, destination, algorithm, where, progress) as making:
        source = making.source
        sparse = parse_values(values, group_size, scale_dtype, model_dtype(source))
        export = get_export("tersor", model_dtype(source))
        provenance = {**making.provenance, "sparsity": asked.usual.key()}

        def converted(architecture: Architecture, find_pruned: FindPruned) -> Conversion:
            return make_conversion(
                source,
                architecture,
                scheme=sparse,
                ignore=patterns,
                overrides=[Override(regex, sparse) for regex, _ in asked.overrides],
                export=export,
                shard_bytes=shard_bytes,
                provenance=provenance,
                find_pruned=find_pruned,
            )

        architecture = read_architecture(source.directory, trust_remote_code=trust_remote_code)
        expected = _Expected(asked)
        conversion = converted(architecture, expected.find)
        expected.check(conversion)
        kernels.tell(conversion, model_dtype(source), where)
        given = None
        if text is not None:
            targets = architecture.find(source.tensors)
            given = plan(source, targets, conversion, text, where, trust_remote_code=trust_remote_code, scored=allocate)
            outside = sorted(set(expected.patterns) - {task.name for task in given.tasks})
            if outside:
                raise InputError(f"{outside[0]} is in no decoder block and cannot be pruned: ignore it")
            provenance |= given.provenance
        identity = {
            "shard size": shard_bytes,
            "values": sparse.key(),
            "update": fitted,
            "allocate": allocate,
            "dead neurons": dead_neurons,
            **asked.identity(),
            "ignore": list(patterns),
            **(given.identity if given is not None else {"calibration": None}),
        }
        with Workplace(destination, making.identity(identity), resume) as work:
            layers, dead = expected.patterns, None
            kept = given.disk_bytes(work.directory) if given is not None else alone_bytes(conversion, work.directory)
            check_space(conversion, work, kept)
            if allocate and given is not None:
                layers = _allocated(layers, asked, given, conversion, work.directory, progress)
            coder = PruneCoder(layers, algorithm, sparse, update=fitted, units=units)
            if given is None:
                ready = code_alone(conversion, coder, work.directory, where, progress)
            else:
                _, ready = calibrate(given, conversion, algorithm, work.directory, progress, coder, units)
            final = converted(architecture, _Left(conversion, ready).find)
            del architecture  # with the model behind it
            report = making.write(final, export, work, DEFAULT_RECIPE, ready)
        if units is not None:
            log = json.loads((destination / LOG_NAME).read_text(encoding="utf-8"))
            dead = {name: len(found) for name, found in log["dead_units"].items()}
        return replace(report, dead_units=dead)


class _Expected:
    """Weights as they will be stored if what is asked for is met, and the pattern of each.

    Attributes:
        patterns: by the name of the layer.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._smaller = False
        self.patterns: dict[str, Pattern] = {}

    def find(self, _: StoredTensor, layer: LinearLayer, sparse: Sparse) -> Pruned:
        """Return what will be left of a weight, as many weights in every row.

        Raises:
            InputError: the pattern does not divide its input channels.
        """
        oc, ic = layer.shape
        pattern = self._asked.of(layer.names)
        pattern.check(ic, layer.module)
        self.patterns[layer.module] = pattern
        found = Pruned.of(sparse, [round((1 - pattern.sparsity) * ic)] * oc)
        self._smaller = self._smaller or found.nbytes(ic) < dense_bytes(sparse, oc, ic)
        return found

    def check(self, conversion: Conversion) -> None:
        """Check that experts are left alone, and that zeros make a weight smaller.

        Raises:
            InputError: they are not, or none does.
        """
        for step in conversion.steps:
            layer = step.layer
            expert = layer is not None and (layer.stacked or bool(re.search(r"\.experts\.\d+\.", layer.module)))
            if expert and layer is not None and conversion.config.resolve(*layer.names) is not None:
                raise InputError(
                    rf"{layer.module} is a layer's experts, which have no sparse form: ignore them ('\.experts\b')"
                )
        if not self._smaller:
            asked, values = self._asked.usual, conversion.config.scheme.key().removeprefix("sparse:")
            raise InputError(
                f"sparsity {asked.sparsity:g} makes no weight smaller whose values are {values}: a mask takes a bit of "
                "each weight; ask for more zeros"
            )


class _Left:
    """What is left of weights that are pruned and packed."""

    def __init__(self, conversion: Conversion, ready: Mapping[int, Ready]) -> None:
        self._ready = {conversion.steps[index].source.spec.name: one for index, one in ready.items()}

    def find(self, tensor: StoredTensor, _: LinearLayer, sparse: Sparse) -> Pruned | None:
        """Return how many weights are left in every row of a weight that was packed sparse."""
        mask = self._ready[tensor.spec.name].read().get(MASK)
        return None if mask is None else Pruned.of(sparse, bitmap.count(mask))


def _allocated(
    layers: Mapping[str, Pattern],
    asked: Asked,
    given: Plan,
    conversion: Conversion,
    directory: Path,
    progress: Progress | None,
) -> dict[str, Pattern]:
    """Return patterns with the share of every matrix by what its zeros cost; those with overrides keep theirs."""
    alike = [name for name, found in layers.items() if found == asked.usual]
    counts = costs(given, conversion, set(alike), directory, progress)
    least = 1 - asked.usual.most / asked.usual.of if asked.usual.of else 0.0
    shares = allocate_shares({name: counts[name] for name in alike}, asked.usual.sparsity)
    return {**layers, **{name: replace(asked.usual, sparsity=max(share, least)) for name, share in shares.items()}}
