"""Compress a model by a recipe and measure it on texts, always on the same windows against the same logits."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mixllm
import torch
from recipes import Recipe

import tersor
from tersor import evaluate, nn
from tersor.checkpoint.source import stated_dtype
from tersor.compress.hessian import exact_products
from tersor.convert.calibrate.store import LOG_NAME
from tersor.convert.calibrate.text import read_windows
from tersor.convert.target import LOG_NAME as MIX_NAME
from tersor.evaluate.noise import RoundedInputs
from tersor.evaluate.predictors import Predictor, TransformersModel
from tersor.evaluate.run import Judged, NoiseFloor
from tersor.integrations.transformers import load

DTYPE = "float32"
"""Of activations: in 16 bits the noise floor of SmolLM2 is 0.14, which says too much beside 6-bit formats."""
KEPT = ("nll", "kl", "flips")
"""Means of windows that are kept, for paired differences."""
DIGITS = 6
"""Significant digits of the means of windows that are kept."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text that is predicted, or calibrated on.

    Attributes:
        name: what it is called in results.
        path: the file.
        windows: how many are used: the first ones, or, of a calibration, as many spread evenly.
    """

    name: str
    path: Path
    windows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all recipes of a model are measured with.

    Attributes:
        model: directory of the checkpoint.
        name: what the model is called in results.
        texts: that are predicted.
        calibration: the text that recipes are calibrated on.
        group: input channels that share a scale.
        window: tokens in a window.
        device: where models are compressed and run: cpu, cuda or cuda:N.
        own_dtype: whether calibration on a GPU computes in the model's dtype, as `tersor quantize` does there; in
            float32, as on a CPU, if not.
        scratch: a directory for checkpoints.
        keep: whether they stay there.
    """

    model: Path
    name: str
    texts: tuple[Text, ...]
    calibration: Text
    group: int
    window: int
    device: str
    own_dtype: bool
    scratch: Path
    keep: bool = False


class Remembered:
    """A model whose logits of the windows that it is asked for first are kept, and given again: it computes them once.

    A window of 512 tokens and 49,152 words takes 100 MB where the model is.

    Attributes:
        model: the model.
        vocabulary, positions, dtype: its own.
    """

    def __init__(self, model: Predictor) -> None:
        """Take the model; nothing is computed yet."""
        self.model = model
        self._kept: dict[bytes, torch.Tensor] = {}
        self.vocabulary, self.positions, self.dtype = model.vocabulary, model.positions, model.dtype

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [T, V] of a window int64 [T], in the model's dtype."""
        key = tokens.numpy().tobytes()
        if key not in self._kept:
            self._kept[key] = self.model.logits(tokens)
        return self._kept[key]

    def not_finite(self, tokens: torch.Tensor) -> str:
        """Return which part of the model is the first not to be finite."""
        return self.model.not_finite(tokens)


