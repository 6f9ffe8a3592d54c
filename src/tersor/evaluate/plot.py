"""Draw size against quality for several models. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor import plots
from tersor.evaluate.quality import Quality


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model in the picture.

    Attributes:
        label: its name.
        size: bytes of its weights on disk.
        quality: what was measured.
    """

    label: str
    size: int
    quality: Quality


def plot(points: Sequence[Point], path: str | Path, *, noise_floor: float | None = None) -> None:
    """Write a picture: size in MB against perplexity and, where a reference was given, KL divergence.

    Bars are one standard error over windows; against a reference that of the difference, since both read
    the same windows. The dashed line is the reference. The KL axis is logarithmic, without divergences of 0.

    Args:
        points: the models.
        path: of the picture.
        noise_floor: a KL divergence below which nothing can be said, a dotted line; `None` without one.

    Raises:
        InputError, UnsupportedError: as `tersor.plots.check_plot`.
        OutputError: the file cannot be written.
    """
    plots.check_plot(path)
    from matplotlib.figure import Figure

    compared = [point for point in points if point.quality.kl is not None]
    panels = 2 if compared else 1
    figure = Figure(figsize=(5.2 * panels + 1.6, 4.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    colours = {id(point): f"C{index % 10}" for index, point in enumerate(points)}
    _panel(axes[0], points, colours, _perplexity)
    axes[0].set_ylabel("perplexity")
    if compared:
        reference = compared[0].quality.reference_perplexity
        axes[0].axhline(reference, color="0.5", linestyle="--", linewidth=1, zorder=0, label="reference")
        _panel(axes[1], [point for point in compared if point.quality.kl], colours, _divergence)
        axes[1].set_yscale("log")
        if noise_floor:
            axes[1].axhline(noise_floor, color="0.5", linestyle=":", linewidth=1, zorder=0)
        axes[1].set_ylabel("KL(reference || model), nats per token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    quality = points[0].quality
    figure.suptitle(f"Size against quality, {quality.windows} windows of {quality.window} tokens", fontsize=11)
    plots.save(figure, path)


def _perplexity(quality: Quality) -> tuple[float, float]:
    if quality.reference_perplexity is not None and quality.perplexity_ratio_error is not None:
        return quality.perplexity, quality.reference_perplexity * quality.perplexity_ratio_error
    return quality.perplexity, quality.perplexity_error or 0.0


def _divergence(quality: Quality) -> tuple[float, float]:
    return quality.kl or 0.0, quality.kl_error or 0.0


def _panel(
    axes: Any,
    points: Sequence[Point],
    colours: dict[int, str],
    value: Callable[[Quality], tuple[float, float]],
) -> None:
    """Draw one quantity and its error against size, a colour a model."""
    for point in points:
        height, error = value(point.quality)
        axes.errorbar(
            point.size / 1e6,
            height,
            yerr=error,
            fmt="o",
            capsize=3,
            markersize=6,
            color=colours[id(point)],
            label=point.label,
        )
    axes.set_xlabel("size of the weights on disk, MB")
    axes.margins(0.1)
    axes.grid(alpha=0.25)
