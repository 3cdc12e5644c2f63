"""The output of a run: report.json for programs, report.html and report.md for people, predictions and figures.

`report.json`, version 1. A new key keeps the version; removing a key or changing its meaning raises it.

    version             1
    name                of the experiment
    classes             [names] in label order, as in rows and columns of every `confusion`
    best                step of the tested weights, monitor (the validation metric that chose it, unless
                        train.keep is "last"), score (None if not logged)
    warnings            [sentences], caveats about the numbers
    facts               about data, network, machine and time: dataset, fingerprint, counts, parameters, steps,
                        best_step, seconds, compute_type, devices, device_kind, hosts, python, versions, commit (of
                        git, "" if unknown), code (digest of lungjax's files); novelty, the false alarms on val and
                        test images (`lungjax.evaluation.novelty`); notes, sentences that come first among the
                        warnings; folds and external of `lungjax.training.cross_validation` and
                        `lungjax.training.external_test`
    test, val           the splits, each:
      .slice            a level over all examples
      .patient          a level over patients (mean probability over a patient's slices), and
        .mixed_groups   patients left out because their slices have different labels
      .by_source.NAME   a level over the examples of each source; no NAME if sources are unknown
    no_lungs            a level over the test slices in which lungs were found, with the lungs blacked out, if prepared
    controls            n, accuracy, balanced_accuracy, auc_macro, intervals of no_lungs, and of source_only, which
                        predicts from the source of a test image alone, if train has several sources (see
                        `lungjax.evaluation.baselines`)
    calibration         with a val split: temperature, fitted_on ("val"); test and test_scaled (by that temperature),
                        each with ece, brier, loss; bins and bins_scaled of the reliability diagram: low, high, n,
                        confidence, accuracy (see `lungjax.evaluation.calibration`)
    operating_points    with a val split: CLASS.RULE, RULE being youden or sensitivity_X, with the threshold chosen on
                        val, and of the test split: sensitivity, specificity, ppv, npv, ppv_at and npv_at at
                        at_prevalence, tp, fp, fn, tn, intervals (`lungjax.evaluation.operating_points`); missing
                        for a class that val lacks
    mistakes            the worst of the test split: id, true, predicted (class names), probability (of that class)

A level; definitions, and when a number is None, in `lungjax.evaluation.metrics`:

    n, loss, ece, brier, accuracy, balanced_accuracy,
    precision_macro, recall_macro, specificity_macro, npv_macro, f1_macro, auc_macro, average_precision_macro,
    precision_weighted, recall_weighted, f1_weighted, auc_weighted, average_precision_weighted,
    auc_micro, average_precision_micro,
    confusion           C lists of C counts, one row per true class
    per_class.CLASS     n, precision, recall, specificity, npv, f1, auc, average_precision
    study               f1_weighted, auc_micro_logits, f1_macro_harmonic, accuracy_rounded: as the studies define them
    intervals           NAME: [low, high], 95 %, bootstrap over patients (`lungjax.evaluation.bootstrap`), NAME being
                        accuracy, per_class.CLASS.recall or another; undefined ones are missing. By source only up to
                        30 sources

Validation rows of metrics.jsonl have the same names under "val.slice." and "val.patient."; `train.monitor` is one of
them without "val.".
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.config import Config
from lungjax.evaluation import baselines, bootstrap, calibration, metrics, operating_points, predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.report import context, plots, render
from lungjax.runtime.files import atomic_write

VERSION = 1
MIN_EXAMPLES = 20  # of a class, below which its rates are unreliable
MIN_PATIENTS = 10  # below which intervals are unreliable
MAX_SOURCES = 30  # up to which each source has intervals
CONTROL_METRICS = ("n", "accuracy", "balanced_accuracy", "auc_macro")
Explain = Callable[[np.ndarray, np.ndarray], np.ndarray]  # see write_report


def write_report(
    workdir: Path,
    config: Config,
    results: Mapping[str, Predictions],
    history: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    read_image: Callable[[int], np.ndarray],
    explain: Explain | None = None,
    summary: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes predictions_SPLIT.csv, plots/*.png, report.json, .html and .md; returns the content of report.json.

    Args:
      workdir: an existing folder. Files are written atomically, report.md last.
      config: of the run.
      results: predictions of "test", of "val" if any, and of "no_lungs", the test split with the lungs blacked out, if
        prepared.
      history: rows of metrics.jsonl.
      facts: JSON-ready; the names are in the module's docstring. Any may be missing.
      read_image: returns the image of a row of `results["test"]`, uint8 [h, w, 1 or 3].
      explain: returns heat maps, float32 [B, h, w] in 0..1, for uint8 images [B, h, w, 1 or 3] and classes int [B];
        None omits mistakes.png.
      summary: summary.json of the prepared data.
      about: the fields of `datasets.About`.

    Raises ValueError if "test" is missing or empty, or for invalid probabilities (see `metrics`).
    """
    if "test" not in results or not len(results["test"]):
        raise ValueError("no predictions of the test split: the report needs a test split with images")
    report = assemble(config, results, history, facts)
    for split, predicted in results.items():
        predictions.write(predicted, workdir / f"predictions_{split}.csv")
    figures = draw(workdir / "plots", config, results["test"], history, report, read_image, explain)
    text = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False, default=_plain_number)
    atomic_write(workdir / "report.json", text + "\n")
    page = context.build(config, report, figures, workdir / "plots", summary, about)
    atomic_write(workdir / "report.html", render.render("report.html.j2", **page))
    atomic_write(workdir / "report.md", render.render("report.md.j2", **page))
    return report


