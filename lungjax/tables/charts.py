"""The figures of a table: bars per configuration, a grid of confusion matrices, curves of each network's best run."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lungjax.evaluation import metrics
from lungjax.evaluation.predictions import Predictions
from lungjax.report import style
from lungjax.report.render import count
from lungjax.tables.cells import Table
from lungjax.tables.results import Group, Reader, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
COLUMNS = 5  # panels per row
MAX_LETTERS = 14  # of the name of a class

VERDICTS = {
    "inside": (style.COLORS[0], "ours, published number inside the interval"),
    "above": (style.CORRECT, "ours, above it"),
    "below": (style.WRONG, "ours, below it"),
    "": ("#8C8C8C", "ours, no verdict"),
}
CAPTIONS = {
    "bars": "Published numbers (marks) and ours (bars, with 95 % intervals)",
    "confusions": "Confusion matrices, mean over the seeds, as shares of the true class",
    "curves": "ROC and precision-recall curves of each network's best run",
}


def draw(table: Table, results: Sequence[Result], reader: Reader, folder: Path) -> dict[str, str]:
    """Draws `table.charts` into `folder`; returns the captions by file name.

    Bars need no run and then show only published numbers; the others need finished runs.
    """
    captions = {}
    done = [r for r in results if r.ours is not None and r.group is not None]
    for chart, caption in CAPTIONS.items():
        path = folder / f"{table.name}_{chart}.png"
        path.unlink(missing_ok=True)  # from an earlier call with other runs
        if chart not in table.charts or not (done or chart == "bars"):
            continue
        captions[path.name] = caption
        if chart == "bars":
            bars(table, results, path)
        else:
            {"confusions": confusions, "curves": curves}[chart](table, done, reader, path)
    return captions


def bars(table: Table, results: Sequence[Result], path: Path) -> None:
    """Draws each cell: our number as a bar with its interval, colored by verdict, the published one as a mark.

    A panel per row or, in a table that is longer than wide, per column. Losses and other numbers above 1 are skipped.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = [r for r in results if max(r.cell.published or 0, r.ours or 0) <= 1 and r.cell.name != "loss"]
    shown = [r for r in shown if r.ours is not None or r.cell.published is not None]
    rows = [row for row in table.rows if any(r.cell.row == row for r in shown)]
    columns = [column for column in table.columns if any(r.cell.column == column for r in shown)]
    transposed = len(columns) < len(rows)
    panels, lines = (columns, rows) if transposed else (rows, columns)
    across = min(COLUMNS, len(panels))
    down = math.ceil(len(panels) / across)
    left = 0.075 * min(max(map(len, lines)), 34)
    figure = style.figure(left + 2.35 * across + 0.4, 1.4 + down * (0.55 + 0.17 * len(lines)))
    axes = np.atleast_1d(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)).ravel()
    at = {name: i for i, name in enumerate(lines)}
    for axis, panel in zip(axes, panels, strict=False):
        style.style(axis)
        axis.set_title(style.short(panel, 30), loc="left", fontsize=10, color=style.INK)
        for r in shown:
            name, line = (r.cell.column, r.cell.row) if transposed else (r.cell.row, r.cell.column)
            if name == panel:
                _bar(axis, at[line], r, VERDICTS[r.verdict][0])
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].set_yticks(range(len(lines)), [style.short(line, 34) for line in lines])
    axes[0].set_ylim(len(lines) - 0.4, -0.6)
    for axis in axes[: len(panels)]:
        axis.tick_params(labelsize=7.5, labelbottom=True)
    axes[0].set_xlim(0, 1)
    axes[0].set_xticks(np.linspace(0, 1, 6))
    used = {r.verdict for r in shown if r.ours is not None}
    marks: list[Any] = [Line2D([], [], color="black", linewidth=2, label="published")]
    marks += [Line2D([], [], color=style.INK, linewidth=1, label="95 % interval")] if any(r.low for r in shown) else []
    marks += [Patch(color=color, label=label) for word, (color, label) in VERDICTS.items() if word in used]
    figure.suptitle(style.plain(table.title), fontsize=12, color=style.INK)
    figure.legend(handles=marks, loc="outside lower center", ncols=min(len(marks), 4), frameon=False, fontsize=9)
    style.save(figure, path)