class Bench:
    """A model, what its original says of all windows, and the measuring of recipes against that."""

    def __init__(self, setting: Setting) -> None:
        """Load the original and cut the texts; logits are computed when they are first needed.

        Raises:
            InputError: the model cannot be loaded, or a text is too short.
        """
        load.quiet()
        self.setting, self.device = setting, torch.device(setting.device)
        tokenizer = load.load_tokenizer(setting.model)
        self.windows = {
            text.name: evaluate.cut_windows(
                evaluate.read_text(text.path),
                tokenizer,
                window=setting.window,
                max_tokens=text.windows * setting.window,
            )
            for text in setting.texts
        }
        self.found = load.locate(setting.model)
        self.original = Remembered(TransformersModel(load.load_model(setting.model, self.device, DTYPE)))

    def noise_floor(self) -> dict[str, dict[str, Any]]:
        """Return text -> the original's own numbers and its noise floor, as in the JSON of `tersor eval`."""
        found = {}
        for name, windows in self.windows.items():
            with exact_products():
                rounded = evaluate.evaluate(RoundedInputs(self.original.model), windows, reference=self.original)
                own = evaluate.evaluate(self.original, windows)
            judged = self._judged(self.setting.name, windows, own, self.found.plain_bits, self.found.weight_bytes)
            floor = NoiseFloor(rounding="inputs of products in bfloat16", quality=rounded).to_dict()
            found[name] = {"reference_model": judged, "noise_floor": {**floor, "per_window": {}}}
        return found

    def measure(self, recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
        """Compress the model and yield (text, what was measured there) for every way in which it runs.

        Raises:
            TersorError: the recipe does not work on this model, or what it makes is broken.
        """
        started = time.monotonic()
        place = self.setting.model
        facts: dict[str, Any] = {"recipe": recipe.name}
        if recipe.options:
            place, facts = self._compressed(recipe, facts)
        facts["seconds"] = round(time.monotonic() - started, 1)
        try:
            for label, way in zip(recipe.labels, recipe.ways, strict=True):
                yield from self._way(recipe, place, label, way, facts)
        finally:
            if recipe.options and not self.setting.keep:
                shutil.rmtree(place)

    def _compressed(self, recipe: Recipe, facts: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Return where a recipe's checkpoint is, and what was said of its making."""
        setting, calibration = self.setting, self.setting.calibration
        place = setting.scratch / recipe.name
        options = {key: value for key, value in recipe.options.items() if value is not None}
        facts["options"] = dict(options)
        if recipe.verb == "prune":  # plain values keep the dtype that they are stored in, whatever blocks compute in
            options.setdefault("values", stated_dtype(json.loads((setting.model / "config.json").read_text())))
        if recipe.calibrated:
            options |= {
                "calibration": calibration.path,
                "calibration_tokens": calibration.windows * setting.window,
                "calibration_window": setting.window,
            }
        with exact_products(), self._source(recipe) as source:
            if recipe.mixllm is not None:
                vocabulary = self.original.vocabulary
                tokenizer = load.load_tokenizer(setting.model)
                ids = read_windows(str(calibration.path), tokenizer, calibration.windows, setting.window, vocabulary)
                mixing = mixllm.choose(source, ids, setting.group, recipe.mixllm, self.device)
                options["assignments"] = mixing.assignments
                facts["mix"] = _mix_facts(mixing.to_dict())
            getattr(tersor, recipe.verb)(source, place, device=setting.device, **options)
        if (place / MIX_NAME).exists():
            facts["mix"] = _mix_facts(json.loads((place / MIX_NAME).read_text()))
        if (place / LOG_NAME).exists():
            facts |= _log_facts(json.loads((place / LOG_NAME).read_text()))
        return place, facts

    @contextmanager
    def _source(self, recipe: Recipe) -> Iterator[Path]:
        """Yield the checkpoint to compress: one of the same files that says float32 where blocks are to compute so."""
        setting = self.setting
        if not recipe.calibrated or self.device.type == "cpu" or setting.own_dtype:
            yield setting.model
            return
        twin = setting.scratch / f"{recipe.name}.source" / setting.name
        twin.mkdir(parents=True)
        for file in setting.model.iterdir():
            (twin / file.name).symlink_to(file.resolve())
        config = json.loads((setting.model / "config.json").read_text())
        config.pop("torch_dtype", None)
        (twin / "config.json").unlink()
        (twin / "config.json").write_text(json.dumps({**config, "dtype": DTYPE}))
        try:
            yield twin
        finally:
            shutil.rmtree(twin.parent)

    def _way(
        self, recipe: Recipe, place: Path, label: str, way: str, facts: Mapping[str, Any]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what is measured of a checkpoint that runs in one way."""
        subject = evaluate.subject(label)
        started = time.monotonic()
        model: Predictor
        bits: float | None
        if subject.kv_dtype is not None:
            # The engine's attention has kernels for 16 bits alone, and reads its rows on the host without them.
            made = evaluate.engine_model(place, torch.device("cpu"), DTYPE, activations=subject.activations)
            model, bits = made.keeping(subject.pages.pages_dtype), made.bits_per_weight
        else:
            ready = load.ready_model(place, self.device, DTYPE, activations=subject.activations)
            model, bits = TransformersModel(ready), nn.bits_per_weight(ready)
            del ready
        size = load.locate(place)
        for name, windows in self.windows.items():
            with exact_products():
                quality = evaluate.evaluate(model, windows, reference=self.original)
            row = self._judged(label, windows, quality, bits or size.plain_bits, size.weight_bytes)
            yield name, {**row, **facts, "seconds_of_measuring": round(time.monotonic() - started, 1)}
        del model
        gc.collect()

    def _judged(
        self, label: str, windows: torch.Tensor, quality: evaluate.Quality, bits: float, size: int
    ) -> dict[str, Any]:
        """Return a model of the JSON of `tersor eval`; its label is its name, and no path is kept."""
        judged = Judged(
            subject=evaluate.subject(label),
            weight_bytes=size,
            bits_per_weight=bits,
            windows=windows,
            quality=quality,
        ).to_dict()
        kept = judged["per_window"]
        means = {name: [_short(value) for value in kept[name]] for name in KEPT if name in kept}
        return {**judged, "label": label, "per_window": means}


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _mix_facts(mix: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of a mix: all but the levels of every layer."""
    return {name: value for name, value in mix.items() if name != "layers"}


def _log_facts(log: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of a calibration's log: how many layers there are, and what it did to the losses of codes."""
    facts = {"calibrated_on": log["computed_on"], "layers": len(log["layers"])}
    ratios = [
        line["objective_after"] / line["objective_before"]
        for line in log["layers"]
        if line.get("objective_before", 0) > 0
    ]
    if ratios:
        facts |= {"worst_layer": _short(max(ratios)), "mean_layer": _short(sum(ratios) / len(ratios))}
    return facts
