"""The pictures of a table: bars by configuration, a grid of confusion matrices, curves of each network's best run."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lungjax.evaluation import metrics
from lungjax.evaluation.predictions import Predictions
from lungjax.report import style
from lungjax.tables.cells import Table
from lungjax.tables.results import Group, Reader, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW_BARS = 28  # cells up to which all bars share one axis
ACROSS = 5  # panels a line
SHORT = 14  # letters of a class's name
GRID = np.linspace(0, 1, 501)  # where the classes' curves are averaged
SHADES = {"inside": style.COLORS[0], "above": style.RIGHT, "below": style.WRONG, "": "#8C8C8C"}
WORDS = {
    "inside": "ours, published number inside the interval",
    "above": "ours, above it",
    "below": "ours, below it",
    "": "ours, no verdict",
}


def draw(table: Table, found: Sequence[Result], reader: Reader, folder: Path) -> dict[str, str]:
    """Draws what `table.charts` says into `folder`; returns what each picture shows by file name.

    Bars are drawn without a single run as well, for what was published; the others need finished runs.
    """
    drawn = {}
    done = [result for result in found if result.ours is not None and result.group is not None]
    if "bars" in table.charts:
        drawn[f"{table.name}_bars.png"] = "Published numbers (marks) and ours (bars, with 95 % intervals)"
        bars(table, found, folder / f"{table.name}_bars.png")
    if "confusions" in table.charts and done:
        drawn[f"{table.name}_confusions.png"] = "Confusion matrices, mean over the seeds, as shares of the true class"
        confusions(table, done, reader, folder / f"{table.name}_confusions.png")
    if "curves" in table.charts and done:
        drawn[f"{table.name}_curves.png"] = "ROC and precision-recall curves of each network's best run"
        curves(table, done, reader, folder / f"{table.name}_curves.png")
    for chart in ("bars", "confusions", "curves"):  # of an earlier call, when other runs were there
        name = f"{table.name}_{chart}.png"
        if name not in drawn:
            (folder / name).unlink(missing_ok=True)
    return drawn


def bars(table: Table, found: Sequence[Result], path: Path) -> None:
    """Draws each cell: ours as a bar with its interval, what was published as a mark.

    A few cells share one axis, a group a row and a colour a column. Many get a panel a row, the colour says the
    verdict. Losses and other numbers above 1 are left out.
    """
    shown = [r for r in found if max(r.cell.published or 0, r.ours or 0) <= 1 and r.cell.name != "loss"]
    if len(shown) <= FEW_BARS and len(table.columns) <= len(style.COLORS):
        _one_axis(table, shown, path)
    else:
        _panels(table, shown, path)


def _one_axis(table: Table, shown: Sequence[Result], path: Path) -> None:
    columns = [name for name in table.columns if any(r.cell.column == name for r in shown)]
    color = {name: style.COLORS[i] for i, name in enumerate(columns)}
    figure = style.figure(9, 1.3 + 0.2 * len(shown) + 0.14 * len(table.rows))
    axis = figure.subplots()
    style.style(axis)
    place, ticks, labels = 0.0, [], []
    for row in table.rows:
        own = [r for r in shown if r.cell.row == row]
        for i, r in enumerate(own):
            _bar(axis, place + i, r, color[r.cell.column])
        ticks.append(place + (len(own) - 1) / 2)
        labels.append(style.short(row, 34))
        place += len(own) + 0.7
    axis.set_yticks(ticks, labels)
    axis.set_ylim(place - 0.7, -0.8)
    from matplotlib.patches import Patch

    known = [Patch(color=color[name], label=style.short(name, 30)) for name in columns]
    _finish(figure, axis, table, shown, path, known)


def _panels(table: Table, shown: Sequence[Result], path: Path) -> None:
    shown = [r for r in shown if r.ours is not None or r.cell.published is not None]
    rows = [row for row in table.rows if any(r.cell.row == row for r in shown)]
    columns = [column for column in table.columns if any(r.cell.column == column for r in shown)]
    # Of a table that is longer than it is wide, the panels are the columns.
    turned = len(columns) < len(rows)
    panels, lines = (columns, rows) if turned else (rows, columns)
    across = min(ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    left = 0.075 * min(max(map(len, lines)), 34)
    figure = style.figure(left + 2.35 * across + 0.4, 1.4 + down * (0.55 + 0.17 * len(lines)))
    axes = np.atleast_1d(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)).ravel()
    at = {name: i for i, name in enumerate(lines)}
    for axis, panel in zip(axes, panels, strict=False):
        style.style(axis)
        axis.set_title(style.short(panel, 30), loc="left", fontsize=10, color=style.INK)
        for r in shown:
            name, line = (r.cell.column, r.cell.row) if turned else (r.cell.row, r.cell.column)
            if name == panel:
                _bar(axis, at[line], r, SHADES[r.verdict])
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].set_yticks(range(len(lines)), [style.short(line, 34) for line in lines])
    axes[0].set_ylim(len(lines) - 0.4, -0.6)
    for axis in axes[: len(panels)]:
        axis.tick_params(labelsize=7.5, labelbottom=True)
    from matplotlib.patches import Patch

    met = {r.verdict for r in shown if r.ours is not None}
    known = [Patch(color=SHADES[word], label=text) for word, text in WORDS.items() if word in met]
    _finish(figure, axes[0], table, shown, path, known)


def _bar(axis: "Axes", y: float, result: Result, color: str) -> None:
    if result.ours is not None:
        axis.barh(y, result.ours, height=0.72, color=color, alpha=0.75, zorder=2)
    if result.low is not None and result.high is not None:
        axis.plot([result.low, result.high], [y, y], color=style.INK, linewidth=1, zorder=3, solid_capstyle="butt")
    if result.cell.published is not None:
        axis.plot([result.cell.published] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2, zorder=4,
                  solid_capstyle="butt")  # fmt: skip


def _finish(figure: Any, axis: "Axes", table: Table, shown: Sequence[Result], path: Path, known: list[Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MultipleLocator

    axis.set_xlim(0, 1)
    axis.xaxis.set_major_locator(MultipleLocator(0.2))
    marks = [Line2D([], [], color="black", linewidth=2, label="published")]
    marks += [Line2D([], [], color=style.INK, linewidth=1, label="95 % interval")] if any(r.low for r in shown) else []
    figure.suptitle(style.plain(table.title), fontsize=12, color=style.INK)
    figure.legend(
        handles=[*marks, *known], loc="outside lower center", ncols=min(len(marks) + len(known), 4), frameon=False,
        fontsize=9,
    )  # fmt: skip
    style.save(figure, path)


def confusions(table: Table, done: Sequence[Result], reader: Reader, path: Path) -> None:
    """Draws a confusion matrix for each experiment and split: the share of each true class, mean over the seeds."""
    found: dict[tuple[str, str], tuple[str, Group, str]] = {}
    rows = {experiment: len({r.cell.row for r in done if r.cell.experiment == experiment})
            for experiment in {r.cell.experiment for r in done}}  # fmt: skip
    for r in done:
        assert r.group is not None
        alone = sum(o.group == r.group and o.cell.row == r.cell.row for o in done) == 1 and len(table.columns) > 1
        title = f"{r.cell.row}\n{r.cell.column}" if alone and rows[r.cell.experiment] == 1 else r.cell.row
        if r.chosen:
            title = f"{r.cell.row}\n{r.chosen.column if r.chosen.row == r.cell.row else r.chosen.row}"
        found.setdefault((r.group.experiment, r.cell.split), (title, r.group, r.cell.split))
    both = len({split for _, split in found}) > 1
    matrices = list(found.values())
    each = [reader.predictions(group, split) for _, group, split in matrices]
    classes = each[0][0].classes
    longest = max(len(style.short(name, SHORT)) for name in classes)
    across = min(len(matrices), 10 if len(matrices) > 40 else ACROSS)
    down = math.ceil(len(matrices) / across)
    # Inches: a matrix, its title, the space between two, and around all. Placed by hand: with a hundred axes the
    # layout engine takes minutes.
    side, head, gap = 0.3 + 0.32 * len(classes), 0.36 + 0.14 * both, 0.12
    left, below, above = 0.2 + 0.065 * longest, 0.15 + 0.055 * longest, 0.55
    width = max(left + across * (side + gap), 5.0)
    height = above + down * (side + head) + below
    figure = style.figure(width, height, layout="none")
    for number, ((title, _, split), made) in enumerate(zip(matrices, each, strict=True)):
        x = left + number % across * (side + gap)
        y = height - above - (number // across + 1) * (side + head)
        axis = figure.add_axes((x / width, y / height, side / width, side / height))
        _matrix(axis, made, number % across == 0, number + across >= len(matrices))
        lines = [*title.split("\n"), *[split] * both]
        most = int((side + gap) / 0.062)
        text = "\n".join(style.short(line, most) for line in lines)
        axis.set_title(text, fontsize=7.5, color=style.INK, pad=3)
    seeds = len(each[0])
    what = f"{table.title}: share of each true class (rows), mean over {seeds} seed{'s' * (seeds != 1)}"
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
    names = [style.short(name, SHORT) for name in classes]
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
    """Draws ROC and precision-recall curves of each network's best run: the best cell's best seed.

    Networks are told apart by name, weights and what is trained. Curves are pooled as `table.pooling` says.
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
        look: dict[str, Any] = {
            "color": style.COLORS[i % len(style.COLORS)],
            "linestyle": style.STYLES[i // len(style.COLORS) % len(style.STYLES)],
            "linewidth": 1.7,
        }
        (x, y, area), (recall, precision, mean) = pooled(predictions, table.pooling)
        label = f"{name}\n{result.cell.split}, seed {seed}: AUC {area:.3f}, AP {mean:.3f}"
        left.plot(x, y, label=label, **look)
        right.plot(recall, precision, drawstyle="steps-pre", **look)
    left.set(xlabel="False positive rate (1 - specificity)", ylabel="True positive rate (sensitivity)")
    right.set(xlabel="Recall (sensitivity)", ylabel="Precision (positive predictive value)")
    how = {
        "micro": "all example-class pairs pooled (micro)",
        "macro": "mean of the classes' curves (macro)",
        "micro_logits": "raw logits of all example-class pairs pooled (micro), as the study did",
    }[table.pooling]
    left.set_title(style.plain(table.title), loc="left", fontsize=11, color=style.INK, pad=24)
    left.text(0, 1.03, f"Each network's best run, {how}", transform=left.transAxes, fontsize=9, color=style.QUIET)
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
    found = []
    for own in networks.values():
        alike = [r for r in own if r.cell.metric == own[0].cell.metric]
        best = max(alike, key=lambda r: r.ours or 0.0)
        assert best.group is not None
        values = reader.each(best.group, best.cell.metric)
        seed = int(np.nanargmax(values))
        places = [best.cell.row, best.cell.column]
        if best.chosen:
            places = [best.chosen.row, best.chosen.column]
        elif len({r.cell.metric for r in done}) > 1:  # columns are metrics
            places = places[:1]
        name = style.short(", ".join(places), 44)
        found.append((name, best, best.group.runs[seed].seed, reader.predictions(best.group, best.cell.split)[seed]))
    return found


Curve = tuple[np.ndarray, np.ndarray, float]


def pooled(predictions: Predictions, how: str) -> tuple[Curve, Curve]:
    """Returns ROC (false and true positive rate, area) and PR (recall, precision, average precision) of all classes.

    `how` is one of `cells.POOLINGS`. Without logits in the file probabilities take their place.
    """
    is_class = predictions.labels[:, None] == np.arange(len(predictions.classes))
    scores = np.asarray(predictions.probabilities, np.float64)
    if how == "micro_logits" and predictions.logits is not None:
        scores = np.asarray(predictions.logits, np.float64)
    if how != "macro":
        pairs, values = is_class.ravel(), scores.ravel()
        x, y, _ = metrics.roc_curve(pairs, values)
        recall, precision, _ = metrics.pr_curve(pairs, values)
        return (x, y, metrics.auc(pairs, values)), (recall, precision, metrics.average_precision(pairs, values))
    held = [i for i in range(is_class.shape[1]) if is_class[:, i].any() and not is_class[:, i].all()]
    roc, pr, areas = [], [], []
    for i in held:
        x, y, _ = metrics.roc_curve(is_class[:, i], scores[:, i])
        roc.append(np.interp(GRID, x, y))
        recall, precision, _ = metrics.pr_curve(is_class[:, i], scores[:, i])
        pr.append(precision[np.minimum(np.searchsorted(recall, GRID), len(recall) - 1)])
        areas.append(
            (metrics.auc(is_class[:, i], scores[:, i]), metrics.average_precision(is_class[:, i], scores[:, i]))
        )
    area, mean = np.mean(areas, axis=0)
    return (GRID, np.mean(roc, axis=0), float(area)), (GRID, np.mean(pr, axis=0), float(mean))
