"""What a run leaves behind: report.json for programs, report.html and report.md for people, predictions, pictures.

`report.json`, version 1. A new key keeps the version; one that goes or changes meaning raises it.

    version             1
    name                of the experiment
    classes             [names] in label order, as in rows and columns of every `confusion`
    best                step of the weights that were tested, monitor (the validation metric that chose it, unless
                        train.keep is "last"), score (None if not logged)
    warnings            [sentences], what to know before believing the numbers
    facts               what the caller knows of data, network, machine and time: dataset, fingerprint,
                        counts, parameters, steps, best_step, seconds, compute_type, devices, device_kind,
                        hosts, python, versions, commit (of git, "" if unknown), code (digest of lungjax's files);
                        familiarity, of what share of val and test images it is wrongly said that they are unlike the
                        training images (`lungjax.evaluation.novelty`);
                        notes, sentences that come first among the warnings; folds and external of the commands
                        of these names (`lungjax.training.cross_validation`, `lungjax.training.external_test`)
    test, val           the splits, each:
      .slice            a level over all examples
      .patient          a level over patients (mean probability over a patient's slices), and
        .mixed_groups   patients left out because their slices have different labels
      .by_source.NAME   a level over the examples of each source; no NAME if no source is known
    no_lungs             a level over the test slices in which lungs are found, blacked out; where prepared
    controls            n, accuracy, balanced_accuracy, auc_macro, intervals of no_lungs, and of source_only: what the
                        source of a test image alone tells of its class, where train has several (see
                        `lungjax.evaluation.baselines`)
    calibration         where there is a val split: temperature, fitted_on ("val"); test and test_scaled, by that
                        temperature, with ece, brier, loss each; bins and bins_scaled of the reliability diagram: low,
                        high, n, confidence, accuracy (see `lungjax.evaluation.calibration`)
    operating_points    where there is a val split: CLASS.RULE, RULE being youden or sensitivity_X, with threshold,
                        chosen on val, and of the test split: sensitivity, specificity, ppv, npv, ppv_at and npv_at at
                        at_prevalence, tp, fp, fn, tn, intervals (`lungjax.evaluation.operating_points`); none
                        for a class that val lacks
    mistakes            the worst of the test split: id, true, predicted (class names), probability (of that class)

A level, with the definitions and what None means in `lungjax.evaluation.metrics`:

    n, loss, ece, brier, accuracy, balanced_accuracy,
    precision_macro, recall_macro, specificity_macro, npv_macro, f1_macro, auc_macro, average_precision_macro,
    precision_weighted, recall_weighted, f1_weighted, auc_weighted, average_precision_weighted,
    auc_micro, average_precision_micro,
    confusion           C lists of C counts, a row a true class
    per_class.CLASS     n, precision, recall, specificity, npv, f1, auc, average_precision
    study               f1_weighted, auc_micro_logits, f1_macro_harmonic, accuracy_rounded: as the studies define them
    intervals           NAME: [low, high], 95 % by bootstrap over patients (`lungjax.evaluation.bootstrap`), NAME being
                        such as accuracy or per_class.CLASS.recall; without what has none. By source only up to 30
                        sources

So `lookup(report, "test.slice.auc_macro")`, "test.patient.accuracy", "test.by_source.mosmed.confusion".
Validation rows of metrics.jsonl have the same names under "val.slice." and "val.patient.", and
`train.monitor` is one of them without "val.".
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.config import Config, nearest
from lungjax.evaluation import baselines, bootstrap, calibration, metrics, operating_points, predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.report import markdown, page, plots, plots_decisions
from lungjax.runtime.files import atomic_write

VERSION = 1
FEW = 20  # examples of a class below which its rates are warned about
FEW_PATIENTS = 10  # below which intervals are warned about
SOURCES = 30  # up to which each has intervals
CONTROL = ("n", "accuracy", "balanced_accuracy", "auc_macro")  # of a level, what is kept of a control
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
    """Writes predictions_SPLIT.csv, plots/*.png, report.json, .html and .md; returns what report.json holds.

    Args:
      workdir: exists. Each file appears whole or not at all, report.md last.
      config: of the run; says the monitor and how many example images to draw.
      results: predictions of "test", of "val" where there are any, and of "no_lungs", the test split with its lungs
        blacked out, where that is prepared.
      history: rows of metrics.jsonl.
      facts: JSON-ready; see the module's docstring for the known names. Any may be missing.
      read_image: gives the uint8 [h, w, 1 or 3] image of a row of `results["test"]`.
      explain: gives the heat maps, float32 [B, h, w] of 0..1, of uint8 images [B, h, w, 1 or 3], all of one size, for
        the classes int [B]; None leaves mistakes.png out.
      summary: summary.json of the prepared data, and
      about: what is known of the data set (the fields of `datasets.About`), for report.html.

    Raises ValueError if "test" is missing or empty, or for probabilities that are none (see `metrics`).
    """
    if "test" not in results or not len(results["test"]):
        raise ValueError("there are no predictions of the test split, so nothing to report")
    report = assemble(config, results, history, facts)
    for split, predicted in results.items():
        predictions.write(predicted, workdir / f"predictions_{split}.csv")
    drawn = draw(workdir / "plots", config, results["test"], history, report, read_image, explain)
    text = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False, default=_plain_number)
    atomic_write(workdir / "report.json", text + "\n")
    atomic_write(workdir / "report.html", page.page(config, report, drawn, workdir / "plots", summary, about))
    atomic_write(workdir / "report.md", markdown.markdown(config, report, drawn))
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
    levels = {name: _slice_level(results[name], config) for name in baselines.TELLING if name in results}
    if "no_lungs" in levels:
        report["no_lungs"] = levels["no_lungs"]
    report["mistakes"] = _mistakes(results["test"], config.eval.examples)
    report["controls"] = {
        name: {key: level[key] for key in CONTROL}
        | {"intervals": {key: ends for key, ends in level["intervals"].items() if key in CONTROL}}
        for name, level in levels.items()
    }
    if len(results.get("val", ())):
        chosen = config.eval
        report["calibration"] = calibration.summary(results["val"], results["test"])
        report["operating_points"] = operating_points.points(
            results["val"], results["test"], chosen.sensitivity, chosen.prevalence, chosen.draws
        )
    told = warnings(config, results, splits, history, step)
    report["warnings"] = [*facts.get("notes", ()), *told, *baselines.warnings(report)]
    return report


def _levels(p: Predictions, config: Config) -> dict[str, Any]:
    """Returns `metrics.report_levels` with `intervals` in each level."""
    levels = metrics.report_levels(p)
    for unit in bootstrap.UNITS:
        levels[unit]["intervals"] = _intervals(p, config, unit)
    if len(levels["by_source"]) <= SOURCES:
        sources = np.where(p.sources == "", "unknown", p.sources)
        for name, level in levels["by_source"].items():
            level["intervals"] = _intervals(bootstrap.take(p, np.flatnonzero(sources == name)), config)
    return levels


def _slice_level(p: Predictions, config: Config) -> dict[str, Any]:
    level = metrics.summarize(p.labels, p.probabilities, p.classes, p.ids, p.logits)
    return level | {"intervals": _intervals(p, config)}


def _intervals(p: Predictions, config: Config, unit: str = "slice") -> dict[str, list[float]]:
    return {name: list(ends) for name, ends in bootstrap.intervals(p, config.eval.draws, unit=unit).items()}


def _mistakes(test: Predictions, most: int) -> list[dict[str, Any]]:
    said = test.predicted
    return [
        {
            "id": str(test.ids[row]),
            "true": test.classes[test.labels[row]],
            "predicted": test.classes[said[row]],
            "probability": float(test.probabilities[row, said[row]]),
        }
        for row in plots.choose_examples(test, most)[1]
    ]


def lookup(report: Mapping[str, Any], name: str) -> Any:
    """Returns what `report` (a dict as in report.json, or a part of it) holds under a dotted name.

    Names may have dots of their own, as in "test.by_source.radiopaedia.org.accuracy". Raises ValueError with
    the nearest names if there is nothing.
    """
    found = list(_find(report, name))
    if not found:
        raise ValueError(f"no {name!r} in the report; {nearest(name, _names(report))}")
    return found[0]


def _find(tree: Any, name: str) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key == name:
                yield value
            elif name.startswith(f"{key}."):
                yield from _find(value, name[len(key) + 1 :])


def _names(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in tree.items():
        names += _names(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return names


def warnings(
    config: Config,
    results: Mapping[str, Predictions],
    splits: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    best_step: int | None,
) -> Iterator[str]:
    """Yields, as sentences, what a reader should know before believing the numbers of `splits`."""
    for split, levels in splits.items():
        level, patient = levels["slice"], levels["patient"]
        counts = {name: values["n"] for name, values in level["per_class"].items()}
        absent = [name for name, n in counts.items() if not n]
        few = [f"{name} ({n})" for name, n in counts.items() if 0 < n < FEW]
        if absent:
            named = markdown.listed(absent)
            yield f"The {split} split has no example of {named}: means leave out what is undefined."
        if few:
            yield f"The {split} split has few examples of {markdown.listed(few)}: the rates there are rough."
        if patient["mixed_groups"]:
            mixed = markdown.count(patient["mixed_groups"], "patient")
            yield f"The {split} numbers per patient leave out {mixed} with slices of several classes."
        never = [name for name, v in level["per_class"].items() if v["precision"] is None]
        if never:
            yield f"On the {split} split {markdown.listed(never)} is never predicted: its precision is undefined."
    p, level = results["test"], splits["test"]["slice"]
    most = max(v["n"] for v in level["per_class"].values()) / level["n"]
    if level["accuracy"] <= most and len(p.classes) > 1:
        yield (
            f"The test accuracy of {level['accuracy']:.3f} is no better than always naming the most frequent "
            f"class ({most:.3f})."
        )
    if level["n"] > 1 and splits["test"]["patient"]["n"] == level["n"]:
        yield (
            "No two test images share a patient, so the numbers per patient are those per slice; if patients "
            "have several images, give the data set a group column."
        )
    if "val" in results:
        both = set(results["val"].groups) & set(p.groups) - {""}
        if both:
            yield (
                f"The val and the test split share {markdown.count(len(both), 'patient')}, such as {min(both)}: the "
                "weights were chosen with them in sight."
            )
        yield from operating_points.missing_rules(results["val"])
    patients = len(np.unique(metrics.patient_keys(p)))
    if config.eval.draws and patients < FEW_PATIENTS:
        yield (
            f"The test images are of {markdown.count(patients, 'patient')}: intervals from so few are too narrow, "
            "and from one there are none."
        )
    yield from _source_warnings(p, splits["test"]["by_source"])
    scored = [row["step"] for row in history if f"val.{config.train.monitor}" in row]
    if config.train.keep == "best" and len(scored) > 1 and best_step == scored[-1]:
        yield "The last validation was the best one: longer training may give better weights."


def _source_warnings(p: Predictions, by_source: Mapping[str, Any]) -> Iterator[str]:
    if len(by_source) < 2:
        return
    held = {s: [c for c, v in level["per_class"].items() if v["n"]] for s, level in by_source.items()}
    tied = [f"{source} ({named[0]})" for source, named in held.items() if len(named) == 1]
    if tied and len(p.classes) > 1:
        yield (
            f"Sources with test examples of one class only: {markdown.listed(tied)}. The network may recognise the "
            "source and not the finding."
        )
    for name in p.classes:
        holders = [source for source, named in held.items() if name in named]
        if len(holders) == 1:
            yield f"All test examples of {name} come from one source, {holders[0]}."


def draw(
    folder: Path,
    config: Config,
    test: Predictions,
    history: Sequence[Mapping[str, Any]],
    report: Mapping[str, Any],
    read_image: Callable[[int], np.ndarray],
    explain: Explain | None = None,
) -> dict[str, str]:
    """Draws every picture into `folder`; returns {file name: what it shows} in the report's order."""
    levels, drawn = report["test"], {}
    for unit, level in markdown.shown_levels(levels).items():
        name, title = f"confusion_{unit}.png", f"Confusion on the test split, {markdown.count(level['n'], unit)}"
        plots.confusion(level["confusion"], test.classes, folder / name, title)
        drawn[name] = f"Confusion matrix per {unit}"
    plots.roc_curves(test.labels, test.probabilities, test.classes, folder / "roc.png")
    plots.pr_curves(test.labels, test.probabilities, test.classes, folder / "pr.png")
    drawn |= {"roc.png": "ROC curves, test slices", "pr.png": "Precision-recall curves, test slices"}
    scaled = report.get("calibration", {}).get("bins_scaled")
    plots_decisions.reliability(calibration.bins(test), scaled, folder / "reliability.png")
    plots_decisions.decision_curves(test, folder / "decision_curve.png")
    drawn |= {
        "reliability.png": "Reliability, test slices: how often a network this sure of itself is right",
        "decision_curve.png": "Decision curves, test slices: what acting on a probability gains, a class against the "
        "rest",
    }
    if config.eval.examples:
        plots.example_sheet(test, read_image, config.eval.examples, folder / "examples.png")
        drawn["examples.png"] = (
            "Test images as the network sees them: right ones, an even choice, and wrong ones, the surest "
            "mistakes first"
        )
    wrong = plots.choose_examples(test, config.eval.examples)[1]
    (folder / "mistakes.png").unlink(missing_ok=True)  # of an earlier report
    if wrong and explain is not None:
        images = np.stack([read_image(row) for row in wrong])
        heats = explain(images, test.predicted[wrong])
        plots.mistakes(test, wrong, images, heats, folder / "mistakes.png")
        drawn["mistakes.png"] = (
            "The worst mistakes on the test split: each image, and where the network looked for the class that it "
            "named (Grad-CAM: from violet, nothing, to yellow, most of what spoke for that class)"
        )
    if history:  # there is none of several runs, or of a run on another data set
        chosen = report["best"]["step"] if config.train.keep == "best" else None
        plots.training_curves(history, folder / "training.png", config.train.monitor, chosen)
        drawn["training.png"] = "Training: the train loss has class weights and label smoothing in it, if set"
    return drawn


def _plain_number(value: Any) -> Any:
    """Turns numpy's numbers and arrays, and paths, into what JSON has."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value)
