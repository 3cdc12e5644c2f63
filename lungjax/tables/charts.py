"""The figures of a table: bars per configuration, a confusion matrix grid, and curves of each network's best run."""

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lungjax.evaluation import metrics
from lungjax.evaluation.predictions import Predictions
from lungjax.report import plots, style
from lungjax.report.templating import count
from lungjax.tables.cells import Table
from lungjax.tables.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
COLUMNS = 5  # panels per row
MAX_LETTERS = 14  # of the name of a class

VERDICTS = {
    "inside": (style.COLORS[0], "ours, interval contains the published number"),
    "above": (style.CORRECT, "ours, above it"),
    "below": (style.WRONG, "ours, below it"),
    "": ("#8C8C8C", "ours, no verdict"),
}


def draw(table: Table, results: Sequence[Result], folder: Path) -> dict[str, str]:
    """Draws `table.charts` into `folder` (only published marks if no run finished); returns captions by file name."""
    captions = {}
    done = [r for r in results if r.ours is not None and not r.cell.validation]
    for chart, (function, caption) in CHARTS.items():
        path = folder / f"{table.name}_{chart}.png"
        path.unlink(missing_ok=True)  # from an earlier call with other runs
        if chart in table.charts and (done or chart == "bars"):
            captions[path.name] = caption
            function(table, results if chart == "bars" else done, path)
    return captions


def bars(table: Table, results: Sequence[Result], path: Path) -> None:
    """Draws our numbers as bars with intervals, and published ones as marks; no losses, and no numbers above 1."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    visible = [r for r in results if max(r.cell.published or 0, r.ours or 0) <= 1 and r.cell.name != "loss"]
    visible = [r for r in visible if r.ours is not None or r.cell.published is not None]
    rows = [row for row in table.rows if any(r.cell.row == row for r in visible)]
    columns = [column for column in table.columns if any(r.cell.column == column for r in visible)]
    transposed = len(columns) < len(rows)
    panels, lines = (columns, rows) if transposed else (rows, columns)
    across = min(COLUMNS, len(panels))
    down = math.ceil(len(panels) / across)
    left = 0.075 * min(max(map(len, lines)), 34)
    figure = style.figure(left + 2.35 * across + 0.4, 1.4 + down * (0.55 + 0.17 * len(lines)))
    axes = np.atleast_1d(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)).ravel()
    at = {name: i for i, name in enumerate(lines)}
    for axis, panel in zip(axes, panels, strict=False):
        style.style(axis, style.short(panel, 30), 10)
        for r in visible:
            name, line = (r.cell.column, r.cell.row) if transposed else (r.cell.row, r.cell.column)
            if name == panel:
                _bar(axis, at[line], r, VERDICTS[r.verdict][0])
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].set_yticks(range(len(lines)), [style.short(line, 34) for line in lines])
    for axis in axes[: len(panels)]:
        axis.tick_params(labelsize=7.5, labelbottom=True)
    axes[0].set(xlim=(0, 1), ylim=(len(lines) - 0.4, -0.6), xticks=np.linspace(0, 1, 6))
    used = {r.verdict for r in visible if r.ours is not None}
    marks: list[Any] = [Line2D([], [], color="black", linewidth=2, label="published")]
    if any(r.low for r in visible):
        marks.append(Line2D([], [], color=style.INK, linewidth=1, label="95 % interval"))
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


def confusions(table: Table, done: Sequence[Result], path: Path) -> None:
    """Draws confusion matrices per experiment and split (shares of each class, mean over seeds), and published ones."""
    cells_of = Counter(r.group.experiment for r in done)
    panels: dict[tuple[str, str], tuple[str, np.ndarray]] = {}  # by experiment, or row of a published one, and split
    for r in done:
        title = r.cell.row
        if r.chosen:
            title += f"\n{r.chosen.column if r.chosen.row == r.cell.row else r.chosen.row}"
        elif cells_of[r.group.experiment] == 1 and len(table.columns) > 1:
            title += f"\n{r.cell.column}"
        if (r.group.experiment, r.cell.split) not in panels:
            each = [metrics.summarize(p)["confusion"] for p in r.group.predictions[r.cell.split]]
            panels[r.group.experiment, r.cell.split] = title, np.mean(each, axis=0)
        published = np.asarray(table.matrices.get(r.cell.row, ()), float)
        if len(published) and tuple(published.sum(axis=1)) == table.counts.get(r.cell.split):  # for this split
            panels[r.cell.row, r.cell.split] = f"{r.cell.row}\npublished", published
    splits, seeds = {split for _, split in panels}, done[0].group.predictions["val"]
    names = [style.short(name, MAX_LETTERS) for name in seeds[0].classes]
    c, longest = len(names), max(map(len, names))
    across = min(len(panels), 10 if len(panels) > 40 else COLUMNS)
    down = math.ceil(len(panels) / across)
    # In inches: a matrix, its title, gaps and margins. Matplotlib's layout engine takes minutes for a hundred axes.
    side, head, gap = 0.3 + 0.32 * c, 0.36 + 0.14 * (len(splits) > 1), 0.12
    left, below, above = 0.2 + 0.065 * longest, 0.15 + 0.055 * longest, 0.55
    width = max(left + across * (side + gap), 5.0)
    height = above + down * (side + head) + below
    figure = style.figure(width, height, layout="none")
    for number, ((_, split), (title, counts)) in enumerate(panels.items()):
        row, column = divmod(number, across)
        x, y = left + column * (side + gap), height - above - (row + 1) * (side + head)
        axis = figure.add_axes((x / width, y / height, side / width, side / height))
        plots.confusion_cells(axis, counts, True, 7, side / c)
        rotation: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        axis.set_xticks(range(c), names if number + across >= len(panels) else [""] * c, fontsize=7, **rotation)
        axis.set_yticks(range(c), [""] * c if column else names, fontsize=7)
        lines = [*title.split("\n"), *([split] if len(splits) > 1 else [])]
        text = "\n".join(style.short(line, int((side + gap) / 0.062)) for line in lines)
        axis.set_title(text, fontsize=7.5, color=style.INK, pad=3)
    what = f"{table.title}: share of each true class (rows), mean over {count(len(seeds), 'seed')}"
    what += f", {splits.pop()} split" if len(splits) == 1 else ""
    figure.text(0.5, 1 - 0.05 / height, style.plain("\n".join(textwrap.wrap(what, max(int(width * 13), 40)))),
                fontsize=10, color=style.INK, ha="center", va="top")  # fmt: skip
    style.save(figure, path)


def curves(table: Table, done: Sequence[Result], path: Path) -> None:
    """Draws ROC and precision-recall curves, pooled over the classes (micro), of each network's best run."""
    figure = style.figure(12.6, 5.2)
    axes = dict(zip(("roc", "pr"), figure.subplots(1, 2), strict=True))
    for kind, axis in axes.items():
        plots.square(axis, kind)
    for i, (name, result, seed, p) in enumerate(best_runs(done)):
        look = {**style.line_style(i), "linewidth": 1.7}
        auc, average_precision = (plots.curve(axis, kind, *plots.pooled(p), look) for kind, axis in axes.items())
        scores = f"AUC {auc:.3f}, AP {average_precision:.3f}"
        axes["roc"].lines[-1].set_label(f"{name}\n{result.cell.split}, seed {seed}: {scores}")
    left = axes["roc"]
    subtitle = "Each network's best run, all example-class pairs pooled (micro)"
    left.set_title(style.plain(table.title), loc="left", fontsize=11, color=style.INK, pad=24)
    left.text(0, 1.03, subtitle, transform=left.transAxes, fontsize=9, color=style.MUTED)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8, labelspacing=0.8)
    style.save(figure, path)


