"""The pictures of a report, each one function from numbers to a PNG file."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lungjax.evaluation import metrics
from lungjax.evaluation.predictions import Predictions
from lungjax.report import style as figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ANNOTATED = 16  # classes up to which each cell of a confusion matrix shows its number
SMOOTHED = 60  # points from which the loss is drawn with a running mean


def training_curves(
    history: Sequence[Mapping[str, Any]], path: Path, monitor: str, best_step: int | None = None
) -> None:
    """Draws loss, the monitored validation metric and the learning rate by step.

    Args:
      history: rows of metrics.jsonl: `step`, and of `train.loss`, `lr`, `val.slice.loss`, `val.MONITOR` what
        the row has. None and missing values are left out.
      path: the PNG to write.
      monitor: such as "slice.auc_macro".
      best_step: marked where given.
    """
    panels: list[tuple[str, list[str]]] = [("Loss", ["train.loss", "val.slice.loss"])]
    if monitor != "slice.loss":
        panels.append((f"Validation {monitor}", [f"val.{monitor}"]))
    panels.append(("Learning rate", ["lr"]))
    from matplotlib.ticker import MaxNLocator

    figure = figures.figure(8, 0.8 + 2.3 * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=[1.3] + [1] * (len(panels) - 1))
    for axis, (title, names) in zip(axes, panels, strict=True):
        figures.style(axis)
        axis.set_title(figures.plain(title), loc="left", fontsize=11, color=figures.INK)
        for name in names:
            _line(axis, history, name)
        if best_step is not None:
            label = f"best, step {best_step:,}" if axis is axes[0] else None
            axis.axvline(best_step, color=figures.QUIET, linewidth=1.2, linestyle=figures.DASHES, zorder=1, label=label)
    axes[0].set_ylim(bottom=0)
    axes[-1].set_ylim(bottom=0)
    axes[-1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
    axes[-1].set_xlabel("Step" + _epochs(history), color=figures.INK)
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=3)
    figures.save(figure, path)


def _line(axis: "Axes", history: Sequence[Mapping[str, Any]], name: str) -> None:
    """Draws one column of the history; a long noisy one pale, with its running mean over it."""
    points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
    if not points:
        return
    steps, values = np.asarray(points, dtype=np.float64).T
    train = name == "train.loss"
    color = figures.COLORS[0] if train or name == "lr" else figures.COLORS[1]
    label = "train" if train else "validation"
    marker = "o" if name.startswith("val.") or len(steps) < 3 else None
    if train and len(steps) >= SMOOTHED:
        axis.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        width = max(len(steps) // 30, 3) // 2 * 2 + 1
        values = np.convolve(np.pad(values, width // 2, mode="edge"), np.ones(width) / width, mode="valid")
        label = f"train (mean of {width} points)"
    axis.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=4, label=label)


def _epochs(history: Sequence[Mapping[str, Any]]) -> str:
    rows = [row for row in history if row.get("epoch")]
    return f" (one epoch is {rows[-1]['step'] / rows[-1]['epoch']:,.0f} steps)" if rows else ""


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], path: Path, title: str) -> None:
    """Draws a confusion matrix twice: counts, and the share of each row (true class).

    `matrix` [C, C] counts, a row a true class. A row without examples stays empty on the right.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    c = len(classes)
    whole = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, whole, out=np.full_like(counts, np.nan), where=whole > 0)
    names = [figures.short(name, 22) for name in classes]
    longest = max(map(len, names))
    side = min(max(0.75 * c, 2.6), 12)
    figure = figures.figure(2 * side + 0.085 * longest + 1.6, side + 0.06 * longest + 1.5, layout="compressed")
    figure.suptitle(figures.plain(title), fontsize=12, color=figures.INK)
    left, right = figure.subplots(1, 2)
    size = 10 if c <= 10 else 8
    for axis, values, what in ((left, counts, "Counts"), (right, shares, "Share of the true class")):
        highest = max(np.nanmax(values, initial=0), 1) if values is counts else 1
        axis.imshow(values, cmap="Blues", vmin=0, vmax=highest, aspect="equal")
        axis.set_title(what, fontsize=11, color=figures.INK)
        axis.set_xlabel("Predicted", color=figures.INK)
        turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if c > 3 or longest > 9 else {}
        axis.set_xticks(range(c), names, fontsize=9, **turned)
        axis.set_yticks(range(c), names if axis is left else [""] * c, fontsize=9)
        axis.set_xticks(np.arange(c + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(c + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=1.5)
        axis.tick_params(which="both", length=0, colors=figures.INK)
        axis.spines[:].set_visible(False)
        for i, j in np.ndindex(c, c) if c <= ANNOTATED else ():
            if not np.isnan(values[i, j]):
                text = f"{values[i, j]:,.0f}" if values is counts else figures.percent(float(values[i, j]))
                color = "white" if values[i, j] > 0.55 * highest else figures.INK
                small = min(size, 46 / max(len(text), 1) * min(side / c / 0.75, 1))
                axis.text(j, i, text, ha="center", va="center", fontsize=small, color=color)
    left.set_ylabel("True", color=figures.INK)
    figures.save(figure, path)


def roc_curves(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Draws a ROC curve for each class against the rest, and the pooled one.

    `labels` [N] int, `probabilities` [N, C]. A class with an empty side has no curve and says so.
    """
    figure, axis = _square("ROC: each class against the rest")
    axis.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1, zorder=1)
    for name, positive, scores, look in _one_against_rest(labels, probabilities, classes):
        area = metrics.auc(positive, scores)
        x, y, _ = metrics.roc_curve(positive, scores)
        axis.plot(x, y, label=f"{name}\nAUC {area:.3f}" if area == area else f"{name}\nno AUC", **look)
    axis.set_xlabel("False positive rate (1 - specificity)", color=figures.INK)
    axis.set_ylabel("True positive rate (sensitivity)", color=figures.INK)
    figures.legend_beside(axis, len(classes))
    figures.save(figure, path)


def pr_curves(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Draws a precision-recall curve for each class against the rest, and the pooled one.

    `labels` [N] int, `probabilities` [N, C]. The legend gives the average precision and, as what chance would
    reach, the class's share of the examples. A class with an empty side has none and says so.
    """
    figure, axis = _square("Precision and recall: each class against the rest")
    for name, positive, scores, look in _one_against_rest(labels, probabilities, classes):
        area = metrics.average_precision(positive, scores)
        x, y, _ = metrics.pr_curve(positive, scores)
        number = f"AP {area:.3f}, chance {positive.mean():.3f}" if area == area else "no AP"
        # Between two thresholds the precision of the next one holds, as the average precision counts it.
        axis.plot(x, y, drawstyle="steps-pre", label=f"{name}\n{number}", **look)
    axis.set_xlabel("Recall (sensitivity)", color=figures.INK)
    axis.set_ylabel("Precision (positive predictive value)", color=figures.INK)
    figures.legend_beside(axis, len(classes))
    figures.save(figure, path)


def _one_against_rest(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> list[Any]:
    """Returns (name, positive, scores, how to draw it) of each class, and of all pairs pooled (micro)."""
    look: dict[str, Any]
    scores = np.asarray(probabilities, dtype=np.float64)
    is_class = np.asarray(labels)[:, None] == np.arange(len(classes))
    curves: list[Any] = []
    for i, name in enumerate(classes):
        style = figures.STYLES[i // len(figures.COLORS) % len(figures.STYLES)]
        look = {"color": figures.COLORS[i % len(figures.COLORS)], "linestyle": style, "linewidth": 1.8}
        curves.append((figures.short(name, 26), is_class[:, i], scores[:, i], look))
    look = {"color": figures.INK, "linestyle": (0, (5, 1.5, 1, 1.5)), "linewidth": 1.2, "zorder": 1.9}
    return [*curves, ("all pooled (micro)", is_class.ravel(), scores.ravel(), look)]


def example_sheet(predictions: Predictions, read_image: Callable[[int], np.ndarray], most: int, path: Path) -> None:
    """Draws up to `most` images each that were named rightly and, below, wrongly; see `choose_examples`.

    `read_image` gives a row's image, uint8 [h, w], [h, w, 1] or [h, w, 3].
    """
    p, predicted = predictions, predictions.predicted
    right, wrong = choose_examples(p, most)
    images = {row: np.asarray(read_image(row)) for row in (*right, *wrong)}
    columns = min(max(len(right), len(wrong), 3), 6)
    tall = max((image.shape[0] / image.shape[1] for image in images.values()), default=1.0)
    width, text, head, gap = 2.05, 0.62, 0.42, 0.12  # inches: a tile, its three lines, a heading, between
    side = width - gap
    tile = side * min(tall, 2.0) + text
    whole = columns * width + gap
    height = sum(head + math.ceil(len(rows) / columns) * tile for rows in (right, wrong)) + 0.1
    figure = figures.figure(whole, height, layout="none")
    top = height
    for what, color, rows in (("Right", figures.RIGHT, right), ("Wrong", figures.WRONG, wrong)):
        title = f"{what} ({len(rows)} shown)" if rows else f"{what}: none"
        figure.text(gap / whole, (top - 0.3) / height, title, fontsize=13, color=color, weight="bold")
        top -= head
        for k, row in enumerate(rows):
            x, y = gap + k % columns * width, top - k // columns * tile - (tile - text)
            _picture(figure, (x / whole, y / height, side / whole, (tile - text) / height), images[row], color)
            said, probability = p.classes[predicted[row]], float(p.probabilities[row, predicted[row]])
            lines = (
                figures.short(str(p.ids[row]), 27),
                f"true: {figures.short(p.classes[p.labels[row]], 21)}",
                f"predicted: {figures.short(said, 12)} {figures.percent(probability)}",
            )
            for j, line in enumerate(lines):
                place = (x / whole, (y - 0.17 - 0.155 * j) / height)
                figure.text(*place, line, fontsize=8.2, color=figures.INK if j else figures.QUIET)
        top -= math.ceil(len(rows) / columns) * tile
    figures.save(figure, path)


def mistakes(predictions: Predictions, rows: Sequence[int], images: np.ndarray, heats: np.ndarray, path: Path) -> None:
    """Draws wrongly named images, each beside itself under a map of where the network looked.

    Args:
      predictions: of all examples.
      rows: the M of them to draw, in this order, at least one; see `choose_examples`.
      images: uint8 [M, h, w, 1 or 3], as the network gets them.
      heats: [M, h, w], 0..1, how much each pixel spoke for the class that was named.
      path: the PNG to write.
    """
    p = predictions
    pairs = min(len(rows), 2)  # side by side
    width, text, gap = 2.05, 0.68, 0.1  # inches: a tile, three lines of text below, between
    side, pair = width - gap, 2 * width + gap
    tall = side * min(images.shape[1] / images.shape[2], 2.0)
    whole = pairs * pair
    height = math.ceil(len(rows) / pairs) * (tall + text) + 0.1
    figure = figures.figure(whole, height, layout="none")
    for k, row in enumerate(rows):
        x, y = gap + k % pairs * pair, height - 0.1 - k // pairs * (tall + text) - tall
        for j in range(2):
            corner = ((x + j * width) / whole, y / height)
            axis = _picture(figure, (*corner, side / whole, tall / height), images[k], figures.WRONG)
            if j:
                axis.imshow(heats[k], cmap="viridis", vmin=0, vmax=1, alpha=0.5)  # as `saliency.overlay`
        said, true = int(p.predicted[row]), int(p.labels[row])
        lines = (
            figures.short(str(p.ids[row]), 54),
            f"predicted: {_with_share(p, row, said)}",
            f"true: {_with_share(p, row, true)}",
        )
        for j, line in enumerate(lines):
            place = (x / whole, (y - 0.17 - 0.155 * j) / height)
            figure.text(*place, line, fontsize=8.2, color=figures.INK if j else figures.QUIET)
    figures.save(figure, path)


def _with_share(p: Predictions, row: int, label: int) -> str:
    return f"{figures.short(p.classes[label], 36)} {figures.percent(float(p.probabilities[row, label]))}"


def _picture(figure: "Figure", place: tuple[float, float, float, float], image: np.ndarray, color: str) -> "Axes":
    """Puts an image, uint8 [h, w], [h, w, 1] or [h, w, 3], at (left, bottom, width, height) in parts of the figure."""
    axis = figure.add_axes(place, anchor="S")
    axis.imshow(image[..., 0] if image.shape[-1:] == (1,) else image, cmap="gray", vmin=0, vmax=255)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set(color=color, linewidth=2)
    return axis


def choose_examples(predictions: Predictions, most: int) -> tuple[list[int], list[int]]:
    """Returns up to `most` rows each of right and of wrong predictions to show; the same ones every time.

    The true classes take turns. Right ones are spread evenly over a class's rows, wrong ones begin with the
    highest probability; a patient's second mistake comes when all the others of the class have come.
    """
    p, predicted = predictions, predictions.predicted
    sure = p.probabilities.max(axis=1)
    right, wrong = [], []
    for label in range(len(p.classes)):
        rows = np.flatnonzero((p.labels == label) & (predicted == label))
        # Multiples of the golden ratio: the first few lie evenly, however many are taken.
        right.append(rows[np.argsort(np.arange(len(rows)) * 0.6180339887498949 % 1)].tolist())
        rows = np.flatnonzero((p.labels == label) & (predicted != label))
        rows = rows[np.argsort(-sure[rows], kind="stable")]
        again = np.ones(len(rows), bool)
        again[np.unique(p.groups[rows], return_index=True)[1]] = False
        again[p.groups[rows] == ""] = False
        wrong.append([*rows[~again].tolist(), *rows[again].tolist()])
    return _take_turns(right, most), _take_turns(wrong, most)


def _take_turns(lists: Sequence[Sequence[int]], most: int) -> list[int]:
    turns = [items[i] for i in range(most) for items in lists if i < len(items)]
    return turns[:most]


def _square(title: str) -> tuple["Figure", "Axes"]:
    figure = figures.figure(8.4, 5.6, layout="compressed")
    axis = figure.subplots()
    figures.style(axis)
    axis.set_title(title, loc="left", fontsize=12, color=figures.INK)
    axis.set_xlim(-0.01, 1.01)
    axis.set_ylim(-0.01, 1.01)
    axis.set_aspect("equal")
    return figure, axis
