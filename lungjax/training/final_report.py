"""The last phase of a run: writes report, plots and model.json from the predictions of the best weights."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from lungjax import datasets
from lungjax.config import metadata
from lungjax.data import pipeline
from lungjax.evaluation import baselines
from lungjax.evaluation.predictions import Predictions
from lungjax.explain import saliency
from lungjax.models import trees
from lungjax.models.outputs import positive_class
from lungjax.report import model_json
from lungjax.report import write as reporting
from lungjax.runtime import distributed, files, provenance
from lungjax.training import metrics_log
from lungjax.training import workdir as workdirs
from lungjax.training.setup import Run


def write(
    run: Run, results: dict[str, Predictions], variables: dict[str, Any], facts: dict[str, Any], data_dir: Path
) -> Path:
    """Writes predictions, reports, plots and model.json on the first host; returns the path of report.md.

    `results` are predictions by split, `variables` the tested weights; `facts` are added to those of `describe`.
    """
    facts, explain = describe(run) | facts, explainer(run, variables)
    description = datasets.describe(run.data, data_dir)

    def write_files() -> None:
        reader, rows = pipeline.Reader(run.data, run.config.input), run.data.rows("test")
        history = metrics_log.read(run.workdir / "metrics.jsonl")
        detector = model_json.fit_novelty(run.data)
        rates = {} if detector is None else {"novelty": detector.rates}
        report = reporting.write_report(
            run.workdir, run.config, results, history, facts | rates, lambda i: reader(rows[i]), explain, **description
        )
        model = model_json.describe(run.config, run.data, results, report, detector, description)
        files.atomic_write(run.workdir / metadata.FILE, model.to_json())
        for warning in baselines.warnings(report):
            distributed.print_once(warning)
        if run.config.train.tensorboard:
            from lungjax.training import event_files  # needs an extra

            event_files.write(run.workdir)

    distributed.on_first_host(write_files)
    return run.workdir / "report.md"


def describe(run: Run) -> dict[str, Any]:
    """Returns the facts about machine, software, data and network for the report."""
    data = run.data
    labels = {split: data.columns["label"][data.rows(split)] for split in ("train", "val", "test")}
    return {
        **workdirs.data_facts(data),
        "counts": {
            split: dict(zip(data.classes, np.bincount(n, minlength=len(data.classes)).tolist(), strict=True))
            for split, n in labels.items()
        },
        "parameters": sum(x.size for x in trees.flatten(run.program.abstract_state.params).values()),
        "steps": run.program.steps,
        "compute_type": str(np.dtype(run.program.module.dtype)),
        **provenance.facts(),
    }


def explainer(run: Run, variables: dict[str, Any]) -> reporting.Explain | None:
    """Returns a function that computes Grad-CAM heat maps, or None if no device has all parameters."""
    if run.config.train.shard_params and run.program.mesh.size > 1:
        return None
    local = jax.tree.map(lambda leaf: leaf.addressable_data(0), variables)
    positive = positive_class(run.config, run.data.classes)
    explain = saliency.Explainer(run.program.module, local, run.config.input, positive, run.config.eval.batch_size)
    return lambda images, targets: explain.maps(images, targets)[0]
