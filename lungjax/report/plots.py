"""Figures of a report."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lungjax.data.statistics import take_turns
from lungjax.evaluation import metrics, operating_points
from lungjax.evaluation.predictions import Predictions, binary
from lungjax.report import contact_sheet, style
from lungjax.report.contact_sheet import Section, Tile
from lungjax.report.templating import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ANNOTATED = 16  # classes up to which the cells of a confusion matrix have numbers
MIN_SMOOTHED = 60  # points from which the loss has a running mean
MAX_PANELS = 12  # classes with a decision curve


class Shown(NamedTuple):
    """A prediction of an image: of its class, or of one finding, whose absence is the class "no NAME"."""

    row: int
    target: int  # index of the class or finding that a heat map explains
    true: str
    predicted: str
    probability: float  # of the predicted class
    probability_of_true: float


def training_curves(
    history: Sequence[Mapping[str, Any]], path: Path, monitor: str, best_step: int | None = None
) -> None:
    """Draws loss, `val.MONITOR` and learning rate of the rows of metrics.jsonl by step; marks `best_step`."""
    panels: list[tuple[str, list[str]]] = [("Loss", ["train.loss", "val.slice.loss"])]
    if monitor != "slice.loss":
        panels.append((f"Validation {monitor}", [f"val.{monitor}"]))
    panels.append(("Learning rate", ["lr"]))
    from matplotlib.ticker import MaxNLocator

    figure = style.figure(8, 0.8 + 2.3 * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=[1.3] + [1] * (len(panels) - 1))
    for axis, (title, names) in zip(axes, panels, strict=True):
        style.style(axis, style.plain(title))
        for name in names:
            _line(axis, history, name)
        if best_step is not None:
            label = f"best, step {best_step:,}" if axis is axes[0] else None
            axis.axvline(best_step, color=style.MUTED, linewidth=1.2, linestyle=style.DASHES, zorder=1, label=label)
    axes[0].set_ylim(bottom=0)
    axes[-1].set_ylim(bottom=0)
    axes[-1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
    row = next((row for row in reversed(history) if row.get("epoch")), None)
    epoch = f" (one epoch is {row['step'] / row['epoch']:,.0f} steps)" if row else ""
    axes[-1].set_xlabel(f"Step{epoch}")
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=3)
    style.save(figure, path)


def _line(axis: "Axes", history: Sequence[Mapping[str, Any]], name: str) -> None:
    """Draws one column of the history; a long train loss is drawn in a lighter color below its running mean."""
    points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
    if not points:
        return
    steps, values = np.asarray(points, dtype=np.float64).T
    train = name == "train.loss"
    color = style.COLORS[0] if train or name == "lr" else style.COLORS[1]
    label = "train" if train else "validation"
    marker = "o" if name.startswith("val.") or len(steps) < 3 else None
    if train and len(steps) >= MIN_SMOOTHED:
        axis.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        width = max(len(steps) // 30, 3) // 2 * 2 + 1
        values = np.convolve(np.pad(values, width // 2, mode="edge"), np.ones(width) / width, mode="valid")
        label = f"train (mean of {width} points)"
    axis.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=4, label=label)


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], path: Path, title: str) -> None:
    """Draws a confusion matrix [C, C], one row per true class, as counts and as shares of each row."""
    c = len(classes)
    names = [style.short(name, 22) for name in classes]
    longest = max(map(len, names))
    side = min(max(0.75 * c, 2.6), 12)
    figure = style.figure(2 * side + 0.085 * longest + 1.6, side + 0.06 * longest + 1.5, layout="compressed")
    figure.suptitle(style.plain(title), fontsize=12, color=style.INK)
    left, right = figure.subplots(1, 2)
    for axis, shares in ((left, False), (right, True)):
        confusion_cells(axis, np.asarray(matrix, dtype=np.float64), shares, 10 if c <= 10 else 8, side / c)
        axis.set_title("Share of the true class" if shares else "Counts", fontsize=11, color=style.INK)
        axis.set_xlabel("Predicted", color=style.INK)
        rotation = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if c > 3 or longest > 9 else {}
        axis.set_xticks(range(c), names, fontsize=9, **rotation)
        axis.set_yticks(range(c), [""] * c if shares else names, fontsize=9)
    left.set_ylabel("True", color=style.INK)
    style.save(figure, path)


def confusion_cells(axis: "Axes", counts: np.ndarray, shares: bool, fontsize: float, cell: float) -> None:
    """Draws a confusion matrix [C, C] as counts or as shares of each row, with cells `cell` inches wide."""
    total = counts.sum(axis=1, keepdims=True)
    values = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0) if shares else counts
    highest = 1 if shares else max(values.max(initial=0), 1)
    axis.imshow(values, cmap="Blues", vmin=0, vmax=highest, aspect="equal")
    edges = np.arange(len(counts) + 1) - 0.5
    axis.set_xticks(edges, minor=True)
    axis.set_yticks(edges, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0, colors=style.INK)
    axis.spines[:].set_visible(False)
    for i, j in np.ndindex(counts.shape) if len(counts) <= MAX_ANNOTATED else ():
        if not np.isnan(values[i, j]):
            text = style.percent(float(values[i, j])) if shares else f"{values[i, j]:,.0f}"
            color = "white" if values[i, j] > 0.55 * highest else style.INK
            size = min(fontsize, 87 * cell / len(text))  # a digit is about 0.6 times as wide as high
            axis.text(j, i, text, ha="center", va="center", fontsize=size, color=color)


def curves(kind: str, predictions: Predictions, path: Path) -> None:
    """Draws the "roc" or "pr" (precision-recall) `curve` of each class against the rest and the pooled (micro) one."""
    classes = predictions.classes
    figure = style.figure(8.4, 5.6, layout="compressed")
    axis = figure.subplots()
    square(axis, kind)
    title = {"roc": "ROC", "pr": "Precision and recall"}[kind]
    each = "each finding" if predictions.multilabel else "each class against the rest"
    axis.set_title(f"{title}: {each}", loc="left", fontsize=12, color=style.INK)
    looks: list[dict[str, Any]] = [{**style.line_style(i), "linewidth": 1.8} for i in range(len(classes))]
    looks += [{"color": style.INK, "linestyle": (0, (5, 1.5, 1, 1.5)), "linewidth": 1.2, "zorder": 1.9}]
    names = [*(style.short(name, 26) for name in classes), "all pooled (micro)"]
    pairs = [*_pairs(predictions), pooled(predictions)]
    for name, (positive, values), look in zip(names, pairs, looks, strict=True):
        area = curve(axis, kind, positive, values, look)
        score = {"roc": f"AUC {area:.3f}", "pr": f"AP {area:.3f}, chance {positive.mean():.3f}"}[kind]
        axis.lines[-1].set_label(f"{name}\n{score if area == area else 'undefined'}")
    style.legend_beside(axis, len(classes))
    style.save(figure, path)


def pooled(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether an example is of a class, and its probability, for all pairs, or known labels of findings."""
    positive, scores = zip(*_pairs(predictions), strict=True)
    return np.concatenate(positive), np.concatenate(scores)


