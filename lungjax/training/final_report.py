"""The last phase of a run: writes report, plots and model.json from the predictions of the best weights."""

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lungjax import datasets
from lungjax.config import metadata
from lungjax.data import pipeline, summary
from lungjax.evaluation import baselines, calibration, operating_points
from lungjax.evaluation.predictions import Predictions, with_rule
from lungjax.explain import figures, saliency
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

    `results` are uncalibrated predictions, `variables` the tested weights; `facts` are added to those of `describe`.
    """
    explain, heat_maps = explainer(run, variables)
    facts = describe(run) | heat_maps | facts
    description = datasets.describe(run.data, data_dir)

    def write_files() -> None:
        reader, rows = pipeline.Reader(run.data, run.config.input), run.data.rows("test")
        history = metrics_log.read(run.workdir / "metrics.jsonl")
        temperature = calibration.fit_temperature(results["val"])
        calibrated = {
            name: p if p.logits is None else calibration.apply_temperature(p, temperature)
            for name, p in results.items()
        }
        choice = {}
        if run.config.eval.aggregate.startswith("auto"):
            rule, choice["aggregates"] = operating_points.choose_aggregate(calibrated["val"], run.config.eval)
            calibrated = {name: with_rule(p, rule) for name, p in calibrated.items()}
        lengths = [row for row in history if "steps" in row]
        notes = [
            f"The run was changed from {before['steps']} to {row['steps']} steps at step {row['step']}; from there on, "
            "the learning rate is that of a run of this length."
            for before, row in itertools.pairwise(lengths)
        ]
        detector = model_json.fit_novelty(run.data)
        more = {"notes": notes} | choice | ({} if detector is None else {"novelty": detector.rates})
        report = reporting.write_report(
            run.workdir, run.config, calibrated, history, facts | more, lambda i: reader(rows[i]), explain,
            **description, temperature=temperature,
        )  # fmt: skip
        model = model_json.describe(run.config, run.data, report, detector, description)
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
    return {
        **workdirs.data_facts(run.data),
        "counts": {split: counts["images"] for split, counts in summary.split_counts(run.data).items()},
        "characteristics": summary.characteristics(run.data),
        "parameters": sum(x.size for x in trees.flatten(run.program.abstract_state.params).values()),
        "steps": run.program.steps,
        "compute_type": str(np.dtype(run.program.module.dtype)),
        **provenance.facts(),
    }


def explainer(run: Run, variables: dict[str, Any]) -> tuple[reporting.Explain | None, dict[str, str]]:
    """Returns a function that computes heat maps and the fact `heat_maps`; neither if no device has all parameters."""
    if run.config.train.shard_params and run.program.mesh.size > 1:
        return None, {}
    local = jax.tree.map(lambda leaf: leaf.addressable_data(0), variables)
    positive = positive_class(run.config, run.data.classes)
    options = run.config.eval
    explain = saliency.Explainer(
        run.program.module, local, run.config.input, positive, options.batch_size, tta=options.tta
    )

    def heats(images: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.stack([figures.visible(heat, explain.methods[0]) for heat in explain.maps(images, targets)[0]])

    return heats, {"heat_maps": explain.describe()}
