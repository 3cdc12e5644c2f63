"""The test of an ensemble of runs, whose calibrated probabilities are averaged.

python -m lungjax.main --mode=evaluate --model=RUN_A,RUN_B --workdir=OUT [--dataset=OTHER --label_map=...]
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lungjax import datasets
from lungjax.config import Config, overrides
from lungjax.data import pipeline
from lungjax.data.labels import indicators
from lungjax.evaluation import ensemble
from lungjax.report import write as reporting
from lungjax.report.templating import listed
from lungjax.runtime import distributed, provenance
from lungjax.training import external_test, setup
from lungjax.training import workdir as workdirs

SPLITS = ("test", "val", "no_lungs", "source_only")


def evaluate(config: Config, runs: Sequence[Path], workdir: Path, data_dir: Path, *other: Any) -> Path:
    """Writes a report on the mean of the predictions of finished runs into `workdir`; returns the path of report.md.

    `config` is that of the first run, possibly with other fields of `eval`. `other` are the arguments of
    `external_test.evaluate` from `dataset` on, to test each run, and then their mean, on another data set, with the
    report in WORKDIR/external/NAME. Thresholds are chosen on val if it is the same for all runs; otherwise there are
    none. Raises ValueError for runs that are not finished or were tested on different images, or if `workdir` is or
    contains one of them, and as `external_test.evaluate` does.
    """
    started = time.time()
    for run in runs:
        if workdir.resolve() in (run.resolve(), *run.resolve().parents):
            raise ValueError(f"--workdir={workdir} has the run {run}; choose a new folder for the ensemble")
        if not (run / "report.json").exists():
            raise ValueError(f"{run}: no report.json, so it is not a finished run")
    configs, folders = [overrides.read(run / "config.json") for run in runs], list(runs)
    if other:
        tests = zip(configs, runs, strict=True)
        folders = [external_test.evaluate(each, run, data_dir, *other).parent for each, run in tests]
        workdir = workdir / "external" / folders[0].name
    means = {split: ensemble.average(folders, split) for split in SPLITS}
    results = {split: mean for split, mean in means.items() if mean is not None}
    if "test" not in results:
        advice = "test the ensemble on another data set with --dataset"
        raise ValueError(f"the test images or classes of {listed([str(run) for run in runs])} differ; {advice}")
    notes = [] if "val" in results else ["No operating points: the members were not validated on the same images."]
    reports = [json.loads((folder / "report.json").read_text("utf-8"))["facts"] for folder in folders]
    external = {}
    if other:
        trained_on = listed([*dict.fromkeys(facts["external"]["trained_on"] for facts in reports)])
        external = {"external": reports[0]["external"] | {"trained_on": trained_on}}
        notes += dict.fromkeys(note for facts in reports for note in facts["notes"])
    data = datasets.open_dataset(other[0], data_dir) if other else setup.open_data(config, data_dir)
    test, reader = results["test"], pipeline.Reader(data, config.input)
    rows = {name: row for row, name in enumerate(data.columns["file"].tolist())}
    counts = indicators(test.labels, len(test.classes)).sum(axis=0).tolist()
    facts = {
        **workdirs.data_facts(data),
        **provenance.facts(),
        **external,
        "classes": list(test.classes),
        "counts": {"test": dict(zip(test.classes, counts, strict=True))},
        "parameters": sum(facts["parameters"] for facts in reports),
        "seconds": round(time.time() - started, 1),
        "notes": [
            f"Mean calibrated probabilities of {listed([str(run) for run in runs])}. The configuration is that of the "
            "first.",
            *notes,
        ],
    }
    networks = listed([*dict.fromkeys(each.model.name for each in configs)])
    named = replace(config, name=f"{config.name}, ensemble of {len(runs)}", model=replace(config.model, name=networks))

    def write() -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        reporting.write_report(
            workdir, named, results, [], facts, lambda i: reader(rows[str(test.ids[i])]),
            **datasets.describe(data, data_dir), temperature=None,
        )  # fmt: skip

    distributed.on_first_host(write)
    return workdir / "report.md"