def _pairs(predictions: Predictions) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(p.labels == i, p.probabilities[:, i].astype(np.float64)) for p, i in binary(predictions).values()]


def square(axis: "Axes", kind: str) -> None:
    """Prepares square axes from 0 to 1 for ROC ("roc") or precision-recall ("pr") curves."""
    style.style(axis)
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), box_aspect=1)
    if kind == "roc":
        axis.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1, zorder=1)
        axis.set(xlabel="False positive rate (1 - specificity)", ylabel="True positive rate (sensitivity)")
    else:
        axis.set(xlabel="Recall (sensitivity)", ylabel="Precision (positive predictive value)")


def curve(axis: "Axes", kind: str, positive: np.ndarray, scores: np.ndarray, look: Mapping[str, Any]) -> float:
    """Draws the "roc" or "pr" curve of `positive` [N] bool and `scores` [N]; returns its area, NaN if it is empty."""
    from sklearn.metrics import precision_recall_curve, roc_curve  # here: it takes two seconds to import

    area = {"roc": metrics.auc, "pr": metrics.average_precision}[kind](positive, scores)
    x, y = np.zeros((2, 0))
    if kind == "roc" and np.isfinite(area):
        x, y, _ = roc_curve(positive, scores, drop_intermediate=False)
    elif np.isfinite(area):
        y, x, _ = precision_recall_curve(positive, scores)
    # The average precision is the area under these steps, in the order of falling recall.
    axis.plot(x, y, drawstyle="default" if kind == "roc" else "steps-post", **look)
    return area