def best_runs(done: Sequence[Result]) -> list[tuple[str, Result, int, Predictions]]:
    """Returns name, result, seed and predictions per network: the best seed of its best cell, by the first metric."""
    networks: dict[tuple[str, ...], list[Result]] = {}
    for r in done:
        model, tune = r.group.runs[0].config.model, r.group.runs[0].config.optim
        networks.setdefault((model.name, model.weights, tune.tune, tune.freeze), []).append(r)
    best_of = []
    for own in networks.values():
        best = max((r for r in own if r.cell.metric == own[0].cell.metric), key=lambda r: r.ours or 0.0)
        predictions, metric = best.group.predictions[best.cell.split], f"{best.cell.unit}.{best.cell.name}"
        seed = int(np.argmax([metrics.numbers(metrics.unit_levels(p))[metric] for p in predictions]))
        places = [best.cell.row, best.cell.column]
        if best.chosen:
            places = [best.chosen.row, best.chosen.column]
        elif len({r.cell.metric for r in done}) > 1:  # columns are metrics
            places = places[:1]
        best_of.append((style.short(", ".join(places), 44), best, best.group.runs[seed].seed, predictions[seed]))
    return best_of


CHARTS = {  # name: (function, caption)
    "bars": (bars, "Published numbers (marks) and ours (bars, with 95 % intervals)"),
    "confusions": (
        confusions,
        "Confusion matrices, ours (mean over the seeds) and published, as shares of the true class",
    ),
    "curves": (curves, "ROC and precision-recall curves of each network's best run"),
}
