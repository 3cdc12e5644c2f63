"""The figure of a table: our confusion matrices, mean over the seeds, and the published ones."""

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.evaluation import metrics
from lungjax.report import plots, style
from lungjax.report.templating import count
from lungjax.tables.cells import Table
from lungjax.tables.results import Result

COLUMNS = 5  # panels per row
MAX_LETTERS = 14  # of the name of a class


def draw(table: Table, results: Sequence[Result], folder: Path) -> dict[str, str]:
    """Draws the confusion matrices of a table with `confusions` into `folder`; returns the captions by file name.

    There is a panel per experiment and split, with shares of each true class. Without a finished run, draws nothing.
    """
    path = folder / f"{table.name}_confusions.png"
    path.unlink(missing_ok=True)  # from an earlier call with other runs
    done = [r for r in results if r.ours is not None and not r.cell.validation]
    if not table.confusions or not done:
        return {}
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
    across = min(len(panels), COLUMNS)
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
    return {path.name: "Confusion matrices, ours (mean over the seeds) and published, as shares of the true class"}
