"""Trains networks on two real data sets and prints tables of their test scores; finished runs are skipped.

    python -m tests.benchmarks.generalization --source=DIR [--work=FOLDER] [--sets=ct,xray] [--networks=NAME,...]
        [--parts=ordinary,...] [--jobs=2] [--seeds=3]

DIR contains folders `ct` and `xray` with a labels.csv (path, label, split, group). The parts are:

    ordinary    the splits of labels.csv
    ema         the same with optim.ema

Runs are in FOLDER/runs/PART/SET/NETWORK-SEED, and their output is in FOLDER/logs. Two runs on one core each finish
sooner than one after the other on two cores. An interrupted command continues where it stopped.
"""

from pathlib import Path

from tests.benchmarks import harness

SOURCES = "--source_pattern=^(sarscov2|mosmed|ucsd|nor|seg20)_"
PREPARE = {"ct": ["--modality=ct", SOURCES], "xray": ["--modality=xray"]}  # xray has a column of sources
# EfficientNet-Lite0's validation score peaks early from ImageNet weights; random weights need more epochs. Cosine decay
# ends at the last epoch, so training stops early only where the score has peaked. Flips are those of the reference.
RANDOM = ["--set=train.epochs=24", "--set=train.patience=8", "--set=augment.flip_horizontal=0.5"]
IMAGENET = ["--set=train.epochs=12", "--set=train.patience=4", "--set=augment.flip_horizontal=0.5"]
NETWORKS = {
    "lite0_imagenet": ["weights=imagenet", *IMAGENET],
    "lite0_random": ["weights=none", *RANDOM],
    "cbr_small": ["model=cbr_small,weights=none", *RANDOM],
    # It has no norm, so it needs a centered input.
    "simple": ["model=simple,weights=none", "--set=input.mean=0.5", "--set=input.std=0.25", *RANDOM],
}
# The average covers the last (10 + step) / 9 steps until step 8,990, so that 0.999 also suits runs of 1,000 steps.
PARTS = {"ordinary": [], "ema": ["--set=optim.ema=0.999"]}


def main() -> None:
    """Prepares the data sets, trains the runs that are not finished, and prints the tables."""
    names = {"sets": list(PREPARE), "networks": list(NETWORKS), "parts": list(PARTS)}
    arguments = harness.parse(
        __doc__, ["source"], source=Path, work=Path("runs/generalization"), jobs=2, seeds=3, **names
    )
    work, data, runs = arguments.work, f"--data_dir={arguments.work / 'data'}", {}
    for name in arguments.sets:
        if not (work / "data/folder" / name).exists():
            options = [f"--dataset=folder/{name}", f"--source={arguments.source / name}", data, *PREPARE[name]]
            harness.run_commands({work / "logs" / f"prepare-{name}.log": ["lungjax.prepare", *options]}, 1)
    # Seeds outside, so that an interrupted command has complete rows.
    for part in arguments.parts:
        for seed in range(arguments.seeds):
            for name in arguments.sets:
                for network in arguments.networks:
                    experiment, *options = [*NETWORKS[network], *PARTS[part]]
                    folder = work / "runs" / part / name / f"{network}-{seed}"
                    command = ["lungjax.main", f"--experiment=finetune:dataset=folder/{name},size=224,{experiment}"]
                    command += [*options, f"--set=train.seed={seed}", data, f"--workdir={folder}"]
                    if not (folder / "report.md").exists():
                        runs[work / "logs" / f"{part}-{name}-{network}-{seed}.log"] = command
    harness.run_commands(runs, arguments.jobs)


if __name__ == "__main__":
    main()