def _bar(axis: "Axes", y: float, result: Result, color: str) -> None:
    if result.ours is not None:
        axis.barh(y, result.ours, height=0.72, color=color, alpha=0.75, zorder=2)
    if result.low is not None and result.high is not None:
        axis.plot([result.low, result.high], [y, y], color=style.INK, linewidth=1, zorder=3, solid_capstyle="butt")
    if result.cell.published is not None:
        axis.plot([result.cell.published] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2, zorder=4,
                  solid_capstyle="butt")  # fmt: skip


def confusions(table: Table, done: Sequence[Result], reader: Reader, path: Path) -> None:
    """Draws a confusion matrix per experiment and split: shares of each true class, mean over the seeds."""
    panels: dict[tuple[str, str], tuple[str, Group, str]] = {}
    rows = {experiment: len({r.cell.row for r in done if r.cell.experiment == experiment})
            for experiment in {r.cell.experiment for r in done}}  # fmt: skip
    for r in done:
        assert r.group is not None
        alone = sum(o.group == r.group and o.cell.row == r.cell.row for o in done) == 1 and len(table.columns) > 1
        title = f"{r.cell.row}\n{r.cell.column}" if alone and rows[r.cell.experiment] == 1 else r.cell.row
        if r.chosen:
            title = f"{r.cell.row}\n{r.chosen.column if r.chosen.row == r.cell.row else r.chosen.row}"
        panels.setdefault((r.group.experiment, r.cell.split), (title, r.group, r.cell.split))
    both = len({split for _, split in panels}) > 1
    matrices = list(panels.values())
    each = [reader.predictions(group, split) for _, group, split in matrices]
    classes = each[0][0].classes
    longest = max(len(style.short(name, MAX_LETTERS)) for name in classes)
    across = min(len(matrices), 10 if len(matrices) > 40 else COLUMNS)
    down = math.ceil(len(matrices) / across)
    # In inches: a matrix, its title, the gap between two, the margins. Matplotlib's layout engine would take minutes
    # for a hundred axes.
    side, head, gap = 0.3 + 0.32 * len(classes), 0.36 + 0.14 * both, 0.12
    left, below, above = 0.2 + 0.065 * longest, 0.15 + 0.055 * longest, 0.55
    width = max(left + across * (side + gap), 5.0)
    height = above + down * (side + head) + below
    figure = style.figure(width, height, layout="none")
    for number, ((title, _, split), seeds) in enumerate(zip(matrices, each, strict=True)):
        x = left + number % across * (side + gap)
        y = height - above - (number // across + 1) * (side + head)
        axis = figure.add_axes((x / width, y / height, side / width, side / height))
        _matrix(axis, seeds, number % across == 0, number + across >= len(matrices))
        lines = [*title.split("\n"), *[split] * both]
        letters = int((side + gap) / 0.062)
        text = "\n".join(style.short(line, letters) for line in lines)
        axis.set_title(text, fontsize=7.5, color=style.INK, pad=3)
    what = f"{table.title}: share of each true class (rows), mean over {count(len(each[0]), 'seed')}"
    what += "" if both else f", {matrices[0][2]} split"
    figure.text(0.5, 1 - 0.05 / height, style.plain("\n".join(textwrap.wrap(what, max(int(width * 13), 40)))),
                fontsize=10, color=style.INK, ha="center", va="top")  # fmt: skip
    style.save(figure, path)


def _matrix(axis: "Axes", each: Sequence[Predictions], left: bool, bottom: bool) -> None:
    classes = each[0].classes
    c = len(classes)
    counts = np.mean([np.bincount(p.labels * c + p.predicted, minlength=c * c) for p in each], axis=0).reshape(c, c)
    whole = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, whole, out=np.full_like(counts, np.nan), where=whole > 0)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    names = [style.short(name, MAX_LETTERS) for name in classes]
    axis.set_xticks(range(c), names if bottom else [""] * c, fontsize=7, rotation=40, ha="right",
                    rotation_mode="anchor")  # fmt: skip
    axis.set_yticks(range(c), names if left else [""] * c, fontsize=7)
    axis.tick_params(length=0, colors=style.INK)
    axis.spines[:].set_visible(False)
    for i, j in np.ndindex(c, c):
        if not np.isnan(shares[i, j]):
            color = "white" if shares[i, j] > 0.55 else style.INK
            axis.text(j, i, style.percent(float(shares[i, j])), ha="center", va="center", fontsize=7, color=color)


