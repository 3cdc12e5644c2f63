"""The 30 runs behind the first tables of experiments/README.md: python -m tests.benchmarks.small_sets --run

Runs what is missing, each in its own process, then prints the tables; without --run it prints the commands.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lungjax.evaluation import bootstrap, predictions
from lungjax.evaluation.predictions import Predictions
from tests.benchmarks import harness

EPOCHS = {"ct": 4, "xray": 6}
SEEDS = 3
# With the study's valid padding, these sizes give last feature maps of a few cells.
CBR = {"simple": 128, "cbr_small": 128, "cbr_tiny": 96}
LITE = "efficientnet_lite0"
STARTS = [*((model, "none") for model in CBR), (LITE, "none"), (LITE, "imagenet")]


def command(data: str, model: str, weights: str, seed: int, workdir: Path) -> list[str]:
    if model == LITE:
        flags = [f"--experiment=finetune:dataset=folder/{data},weights={weights},size=128"]
    else:
        flags = [f"--experiment=cbr_folder:dataset=folder/{data},model={model}", f"--set=input.size={CBR[model]}"]
        flags += ["--set=input.mean=0.5", "--set=input.std=0.25"]  # a network without norm hardly learns otherwise
    flags += [f"--set=train.epochs={EPOCHS[data]}", f"--set=train.seed={seed}", f"--workdir={workdir}"]
    return ["-m", "lungjax.main", *flags]


def results(data: str, model: str, weights: str, root: Path, kind: str = "test") -> list[Predictions]:
    """Returns the predictions of the finished runs, one per seed."""
    files = [root / f"{data}-{model}-{weights}-{s}" / f"predictions_{kind}.csv" for s in range(SEEDS)]
    return [predictions.read(file) for file in files if file.exists() and (file.parent / "report.md").exists()]


def cell(runs: Sequence[Predictions], name: str, unit: str = "slice") -> str:
    """Returns "mean (low to high)" of a metric over the runs; a dash if it is undefined."""
    if not runs or not len(runs[0]):
        return "-"
    mean, low, high = bootstrap.over_runs(runs, [name], unit=unit)[name]
    if mean is None:
        return "-"
    return f"{mean:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def tables(data: str, root: Path) -> str:
    """Returns the two tables of a data set in markdown: complete test split, and per source."""
    rows = [["network", "start", "seeds", "AUC, slice", "AUC, patient", "accuracy, slice"]]
    rows[0] += ["AUC, no lungs"] if data == "ct" else []
    by_source, sources = [], {}
    for model, weights in STARTS:
        runs = results(data, model, weights, root)
        start = "ImageNet" if weights == "imagenet" else "random"
        scores = [cell(runs, "auc_macro"), cell(runs, "auc_macro", "patient"), cell(runs, "accuracy")]
        if data == "ct":
            scores.append(cell(results(data, model, weights, root, "no_lungs"), "auc_macro"))
        rows.append([model, start, str(len(runs)), *scores])
        if runs:
            names, counts = np.unique(runs[0].sources, return_counts=True)
            sources = dict(sorted(zip(names.tolist(), counts.tolist(), strict=True), key=lambda item: -item[1]))
            parts = ([predictions.take(p, np.flatnonzero(p.sources == s)) for p in runs] for s in sources)
            by_source.append([f"{model}, {start}", *(f"{cell(p, 'auc_macro')}; {cell(p, 'accuracy')}" for p in parts)])
    head = ["AUC; accuracy per slice", *(f"{s}, {n} images" for s, n in sources.items())]
    return f"{harness.table(rows[0], rows[1:])}\n\n{harness.table(head, by_source)}"


def main() -> None:
    flags = harness.parse(__doc__, workdir=Path("runs/small_sets"), run=False)
    for seed in range(SEEDS):
        for data in EPOCHS:
            for model, weights in STARTS:
                folder = flags.workdir / f"{data}-{model}-{weights}-{seed}"
                if not (folder / "report.md").exists():
                    arguments = command(data, model, weights, seed, folder)
                    print("python", shlex.join(arguments), flush=True)
                    if flags.run and subprocess.run([sys.executable, *arguments]).returncode:
                        print(f"failed: {folder}", file=sys.stderr)
    for data in EPOCHS:
        print(f"\n## {data}\n\n{tables(data, flags.workdir)}")


if __name__ == "__main__":
    main()
