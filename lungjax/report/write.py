"""Writes the report of a run: report.json for programs, report.html and report.md for people, predictions and figures.

`report.json`, version 1. Adding a key does not change the version; removing a key or changing its meaning does.

    version             1
    name                of the experiment
    classes             [names] in label order, as in rows and columns of every `confusion`
    unit                name of an example: "slice" for CT slices, else "image"
    best                step of the tested weights, monitor (the validation metric that chose it, unless
                        train.keep is "last"), score (before calibration, as in metrics.jsonl; None if not logged)
    warnings            [sentences], caveats about the numbers
    facts               data, network, machine and time: dataset, fingerprint, counts, parameters, steps, best_step,
                        seconds, compute_type, devices, device_kind, hosts, python, versions, commit (of git, "" if
                        unknown), code (digest of lungjax's files); novelty, the rates of false alarms and
                        detections (`lungjax.evaluation.novelty.fit`); heat_maps, method and feature map of
                        mistakes.png; notes, which come first in `warnings`; folds
                        (`lungjax.training.cross_validation`); external (`lungjax.training.external_test`)
    test, val           the splits, each:
      .slice            level over all examples
      .patient          level over patients (mean probability over a patient's slices), and
        .mixed_groups   patients excluded because their slices have different labels
      .by_source.NAME   level over the examples from a source; {} if the sources are unknown
    controls            shortcut baselines (`lungjax.evaluation.baselines`), each a level over test slices: no_lungs,
                        the network with the lungs blacked out, if prepared; source_only, the source of an image alone,
                        if train has several sources, with gain: difference, low and high of the network's auc_macro
                        minus this one (`bootstrap.paired_difference`)
    calibration         with a val split: temperature (null for folds, which have their own), fitted_on ("val");
                        uncalibrated and calibrated scores of the test split, each with ece, brier, loss, and bins of
                        the reliability diagram: low, high, n, confidence, accuracy (`lungjax.evaluation.calibration`)
    operating_points    with a val split: LEVEL.CLASS.RULE with LEVEL slice or, if patients have several slices,
                        patient, and RULE youden or sensitivity_X: the threshold chosen on val, as in model.json; of
                        the test split sensitivity, specificity, ppv, npv, tp, fp, fn, tn, intervals, and ppv_at and
                        npv_at at the prevalence at_prevalence, null for a class without one
                        (`lungjax.evaluation.operating_points`); {} for a class that val lacks
    mistakes            the worst of the test split: id, true and predicted class, probability of the latter

All probabilities, thresholds and metrics are those of calibrated probabilities, as in predictions_SPLIT.csv and in
prediction, except `study` and `calibration.uncalibrated`. The studies do not calibrate, so `study` uses the logits, and
`lungjax.tables` compares published numbers with metrics of uncalibrated probabilities, also of loss and AUC.

A level; `lungjax.evaluation.metrics` defines the metrics, and when they are None:

    n, loss, ece, brier, accuracy, balanced_accuracy, auc_micro, average_precision_micro, precision_macro, recall_macro,
    specificity_macro, npv_macro, f1_macro, auc_macro, average_precision_macro, precision_weighted, recall_weighted,
    f1_weighted, auc_weighted, average_precision_weighted
    confusion           C lists of C counts, one row per true class
    per_class.CLASS     n, precision, recall, specificity, npv, f1, auc, average_precision
    study               f1_weighted, auc_micro_logits, f1_macro_harmonic, accuracy_rounded: as the studies define them
    intervals           NAME: [low, high], such as per_class.CLASS.recall: 95 % by bootstrap over patients
                        (`lungjax.evaluation.bootstrap`), if defined; levels by source have none if there are over 30

Validation rows of metrics.jsonl have the same names under "val.slice." and "val.patient.", before calibration.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.config import Config
from lungjax.evaluation import baselines, bootstrap, calibration, metrics, operating_points, predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.report import context, plots
from lungjax.report.templating import count, listed, render
from lungjax.runtime.files import atomic_write

VERSION = 1
MIN_EXAMPLES = 20  # of a class, below which its rates are unreliable
MIN_PATIENTS = 10  # below which intervals are unreliable
MAX_SOURCES = 30  # up to which each source has intervals
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
    temperature: float | None = 1.0,
    points: operating_points.Points | None = None,
) -> dict[str, Any]:
    """Writes predictions_SPLIT.csv, plots/*.png, report.json, .html and .md; returns the content of report.json.

    Args:
      workdir: an existing folder. Files are written atomically, report.md last.
      config: configuration of the run.
      results: calibrated predictions of "test" and, if available, of "val" and the baselines of
        `lungjax.evaluation.baselines`.
      history: rows of metrics.jsonl.
      facts: JSON-ready, with any of the names in the module's docstring.
      read_image: returns the image of a row of `results["test"]`, uint8 [h, w, 1 or 3].
      explain: returns heat maps, float32 [B, h, w] in 0..1, for uint8 images [B, h, w, 1 or 3] and classes int [B];
        None omits mistakes.png.
      summary: summary.json of the prepared data.
      about: the fields of `datasets.About`.
      temperature: that of `results`, 1 if they are not calibrated; None if the folds have their own.
      points: the thresholds to evaluate; None chooses them on "val", if available.

    Raises ValueError if "test" is missing or empty, or if probabilities are invalid.
    """
    if "test" not in results or not len(results["test"]):
        raise ValueError("no test predictions: the report needs a test split with images")
    test = results["test"]
    wrong = plots.choose_examples(test, config.eval.examples)[1]
    key, step = f"val.{config.train.monitor}", facts.get("best_step")
    scores = [row[key] for row in history if row["step"] == step and key in row]
    report = {
        "version": VERSION,
        "name": config.name,
        "classes": list(test.classes),
        "unit": (summary or {}).get("unit", "image"),
        "best": {"step": step, "monitor": config.train.monitor, "score": scores[-1] if scores else None},
        "warnings": [],
        "facts": dict(facts),
        **{split: _levels(results[split], config) for split in ("test", "val") if split in results},
        "controls": {
            name: metrics.summarize(p) | {"intervals": bootstrap.intervals(p, config.eval.draws)}
            for name, p in results.items()
            if name in baselines.WARNING_AUC
        },
        "mistakes": [
            {
                "id": str(test.ids[row]),
                "true": test.classes[test.labels[row]],
                "predicted": test.classes[test.predicted[row]],
                "probability": float(test.probabilities[row].max()),
            }
            for row in wrong
        ],
    }
    if (source := results.get("source_only")) is not None:
        gain = bootstrap.paired_difference(source, test, ["auc_macro"], config.eval.draws)["auc_macro"]
        report["controls"]["source_only"]["gain"] = {k: getattr(gain, k) for k in ("difference", "low", "high")}
    if test.logits is not None and temperature != 1.0:
        report["calibration"] = calibration.summary(test, temperature)
    if points is None and len(results.get("val", ())):
        points = operating_points.choose_all(results["val"], test, config.eval)
    if points:
        report["operating_points"] = operating_points.evaluate(points, test, config.eval)
    caveats = warnings(config, results, history, report)
    report["warnings"] = [*facts.get("notes", ()), *caveats, *baselines.warnings(report)]
    for split, predicted in results.items():
        predictions.write(predicted, workdir / f"predictions_{split}.csv")
    figures = draw(workdir / "plots", config, test, history, report, read_image, explain)
    text = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False, default=lambda value: value.tolist())
    atomic_write(workdir / "report.json", text + "\n")
    page = context.build(config, report, figures, workdir / "plots", summary, about)
    atomic_write(workdir / "report.html", render("report.html.j2", **page))
    atomic_write(workdir / "report.md", render("report.md.j2", **page))
    return report


def _levels(p: Predictions, config: Config) -> dict[str, Any]:
    """Returns `metrics.report_levels` with `intervals` in each level."""
    levels, parts = metrics.report_levels(p), metrics.by_source(p)
    for unit in bootstrap.UNITS:
        levels[unit]["intervals"] = bootstrap.intervals(p, config.eval.draws, unit=unit)
    for name in parts if len(parts) <= MAX_SOURCES else ():
        levels["by_source"][name]["intervals"] = bootstrap.intervals(parts[name], config.eval.draws)
    return levels


def warnings(
    config: Config, results: Mapping[str, Predictions], history: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> Iterator[str]:
    """Yields caveats about the numbers of a report."""
    for split in ("test", "val") if "val" in report else ("test",):
        level, patient = report[split]["slice"], report[split]["patient"]
        counts = {name: values["n"] for name, values in level["per_class"].items()}
        absent = [name for name, n in counts.items() if not n]
        few = [f"{name} ({n})" for name, n in counts.items() if 0 < n < MIN_EXAMPLES]
        if absent:
            yield f"The {split} split has no examples of {listed(absent)}: means over classes ignore undefined metrics."
        if few:
            yield f"The {split} split has few examples of {listed(few)}: their rates are unreliable."
        if patient["mixed_groups"]:
            mixed = count(patient["mixed_groups"], "patient")
            yield f"The {split} scores per patient exclude {mixed} with images of several classes."
        never = [name for name, v in level["per_class"].items() if v["precision"] is None]
        if never:
            yield f"Never predicted on the {split} split: {listed(never)}. Their precision is undefined."
    p, level = results["test"], report["test"]["slice"]
    frequency = max(v["n"] for v in level["per_class"].values()) / level["n"]
    if level["accuracy"] <= frequency and len(p.classes) > 1:
        chance = f"always predicting the most frequent class ({frequency:.3f})"
        yield f"The test accuracy of {level['accuracy']:.3f} is no better than {chance}."
    if level["n"] > 1 and report["test"]["patient"]["n"] == level["n"]:
        yield "No two test images share a patient. If patients have several images, add a group column to the data set."
    if "val" in results:
        both = set(results["val"].groups) & set(p.groups) - {""}
        if both:
            shared = f"{count(len(both), 'patient')}, such as {min(both)}"
            yield f"The val and test splits share {shared}: model selection has seen these patients."
        yield from operating_points.missing_rules(results["val"])
    patients = len(np.unique(metrics.patient_keys(p)))
    if config.eval.draws and patients < MIN_PATIENTS:
        yield f"The test images come from {count(patients, 'patient')}: too few for reliable intervals."
    yield from _source_warnings(p, report["test"]["by_source"])
    scored = [row["step"] for row in history if f"val.{config.train.monitor}" in row]
    if config.train.keep == "best" and len(scored) > 1 and report["best"]["step"] == scored[-1]:
        length = config.train
        longer = f"steps={2 * length.steps}" if length.steps else f"epochs={2 * length.epochs:g}"
        command = f"rerun the command with --set=train.{longer} to continue"
        yield f"The last validation was the best: longer training may give better weights; {command}."


def _source_warnings(p: Predictions, by_source: Mapping[str, Any]) -> Iterator[str]:
    if len(by_source) < 2:
        return
    classes = {s: [c for c, v in level["per_class"].items() if v["n"]] for s, level in by_source.items()}
    single = [f"{source} ({names[0]})" for source, names in classes.items() if len(names) == 1]
    if single and len(p.classes) > 1:
        yield f"Sources with test examples of one class only: {listed(single)}. The network may recognize the source."
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
    for noun, level in context.distinct_levels(report["test"], report["unit"]).items():
        name = f"confusion_{'patient' if noun == 'patient' else 'slice'}.png"
        title = f"Confusion on the test split, {count(level['n'], noun)}"
        plots.confusion(level["confusion"], test.classes, folder / name, title)
        files.append(name)
    for kind in ("roc", "pr"):
        plots.curves(kind, test, folder / f"{kind}.png")
    kinds = {k: v["bins"] for k, v in report.get("calibration", {}).items() if isinstance(v, Mapping)}
    plots.reliability(kinds or {"uncalibrated": calibration.bins(test)}, folder / "reliability.png")
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