def example_sheet(predictions: Predictions, read_image: Callable[[int], np.ndarray], count: int, path: Path) -> None:
    """Draws the images of `choose_examples`; `read_image` returns that of a row, uint8 [h, w] or [h, w, 1 or 3]."""
    sections = []
    looks = (("Correct", style.CORRECT), ("Wrong", style.WRONG))
    for (what, color), chosen in zip(looks, choose_examples(predictions, count), strict=True):
        title = f"{what} ({len(chosen)} shown)" if chosen else f"{what}: none"
        tiles = []
        for shown in chosen:
            predicted = f"predicted: {style.short(shown.predicted, 12)} {style.percent(shown.probability)}"
            lines = (str(predictions.ids[shown.row]), f"true: {shown.true}", predicted)
            tiles.append(Tile(np.asarray(read_image(shown.row)), lines, frame=color))
        sections.append(Section(tiles, title, color))
    longest = max(len(section.tiles) for section in sections)
    contact_sheet.draw(sections, path, min(max(longest, 3), 6), aspect=2.0)


def mistakes(ids: np.ndarray, wrong: Sequence[Shown], images: np.ndarray, heats: np.ndarray, path: Path) -> None:
    """Draws misclassified images, uint8 [M, h, w, 1 or 3], each next to a copy with its heat map [h, w] in 0..1."""
    tiles = []
    for shown, image, heat in zip(wrong, images, heats, strict=True):
        lines = [str(ids[shown.row])]
        lines.append(f"predicted: {style.short(shown.predicted, 36)} {style.percent(shown.probability)}")
        lines.append(f"true: {style.short(shown.true, 36)} {style.percent(shown.probability_of_true)}")
        if not heat.any():
            lines.append("heat map: no evidence")
        tiles += [Tile(image, lines, frame=style.WRONG, wide=True), Tile(image, heat=heat, frame=style.WRONG)]
    contact_sheet.draw([Section(tiles)], path, 2 * min(len(wrong), 2), paired=True, aspect=2.0)


def choose_examples(predictions: Predictions, count: int) -> tuple[list[Shown], list[Shown]]:
    """Returns up to `count` correct and as many wrong predictions, alternating between true classes, or findings.

    Correct ones are spread evenly over a class; wrong ones fall in probability, the first image of each patient first.
    """
    if not predictions.multilabel:
        right, wrong = ([_shown(predictions, row) for row in rows] for rows in _right_and_wrong(predictions, count))
        return right, wrong
    sides: tuple[list[list[Shown]], list[list[Shown]]] = ([], [])
    for i, (own, _) in enumerate(binary(predictions).values()):
        known = np.flatnonzero(predictions.labels[:, i] >= 0)
        for side, rows in zip(sides, _right_and_wrong(own, count), strict=True):
            side.append([_shown(own, row)._replace(row=int(known[row]), target=i) for row in rows])
    return take_turns(sides[0], count), take_turns(sides[1], count)


def _shown(p: Predictions, row: int) -> Shown:
    label, predicted = p.labels[row], p.predicted[row]
    of_predicted, of_true = (float(p.probabilities[row, i]) for i in (predicted, label))
    return Shown(row, int(predicted), p.classes[label], p.classes[predicted], of_predicted, of_true)


def _right_and_wrong(p: Predictions, count: int) -> tuple[list[int], list[int]]:
    """Returns the rows of `choose_examples` for classes that exclude each other."""
    predicted = p.predicted
    confidence = p.probabilities.max(axis=1)
    right, wrong = [], []
    for label in range(len(p.classes)):
        rows = np.flatnonzero((p.labels == label) & (predicted == label))
        # Multiples of the golden ratio: the first rows are spread evenly, whatever their number.
        right.append(rows[np.argsort(np.arange(len(rows)) * 0.6180339887498949 % 1)].tolist())
        rows = np.flatnonzero((p.labels == label) & (predicted != label))
        rows = rows[np.argsort(-confidence[rows], kind="stable")]
        again = np.ones(len(rows), bool)
        again[np.unique(p.groups[rows], return_index=True)[1]] = False
        again[p.groups[rows] == ""] = False
        wrong.append([*rows[~again].tolist(), *rows[again].tolist()])
    return take_turns(right, count), take_turns(wrong, count)