def assemble(
    config: Config,
    results: Mapping[str, Predictions],
    history: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the content of report.json; arguments as in `write_report`."""
    splits = {split: _levels(results[split], config) for split in ("test", "val") if split in results}
    key, step = f"val.{config.train.monitor}", facts.get("best_step")
    scores = [row[key] for row in history if row["step"] == step and key in row]
    report = {
        "version": VERSION,
        "name": config.name,
        "classes": list(results["test"].classes),
        "best": {"step": step, "monitor": config.train.monitor, "score": scores[-1] if scores else None},
        "warnings": [],
        "facts": dict(facts),
        **splits,
    }
    controls = {name: _slice_level(results[name], config) for name in baselines.WARNING_AUC if name in results}
    if "no_lungs" in controls:
        report["no_lungs"] = controls["no_lungs"]
    report["mistakes"] = _mistakes(results["test"], config.eval.examples)
    report["controls"] = {
        name: {key: level[key] for key in CONTROL_METRICS}
        | {"intervals": {key: ends for key, ends in level["intervals"].items() if key in CONTROL_METRICS}}
        for name, level in controls.items()
    }
    if len(results.get("val", ())):
        report["calibration"] = calibration.summary(results["val"], results["test"])
        report["operating_points"] = operating_points.points(
            results["val"], results["test"], config.eval.sensitivity, config.eval.prevalence, config.eval.draws
        )
    caveats = warnings(config, results, splits, history, step)
    report["warnings"] = [*facts.get("notes", ()), *caveats, *baselines.warnings(report)]
    return report


def _levels(p: Predictions, config: Config) -> dict[str, Any]:
    """Returns `metrics.report_levels` with `intervals` in each level."""
    levels = metrics.report_levels(p)
    for unit in bootstrap.UNITS:
        levels[unit]["intervals"] = _intervals(p, config, unit)
    if len(levels["by_source"]) <= MAX_SOURCES:
        sources = np.where(p.sources == "", "unknown", p.sources)
        for name, level in levels["by_source"].items():
            level["intervals"] = _intervals(predictions.take(p, np.flatnonzero(sources == name)), config)
    return levels


def _slice_level(p: Predictions, config: Config) -> dict[str, Any]:
    level = metrics.summarize(p)
    return level | {"intervals": _intervals(p, config)}


def _intervals(p: Predictions, config: Config, unit: str = "slice") -> dict[str, list[float]]:
    return {name: list(ends) for name, ends in bootstrap.intervals(p, config.eval.draws, unit=unit).items()}


def _mistakes(test: Predictions, count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": str(test.ids[row]),
            "true": test.classes[test.labels[row]],
            "predicted": test.classes[test.predicted[row]],
            "probability": float(test.probabilities[row, test.predicted[row]]),
        }
        for row in plots.choose_examples(test, count)[1]
    ]


def warnings(
    config: Config,
    results: Mapping[str, Predictions],
    splits: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    best_step: int | None,
) -> Iterator[str]:
    """Yields caveats about the numbers of `splits`, one sentence each."""
    for split, levels in splits.items():
        level, patient = levels["slice"], levels["patient"]
        counts = {name: values["n"] for name, values in level["per_class"].items()}
        absent = [name for name, n in counts.items() if not n]
        few = [f"{name} ({n})" for name, n in counts.items() if 0 < n < MIN_EXAMPLES]
        if absent:
            yield f"The {split} split has no examples of {render.listed(absent)}: means skip undefined numbers."
        if few:
            yield f"The {split} split has few examples of {render.listed(few)}: their rates are unreliable."
        if patient["mixed_groups"]:
            mixed = render.count(patient["mixed_groups"], "patient")
            yield f"The {split} numbers per patient exclude {mixed} with slices of several classes."
        never = [name for name, v in level["per_class"].items() if v["precision"] is None]
        if never:
            yield f"Never predicted on the {split} split: {render.listed(never)}. The precision is undefined."
    p, level = results["test"], splits["test"]["slice"]
    frequency = max(v["n"] for v in level["per_class"].values()) / level["n"]
    if level["accuracy"] <= frequency and len(p.classes) > 1:
        yield (
            f"The test accuracy of {level['accuracy']:.3f} is no better than always predicting the most frequent "
            f"class ({frequency:.3f})."
        )
    if level["n"] > 1 and splits["test"]["patient"]["n"] == level["n"]:
        yield (
            "No two test images share a patient, so the numbers per patient equal those per slice. If patients have "
            "several images, add a group column to the data set."
        )
    if "val" in results:
        both = set(results["val"].groups) & set(p.groups) - {""}
        if both:
            yield (
                f"The val and test splits share {render.count(len(both), 'patient')}, such as {min(both)}: model "
                "selection has seen these patients."
            )
        yield from operating_points.missing_rules(results["val"])
    patients = len(np.unique(metrics.patient_keys(p)))
    if config.eval.draws and patients < MIN_PATIENTS:
        yield (
            f"The test images come from {render.count(patients, 'patient')}: intervals from so few are too narrow, and "
            "undefined for one."
        )
    yield from _source_warnings(p, splits["test"]["by_source"])
    scored = [row["step"] for row in history if f"val.{config.train.monitor}" in row]
    if config.train.keep == "best" and len(scored) > 1 and best_step == scored[-1]:
        yield "The last validation was the best: longer training may give better weights."


def _source_warnings(p: Predictions, by_source: Mapping[str, Any]) -> Iterator[str]:
    if len(by_source) < 2:
        return
    classes = {s: [c for c, v in level["per_class"].items() if v["n"]] for s, level in by_source.items()}
    single = [f"{source} ({names[0]})" for source, names in classes.items() if len(names) == 1]
    if single and len(p.classes) > 1:
        yield (
            f"Sources with test examples of one class only: {render.listed(single)}. The network may recognize the "
            "source instead of the finding."
        )
    for name in p.classes:
        sources = [source for source, names in classes.items() if name in names]
        if len(sources) == 1:
            yield f"All test examples of {name} come from one source, {sources[0]}."


def draw(
    folder: Path,
    config: Config,
    test: Predictions,
    history: Sequence[Mapping[str, Any]],
    report: Mapping[str, Any],
    read_image: Callable[[int], np.ndarray],
    explain: Explain | None = None,
) -> list[str]:
    """Draws every figure into `folder`; returns the file names in the order of the report."""
    files = []
    for unit, level in context.distinct_levels(report["test"]).items():
        name, title = f"confusion_{unit}.png", f"Confusion on the test split, {render.count(level['n'], unit)}"
        plots.confusion(level["confusion"], test.classes, folder / name, title)
        files.append(name)
    plots.roc_curves(test.labels, test.probabilities, test.classes, folder / "roc.png")
    plots.pr_curves(test.labels, test.probabilities, test.classes, folder / "pr.png")
    scaled = report.get("calibration", {}).get("bins_scaled")
    plots.reliability(calibration.bins(test), scaled, folder / "reliability.png")
    plots.decision_curves(test, folder / "decision_curve.png")
    files += ["roc.png", "pr.png", "reliability.png", "decision_curve.png"]
    if config.eval.examples:
        plots.example_sheet(test, read_image, config.eval.examples, folder / "examples.png")
        files.append("examples.png")
    wrong = plots.choose_examples(test, config.eval.examples)[1]
    (folder / "mistakes.png").unlink(missing_ok=True)  # from an earlier report
    if wrong and explain is not None:
        images = np.stack([read_image(row) for row in wrong])
        heats = explain(images, test.predicted[wrong])
        plots.mistakes(test, wrong, images, heats, folder / "mistakes.png")
        files.append("mistakes.png")
    if history:  # empty for several runs, or for a run on another data set
        best_step = report["best"]["step"] if config.train.keep == "best" else None
        plots.training_curves(history, folder / "training.png", config.train.monitor, best_step)
        files.append("training.png")
    return files


def _plain_number(value: Any) -> Any:
    """Converts numpy numbers and arrays, and paths, for JSON."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value)
