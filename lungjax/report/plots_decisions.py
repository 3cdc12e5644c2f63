"""The pictures of what probabilities are worth: reliability diagram and decision curves."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lungjax.evaluation import operating_points
from lungjax.evaluation.predictions import Predictions
from lungjax.report import style

PANELS = 12  # classes of which decision curves are drawn


def reliability(
    bins: Sequence[Mapping[str, Any]],
    scaled: Sequence[Mapping[str, Any]] | None,
    path: Path,
    title: str = "Reliability",
) -> None:
    """Draws the share of right ones over the mean highest probability, and below how many examples each bin has.

    Args:
      bins: of the probabilities as they are, see `calibration.bins`.
      scaled: of those after temperature scaling, where known.
      path: the PNG to write.
      title: of the picture.
    """
    figure = style.figure(5.6, 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1.2, zorder=1, label="as sure as right")
    looks = [(bins, "as they are", style.COLORS[0], "o")]
    looks += [(scaled, "after temperature", style.COLORS[1], "s")] if scaled else []
    for k, (found, label, color, marker) in enumerate(looks):
        full = [b for b in found if b["n"]]
        means, shares = [b["confidence"] for b in full], [b["accuracy"] for b in full]
        upper.plot(means, shares, color=color, marker=marker, markersize=5, linewidth=1.6, label=label)
        width = 1 / len(found) / len(looks)
        left = [b["low"] + k * width for b in found]
        lower.bar(left, [b["n"] for b in found], width=0.9 * width, align="edge", color=color)
    for axis in (upper, lower):
        style.style(axis)
    upper.set_title(title, loc="left", fontsize=12, color=style.INK)
    upper.set_ylabel("Share of right ones", color=style.INK)
    upper.set_xlim(-0.01, 1.01)
    upper.set_ylim(-0.03, 1.03)
    upper.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    upper.legend(frameon=False, fontsize=9, loc="upper left")
    lower.set_ylabel("Examples", color=style.INK)
    lower.set_xlabel("Highest probability", color=style.INK)
    style.save(figure, path)


def decision_curves(predictions: Predictions, path: Path) -> None:
    """Draws each class's net benefit by threshold probability, beside calling everyone and calling no one.

    Of more than PANELS classes the most frequent ones. Raises ValueError without any example.
    """
    p = predictions
    n = [int((p.labels == i).sum()) for i in range(len(p.classes))]
    shown = sorted(sorted(range(len(n)), key=lambda i: -n[i])[:PANELS])
    columns = min(len(shown), 3)
    rows = math.ceil(len(shown) / columns)
    figure = style.figure(max(3.4 * columns, 5.6), 2.9 * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis in axes.flat[: len(shown)][-columns:]:
        axis.tick_params(labelbottom=True)  # also where the row below is not full
    for axis, i in zip(axes.flat, shown, strict=False):
        curve = operating_points.net_benefit(p, i)
        t = curve["thresholds"]
        style.style(axis)
        axis.axhline(0, color=style.INK, linewidth=1, label="call none")
        axis.plot(t, curve["all"], color=style.QUIET, linewidth=1.4, linestyle=style.DASHES, label="call all")
        axis.plot(t, curve["model"], color=style.COLORS[0], linewidth=1.8, label="the network")
        share = n[i] / len(p)
        top = max(share, 0.02)
        axis.set_ylim(-0.35 * top, 1.1 * top)  # below, calling all falls without end
        axis.set_xlim(0, 1)
        title = f"{style.short(p.classes[i], 24)} ({style.percent(share)})"
        axis.set_title(title, loc="left", fontsize=10, color=style.INK)
    left_out = f", the {len(shown)} most frequent of {len(n)} classes" if len(shown) < len(n) else ""
    figure.suptitle(f"Net benefit{left_out}", x=0.01, ha="left", fontsize=12, color=style.INK)
    figure.supxlabel("Threshold probability", fontsize=10, color=style.INK)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    style.save(figure, path)