def reliability(kinds: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draws accuracy by confidence (the highest probability) and examples per bin of `calibration.bins`, by label."""
    figure = style.figure(5.6, 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1.2, zorder=1, label="perfect calibration")
    for k, ((label, drawn), color, marker) in enumerate(zip(kinds.items(), style.COLORS, "os", strict=False)):
        full = [b for b in drawn if b["n"]]
        means, shares = [b["confidence"] for b in full], [b["accuracy"] for b in full]
        upper.plot(means, shares, color=color, marker=marker, markersize=5, linewidth=1.6, label=label)
        width = 1 / len(drawn) / len(kinds)
        left = [b["low"] + k * width for b in drawn]
        lower.bar(left, [b["n"] for b in drawn], width=0.9 * width, align="edge", color=color)
    style.style(upper, "Reliability", 12)
    style.style(lower)
    upper.set(ylabel="Accuracy", xlim=(-0.01, 1.01), ylim=(-0.03, 1.03), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    upper.legend(frameon=False, fontsize=9, loc="upper left")
    lower.set(xlabel="Confidence (highest probability)", ylabel="Examples")
    style.save(figure, path)


def decision_curves(predictions: Predictions, path: Path) -> None:
    """Draws the net benefit of the MAX_PANELS most frequent classes. Raises ValueError without examples."""
    each = [*binary(predictions).values()]
    n = [int((p.labels == i).sum()) for p, i in each]
    panels = sorted(sorted(range(len(n)), key=lambda i: -n[i])[:MAX_PANELS])
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = style.figure(max(3.4 * columns, 5.6), 2.9 * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes.flat[: len(panels)][-columns:]:
        axis.tick_params(labelbottom=True)  # also above an empty cell
    for axis, panel in zip(axes.flat, panels, strict=False):
        p, i = each[panel]
        curve = operating_points.net_benefit(p, i)
        t, share = curve["thresholds"], n[panel] / len(p)
        style.style(axis, f"{style.short(p.classes[i], 24)} ({style.percent(share)})", 10)
        axis.axhline(0, color=style.INK, linewidth=1, label="treat none")
        axis.plot(t, curve["all"], color=style.MUTED, linewidth=1.4, linestyle=style.DASHES, label="treat all")
        axis.plot(t, curve["model"], color=style.COLORS[0], linewidth=1.8, label="network")
        top = max(share, 0.02)
        axis.set(xlim=(0, 1), ylim=(-0.35 * top, 1.1 * top))  # the net benefit of treating all is unbounded below
    left_out = f", the {len(panels)} most frequent of {len(n)} classes" if len(panels) < len(n) else ""
    figure.suptitle(f"Net benefit{left_out}", x=0.01, ha="left", fontsize=12, color=style.INK)
    figure.supxlabel("Threshold probability", fontsize=10, color=style.INK)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    style.save(figure, path)


def flow(counts: Mapping[str, Any], path: Path) -> None:
    """Draws the flow of images and patients from found to excluded to splits; `counts` is `flow` of report.json."""

    def box(x: float, y: float, lines: Sequence[str], color: str = style.INK, ha: str = "center") -> None:
        frame = {"boxstyle": "square,pad=0.6", "facecolor": "white", "edgecolor": color}
        text = style.plain("\n".join(lines))
        axis.text(x, y, text, ha=ha, va="center", fontsize=9, color=style.INK, linespacing=1.4, bbox=frame)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": style.MUTED, "shrinkB": 0}, zorder=0)

    def size(of: Mapping[str, int]) -> str:
        return f"{count(of['images'], 'image')}, {count(of['groups'], 'patient')}"

    excluded = {"found": counts["skipped"], "prepared": counts["removed"]}
    titles = {"found": "Found", "prepared": "Read", "used": "Used in this run"}
    height = 5.2 + 0.2 * sum(map(len, excluded.values()))
    figure = style.figure(9, height)
    axis = figure.subplots()
    axis.set(xlim=(0, 9), ylim=(0, height))
    axis.axis("off")
    ys = np.linspace(height - 0.5, 2.0, 3)
    for (name, title), y, below in zip(titles.items(), ys, [*ys[1:], None], strict=True):
        box(3, y, [title, size(counts[name])])
        if below is None:
            continue
        arrow((3, y), (3, below + 0.3))
        arrow((3, (y + below) / 2), (4.6, (y + below) / 2))
        lines = [f"Excluded: {count(sum(excluded[name].values()), 'image')}"]
        lines += [f"{reason}: {n:,}" for reason, n in excluded[name].items()]
        box(4.7, (y + below) / 2, lines, style.WRONG, "left")
    xs = [3.0] if len(counts["splits"]) == 1 else np.linspace(1.2, 7.4, len(counts["splits"]))
    for x, (name, of) in zip(xs, counts["splits"].items(), strict=True):
        arrow((3, ys[-1] - 0.25), (x, 0.75))
        box(x, 0.45, [name, size(of)], style.COLORS[0])
    style.save(figure, path)