def curves(table: Table, done: Sequence[Result], reader: Reader, path: Path) -> None:
    """Draws ROC and precision-recall curves of each network's best run, the best seed of its best cell.

    Networks differ by name, weights and trained parameters. All example-class pairs are pooled (micro).
    """
    figure = style.figure(12.6, 5.2)
    left, right = figure.subplots(1, 2)
    for axis in (left, right):
        style.style(axis)
        axis.set_xlim(-0.01, 1.01)
        axis.set_ylim(-0.01, 1.01)
        axis.set_box_aspect(1)
    left.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1, zorder=1)
    for i, (name, result, seed, predictions) in enumerate(best_runs(done, reader)):
        look = {**style.line_style(i), "linewidth": 1.7}
        (x, y, area), (recall, precision, mean) = pooled(predictions)
        label = f"{name}\n{result.cell.split}, seed {seed}: AUC {area:.3f}, AP {mean:.3f}"
        left.plot(x, y, label=label, **look)
        right.plot(recall, precision, drawstyle="steps-pre", **look)
    left.set(xlabel="False positive rate (1 - specificity)", ylabel="True positive rate (sensitivity)")
    right.set(xlabel="Recall (sensitivity)", ylabel="Precision (positive predictive value)")
    subtitle = "Each network's best run, all example-class pairs pooled (micro)"
    left.set_title(style.plain(table.title), loc="left", fontsize=11, color=style.INK, pad=24)
    left.text(0, 1.03, subtitle, transform=left.transAxes, fontsize=9, color=style.MUTED)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8, labelspacing=0.8)
    style.save(figure, path)


def best_runs(done: Sequence[Result], reader: Reader) -> list[tuple[str, Result, int, Predictions]]:
    """Returns name, result, seed and predictions of each network's best run, by the network's first metric."""
    networks: dict[tuple[str, ...], list[Result]] = {}
    for r in done:
        assert r.group is not None
        model, tune = r.group.config.model, r.group.config.optim
        networks.setdefault((model.name, model.weights, tune.tune, tune.freeze), []).append(r)
    best_of = []
    for own in networks.values():
        candidates = [r for r in own if r.cell.metric == own[0].cell.metric]
        best = max(candidates, key=lambda r: r.ours or 0.0)
        assert best.group is not None
        values = reader.each(best.group, best.cell.metric)
        seed = int(np.nanargmax(values))
        places = [best.cell.row, best.cell.column]
        if best.chosen:
            places = [best.chosen.row, best.chosen.column]
        elif len({r.cell.metric for r in done}) > 1:  # columns are metrics
            places = places[:1]
        name = style.short(", ".join(places), 44)
        best_of.append((name, best, best.group.runs[seed].seed, reader.predictions(best.group, best.cell.split)[seed]))
    return best_of


Curve = tuple[np.ndarray, np.ndarray, float]


def pooled(p: Predictions) -> tuple[Curve, Curve]:
    """Returns ROC (false and true positive rate, area) and PR (recall, precision, average precision) of all pairs.

    A pair is an example and a class (micro average).
    """
    pairs = (p.labels[:, None] == np.arange(len(p.classes))).ravel()
    scores = np.asarray(p.probabilities, np.float64).ravel()
    x, y, _ = metrics.roc_curve(pairs, scores)
    recall, precision, _ = metrics.pr_curve(pairs, scores)
    return (x, y, metrics.auc(pairs, scores)), (recall, precision, metrics.average_precision(pairs, scores))
