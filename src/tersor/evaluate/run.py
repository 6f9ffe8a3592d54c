"""How good are these models, on the same windows? Each is loaded, measured and let go; only the reference stays."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from tersor import nn
from tersor.checkpoint.source import read_config
from tersor.errors import InputError, TersorError
from tersor.evaluate.compare import Comparison, compare
from tersor.evaluate.noise import RoundedInputs
from tersor.evaluate.predictors import EngineModel, Predictor, TransformersModel, engine_model
from tersor.evaluate.quality import Quality, evaluate
from tersor.evaluate.subjects import Subject
from tersor.evaluate.windows import cut_windows
from tersor.formats import dtype_name
from tersor.integrations.transformers import load
from tersor.ops import activations_for, kernel_chip, warm

KIND, VERSION = "tersor eval", 1
"""Of what `tersor eval` writes as JSON, for who reads it again."""

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Shows what is measured, by its name; what it yields is called with (windows done, windows in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A model and what was measured of it.

    Attributes:
        subject: the model and its way of running.
        weight_bytes: bytes of its weight files.
        bits_per_weight: mean stored bits of a compressed weight, or of a plain one where none is compressed.
        windows: int64 [windows, window], the text in its tokens.
        quality: against the reference where there is one.
    """

    subject: Subject
    weight_bytes: int
    bits_per_weight: float
    windows: torch.Tensor
    quality: Quality

    @property
    def windows_hash(self) -> str:
        """SHA-256 of the tokens as little-endian int64: equal where two runs read the same windows."""
        return hashlib.sha256(self.windows.numpy().astype("<i8").tobytes()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return all that was measured, per window too, as JSON can hold it."""
        kept = self.quality.per_window
        return {
            "model": self.subject.name,
            "label": self.subject.label,
            "activations": str(self.subject.activations),
            "kv_dtype": self.subject.kv_dtype,
            "weight_bytes": self.weight_bytes,
            "bits_per_weight": self.bits_per_weight,
            "windows_sha256": self.windows_hash,
            **self.quality.to_dict(),
            "per_window": {} if kept is None else kept.to_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseFloor:
    """The reference against itself, with one rounding that does not change it (`evaluate.noise`).

    Attributes:
        rounding: which, in words.
        quality: of the rounded reference.
    """

    rounding: str
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        """Return all that was measured as JSON can hold it."""
        kept = self.quality.per_window
        means = {} if kept is None else kept.to_dict()
        return {"rounding": self.rounding, **self.quality.to_dict(), "per_window": means}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What was measured of several models.

    Attributes:
        models: in the order in which they were given.
        reference: who they were compared with, and its own perplexity; `None` without a reference.
        noise_floor: below which divergence nothing can be said; `None` where it was not asked for.
    """

    models: list[Judged]
    reference: Judged | None = None
    noise_floor: NoiseFloor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all that was measured, of every two models too, as JSON can hold it."""
        labels = [one.subject.label for one in self.models]
        return {
            "models": [one.to_dict() for one in self.models],
            **({} if self.reference is None else {"reference_model": self.reference.to_dict()}),
            **({} if self.noise_floor is None else {"noise_floor": self.noise_floor.to_dict()}),
            "comparisons": [
                {"first": labels[i], "other": labels[j], "models": [i, j], **found.to_dict()}
                for i, j, found in self.comparisons()
            ],
        }

    def comparisons(self) -> list[tuple[int, int, Comparison]]:
        """Return (i, j, model j against model i) for every two models i < j that read the same tokens."""
        return [
            (i, j, compare(self.models[i].quality, self.models[j].quality))
            for i, j in combinations(range(len(self.models)), 2)
            if self.models[i].windows_hash == self.models[j].windows_hash
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Measures models on a text.

    Attributes:
        text: that is predicted.
        found: where the checkpoint of each name is.
        device: where models run.
        dtype: of activations: auto, float16, bfloat16 or float32.
        window: tokens in a window.
        max_tokens: of the text; `None` is all of it.
        trust_remote_code: whether Python code that comes with a model is run.
        progress: shows what is measured.
    """

    text: str
    found: Mapping[str, load.Found]
    device: torch.device
    dtype: str = "auto"
    window: int = 512
    max_tokens: int | None = None
    trust_remote_code: bool = False
    progress: Progress

    def judge(
        self, subjects: Sequence[Subject], reference: Subject | None = None, *, noise_floor: bool = True
    ) -> Judgement:
        """Measure each model in turn; only one and the reference are in memory at a time.

        Where one of the models asks for the engine, all run in it, so that they differ in nothing else.

        Args:
            subjects: the models.
            reference: what they are compared with.
            noise_floor: whether the reference is compared with itself, rounded once; not without a reference.

        Raises:
            InputError: a model that cannot be loaded, a text too short, or a reference that splits it otherwise.
            UnsupportedError: the engine does not run a model that is to run in it.
            TersorError: too little memory, or logits that are not finite.
        """
        subjects = [self._settled(one) for one in subjects]
        everyone = [*subjects, *([reference] if reference is not None else [])]
        engine = any(one.kv_dtype is not None for one in everyone)
        windows = {name: self._windows(name) for name in dict.fromkeys(one.name for one in everyone)}
        base = floor = origin = None
        if reference is not None:
            for one in subjects:
                if not windows[one.name].equal(windows[reference.name]):
                    raise InputError(
                        f"{one.name} and the reference {reference.name} split the text into different tokens: "
                        "compare models of one tokenizer"
                    )
            base = self._ready(reference, engine)
            if noise_floor:
                floor = self._noise_floor(reference, base, windows[reference.name])
        models = []
        for one in subjects:
            model = base if base is not None and _same(one, reference) else self._ready(one, engine)
            with self.progress(one.label) as move:
                quality = evaluate(model, windows[one.name], reference=base, progress=move)
            models.append(self._judged(one, model, windows[one.name], quality))
            del model
            gc.collect()
        if reference is not None and base is not None:
            origin = self._judged(reference, base, windows[reference.name], _own(models[0].quality))
        return Judgement(models=models, reference=origin, noise_floor=floor)

    def _settled(self, one: Subject) -> Subject:
        """Return a model with the kind of activations that its formats choose where it asks for 8 bits."""
        schemes, _ = warm.needs(read_config(self.found[one.name].directory))
        chosen = activations_for(one.activations, schemes, kernel_chip(self.device))
        return replace(one, activations=str(chosen))

    def _windows(self, name: str) -> torch.Tensor:
        tokenizer = load.load_tokenizer(self.found[name].directory, trust_remote_code=self.trust_remote_code)
        return cut_windows(self.text, tokenizer, window=self.window, max_tokens=self.max_tokens)

    def _ready(self, one: Subject, engine: bool) -> Predictor:
        directory, activations = self.found[one.name].directory, one.activations
        if engine:
            model = engine_model(directory, self.device, self.dtype, activations=activations)
            return model.keeping(one.pages.pages_dtype)
        return TransformersModel(
            load.ready_model(
                directory,
                self.device,
                self.dtype,
                activations=activations,
                trust_remote_code=self.trust_remote_code,
            )
        )

    def _judged(self, one: Subject, model: Predictor, windows: torch.Tensor, quality: Quality) -> Judged:
        if isinstance(model, TransformersModel):
            bits = nn.bits_per_weight(model.model)
        else:
            bits = model.bits_per_weight if isinstance(model, EngineModel) else None
        place = self.found[one.name]
        return Judged(
            subject=one,
            weight_bytes=place.weight_bytes,
            bits_per_weight=bits or place.plain_bits,
            windows=windows,
            quality=quality,
        )

    def _noise_floor(self, reference: Subject, base: Predictor, windows: torch.Tensor) -> NoiseFloor:
        dtype = base.dtype
        with self.progress("noise floor") as move:
            if dtype == torch.float32:
                quality = evaluate(RoundedInputs(base), windows, reference=base, progress=move)
                return NoiseFloor(rounding="inputs of products in bfloat16", quality=quality)
            try:
                wide = load.ready_model(
                    self.found[reference.name].directory,
                    self.device,
                    "float32",
                    trust_remote_code=self.trust_remote_code,
                )
                quality = evaluate(wide, windows, reference=base, progress=move)
            except TersorError as error:
                raise TersorError(
                    f"the noise floor needs the reference in float32 as well: {error} (--no-noise-floor leaves it out)"
                ) from None
        del wide
        gc.collect()
        return NoiseFloor(rounding=f"float32 in place of {dtype_name(dtype)}", quality=quality)


def _same(one: Subject, other: Subject | None) -> bool:
    """Tell whether two subjects compute the same; keys and values of whoever says nothing are as `auto`."""
    return other is not None and _computed(one) == _computed(other)


def _computed(one: Subject) -> tuple[str, str, str]:
    return one.name, one.activations, one.kv_dtype or "auto"


def _own(quality: Quality) -> Quality:
    """Return what a comparison says of the reference itself."""
    assert quality.reference_perplexity is not None
    return Quality(
        windows=quality.windows,
        window=quality.window,
        tokens=quality.tokens,
        perplexity=quality.reference_perplexity,
        perplexity_error=quality.reference_perplexity_error,
    )
