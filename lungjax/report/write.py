"""Writes the report of a run: report.json for programs, report.html and report.md for people, predictions and figures.

evaluation/README.md describes the keys of report.json, version 1. Adding a key does not change the version; removing a
key or changing its meaning does.
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
MIN_SUBGROUP = 20  # patients of a subgroup, below which its scores are unreliable
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
    temperature: calibration.Temperature | None = 1.0,
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
      temperature: that of `results`, 1 if they are not calibrated; None if several networks have their own.
      points: the thresholds to evaluate; None chooses them on "val", if available.

    Raises ValueError if "test" is missing or empty, or if probabilities are invalid.
    """
    if "test" not in results or not len(results["test"]):
        raise ValueError("no test predictions: the report needs a test split with images")
    test = results["test"]
    wrong = plots.choose_examples(test, config.eval.examples)[1]
    rules = np.unique(test.extra.get("aggregate", "mean"))
    key, step = f"val.{config.train.monitor}", facts.get("best_step")
    scores = [row[key] for row in history if row["step"] == step and key in row]
    report = {
        "version": VERSION,
        "name": config.name,
        "classes": list(test.classes),
        "unit": (summary or {}).get("unit", "image"),
        "best": {"step": step, "monitor": config.train.monitor, "score": scores[-1] if scores else None},
        "aggregate": rules.item() if rules.size == 1 else "per fold",
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
    if summary and "flow" in summary and "characteristics" in facts:
        report["flow"] = _flow(
            summary, facts["characteristics"], "clean" if "external" in facts else config.data.protocol
        )
    if test.logits is not None and temperature != 1.0:
        report["calibration"] = calibration.summary(test, temperature, config.eval.draws)
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
    levels = metrics.report_levels(p)
    for unit in bootstrap.UNITS:
        levels[unit]["intervals"] = bootstrap.intervals(p, config.eval.draws, unit=unit)
    for column, parts in metrics.subgroups(p).items():
        for value in parts if len(parts) <= MAX_SOURCES else ():
            levels["subgroups"][column][value]["intervals"] = bootstrap.intervals(parts[value], config.eval.draws)
    return levels


def _flow(summary: Mapping[str, Any], splits: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """Returns the images and groups from found to splits; `splits` is from `summary.characteristics`."""
    sizes = {name: {key: split[key] for key in ("images", "groups")} for name, split in splits.items()}
    removed = dict(summary["flow"]["removed"]) if protocol == "clean" else {}
    rest = summary["images"] - sum(removed.values()) - sizes["all"]["images"]
    return {
        "found": summary["flow"]["found"],
        "skipped": {reason: n for reason, n in summary["flow"]["skipped"].items() if n},
        "prepared": {key: summary[key] for key in ("images", "groups")},
        "removed": removed | ({"in no split of this run": rest} if rest > 0 else {}),
        "used": sizes.pop("all"),
        "splits": sizes,
    }


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
    if "sources" not in report["facts"].get("folds", {}):  # otherwise the network has not seen the source
        yield from _source_warnings(p, report["test"]["subgroups"].get("source", {}))
    groups = [(f"{c} {v}", g["patients"]) for c, vs in report["test"]["subgroups"].items() for v, g in vs.items()]
    if small := [f"{name} ({n})" for name, n in groups if n < MIN_SUBGROUP]:
        yield f"Subgroups with fewer than {MIN_SUBGROUP} test patients: {listed(small)}. Their scores are unreliable."
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
    (folder / "flow.png").unlink(missing_ok=True)  # from an earlier report
    if "flow" in report:
        plots.flow(report["flow"], folder / "flow.png")
        files.append("flow.png")
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
