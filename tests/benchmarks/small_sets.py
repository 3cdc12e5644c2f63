"""Trains networks on small subsets of real data sets; finished runs are skipped.

    python -m tests.benchmarks.small_sets --source=DIR [--work=FOLDER] [--jobs=1]
    python -m lungjax.tables --pool --workdir=FOLDER/runs

DIR contains folders `ct` and `xray` with a labels.csv (path, label, split, group). A subset has 100 or 500 random
groups of the train split, the same fraction of those of val, and the complete test split.
"""

import csv
import random
from pathlib import Path

from tests.benchmarks import harness

CBR = "--set=auto= --set=model.momentum=None --set=train.epochs=8 --set=optim.name=adam --set=optim.weight_decay=0"
SETTINGS = {
    "cbr_small": ["finetune:model=cbr_small,weights=none,size=128", *CBR.split()],
    "fixed": ["finetune:weights=imagenet", "--set=auto="],
    "auto": ["finetune"],
}
SUBSETS = [("xray", 100), ("ct", 100), ("xray", 0), ("ct", 500), ("ct", 0)]  # data set and number of train groups
SEEDS = 3


def write_subset(source: Path, target: Path, count: int) -> None:
    """Writes a labels.csv with `count` groups of train (0: all), the same fraction of val, and all of test."""
    with (source / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    members = {s: sorted({row["group"] for row in rows if row["split"] == s}) for s in ("train", "val", "test")}
    fraction = min(count / len(members["train"]), 1) if count else 1
    selected = set(members["test"])
    for split in ("train", "val"):
        groups = members[split]
        selected |= set(random.Random(0).sample(groups, round(fraction * len(groups))))
    harness.write_labels(source, target, [row for row in rows if row["group"] in selected])


def main() -> None:
    """Prepares the subsets and trains the runs that are not finished."""
    arguments = harness.parse(__doc__, ["source"], source=Path, work=Path("runs/small_sets"), jobs=1)
    work, runs = arguments.work, {}
    for name, count in SUBSETS:
        subset = f"{name}{count or ''}"
        if not (work / "sets" / subset).exists():
            write_subset(arguments.source / name, work / "sets" / subset, count)
            options = [f"--source={work / 'sets' / subset}", f"--modality={name}", f"--data_dir={work / 'data'}"]
            prepare = ["lungjax.prepare", f"--dataset=folder/{subset}", *options]
            harness.run_commands({work / "logs" / f"prepare-{subset}.log": prepare}, 1)
        for seed in range(SEEDS):
            for setting, (experiment, *overrides) in SETTINGS.items():
                workdir = work / "runs" / subset / f"{setting}-{seed}"
                dataset = f"{',' if ':' in experiment else ':'}dataset=folder/{subset}"
                options = [*overrides, f"--set=train.seed={seed}", f"--data_dir={work / 'data'}"]
                command = ["lungjax.main", f"--experiment={experiment}{dataset}", f"--workdir={workdir}", *options]
                if not (workdir / "report.md").exists():
                    runs[work / "logs" / f"{subset}-{setting}-{seed}.log"] = command
    harness.run_commands(runs, arguments.jobs)


if __name__ == "__main__":
    main()
