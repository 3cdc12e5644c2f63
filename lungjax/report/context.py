"""The template context of report.html and report.md: numbers, tables and figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lungjax.config import AugmentConfig, Config, fields_of, overrides
from lungjax.evaluation import bootstrap, metrics
from lungjax.report.templating import Number, Table, count, embed, rate

SECTIONS = {
    "summary": "Summary",
    "results": "Results",
    "figures": "Figures",
    "mistakes": "Worst mistakes",
    "data": "Data",
    "configuration": "Configuration",
    "card": "Model card",
}
METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy (mean recall)",
    "auc_macro": "AUC, mean over classes",
    "auc_micro": "AUC, pooled",
    "average_precision_macro": "average precision, mean over classes",
    "precision_macro": "precision, mean over classes",
    "recall_macro": "recall (sensitivity), mean over classes",
    "specificity_macro": "specificity, mean over classes",
    "f1_macro": "F1, mean over classes",
    "f1_weighted": "F1, weighted by class size",
    "loss": "cross-entropy",
    "ece": "expected calibration error",
    "brier": "Brier score, sum over classes",
}
SHORT_METRICS = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auc_macro": "AUC", "auc": "AUC", "f1": "F1",
    "npv": "NPV", "ppv": "PPV", "average_precision": "average precision",
}  # fmt: skip
HEADLINE = {"auc_macro": "AUC, mean over classes", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}
# Neither F1 nor precision: a single false positive for a class that the source lacks would make them zero.
COMPARED = ("accuracy", "balanced_accuracy", "auc_macro")
AGGREGATES = {
    "mean": "the mean over {}", "max": "the maximum over {}", "top_k": "the mean of the highest quarter of {}",
    "noisy_or": "1 - the product of (1 - probability) over {}",
    "per fold": "aggregated from {} by the rule of its fold",
}  # fmt: skip
CONTROLS = {"no_lungs": "network, lungs blacked out", "source_only": "source of the image alone, no network"}
CAPTIONS = {
    "confusion_slice.png": "Confusion matrix per {}.",
    "confusion_patient.png": "Confusion matrix per patient.",
    "roc.png": "ROC curves, test {}s.",
    "pr.png": "Precision-recall curves, test {}s.",
    "reliability.png": "Reliability diagram, test {}s: accuracy by confidence.",
    "decision_curve.png": "Decision curves, test {}s: net benefit of each class against the rest.",
    "flow.png": "Flow of images from the source folder to the splits of this run.",
    "examples.png": "Network input, test images: a sample of correct predictions, and the most confident wrong ones.",
    "mistakes.png": "Worst mistakes, test {}s, each with the heat map of its predicted class (yellow: highest).{}",
    "training.png": "Training: the train loss includes class weights and label smoothing, if any.",
}
CHARACTERISTICS = {"images": "images", "patients": "groups"}
LEAKS = {
    "images": "images",
    "exact_twin_in_train": "exact copy in train",
    "near_twin_in_train": "near duplicate in train",
    "group_in_train": "{} in train",
    "any": "any of these",
}


def build(
    config: Config,
    report: Mapping[str, Any],
    files: Iterable[str],
    plots: Path,
    summary: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the context of report.html.j2 and report.md.j2; `files` are keys of CAPTIONS, in order, in `plots`."""
    facts = report["facts"]
    unit = report["unit"]
    heat_maps = f" Heat maps: {facts['heat_maps']}." if "heat_maps" in facts else ""
    figures = {name: embed(plots / name, CAPTIONS[name].format(unit, heat_maps)) for name in files}
    return {
        "title": f"{report['name']}: {config.model.name} on {facts.get('dataset', config.data.dataset)}",
        "sections": SECTIONS,
        "config": config,
        "report": report,
        "run": facts,
        "unit": unit,
        "patients": tested_patients(report),
        "headline": headline(report),
        "results": _results(config, report, unit),
        "mistakes_figure": figures.pop("mistakes.png", None),
        "figures": list(figures.values()),
        "mistakes": Table(
            ["image (test)", "true", "predicted", "probability"],
            [[each["id"], each["true"], each["predicted"], rate(each["probability"])] for each in report["mistakes"]],
            note="The true classes alternate, in order of falling probability; further images of a patient come last.",
            text=True,
        ),
        "counts": _counts(facts.get("counts"), report["multilabel"]),
        "characteristics": _characteristics(facts.get("characteristics")),
        "about": about or {},
        "summary": summary,
        "prepared": _prepared(summary) if summary else [],
        "leak_table": leak_table(summary) if summary else None,
        "changed": changed(config, Config()),
        "config_json": overrides.to_json(config),
        "augmentation": [f"{key}={value}" for key, value in changed(config.augment, AugmentConfig()).items()],
    }


def headline(report: Mapping[str, Any]) -> dict[str, dict[str, Number]]:
    """Returns the main test scores by level and name: {"On 40 test slices": {"accuracy": ...}}."""
    return {
        f"On {count(level['n'], f'test {noun}')}": {
            words(report, title): number(level, name) for name, title in HEADLINE.items()
        }
        for noun, level in distinct_levels(report["test"], report["unit"]).items()
    }


def words(report: Mapping[str, Any], name: str) -> str:
    """Returns the name of a metric in the terms of the report: its classes may be findings."""
    return name.replace("sum over", "mean over").replace("classes", "findings") if report["multilabel"] else name


def tested_patients(report: Mapping[str, Any]) -> int:
    """Returns the number of test patients, with those that have images of several classes and no patient score."""
    patient = report["test"]["patient"]
    return int(patient["n"] + (0 if report["multilabel"] else patient["mixed_groups"]))


def distinct_levels(levels: Mapping[str, Any], unit: str) -> dict[str, Any]:
    """Returns the per-example level under the name `unit`, and "patient" if patients have several examples."""
    several = 0 < levels["patient"]["n"] < levels["slice"]["n"]
    return {unit: levels["slice"]} | ({"patient": levels["patient"]} if several else {})


def number(level: Mapping[str, Any], name: str, value: float | None = None) -> Number:
    """Returns a metric of a level with its interval; a dotted `name`, such as per_class.a.recall, needs `value`."""
    return Number(level.get(name, value), *level.get("intervals", {}).get(name, ()))


def changed(section: Any, defaults: Any) -> dict[str, Any]:
    """Returns the fields of `section` that differ from `defaults`, by dotted path; omits `name`."""
    before = fields_of(defaults)
    return {k: v for k, v in fields_of(section).items() if v != before[k] and k != "name"}


def _results(config: Config, report: Mapping[str, Any], unit: str) -> list[Table]:
    """Returns the tables of metrics."""
    test, classes = report["test"], report["classes"]
    columns = {
        f"{split}, per {name}": level
        for split in ("test", "val")
        if split in report
        for name, level in distinct_levels(report[split], unit).items()
    }
    rows: list[list[Any]] = [["examples", *(level["n"] for level in columns.values())]]
    names = {name: words for name, words in METRICS.items() if name in test["slice"]}
    rows += [[words(report, w), *(number(level, name) for level in columns.values())] for name, w in names.items()]
    scale = "calibrated on val" if "calibration" in report else "not calibrated"
    rule, _, names = report["aggregate"].partition(":")
    patient = AGGREGATES[rule].format("the patient's images") + f", for {names.replace('+', ' and ')}" * bool(names)
    note = f"Probabilities are {scale}; that of a patient is {patient}. "
    note += "A dash marks an undefined number."
    if any(level["intervals"] for level in columns.values()):
        note += f" The 95 % intervals are from a percentile bootstrap over patients with {config.eval.draws:,} draws,"
        note += " or Wilson's for a proportion that does not vary. AUC and average precision need"
        note += f" {bootstrap.MIN_PATIENTS} patients with and without the class; the calibration error has no interval."
    tables = [Table(["", *columns], rows, note=note)]
    if "aggregates" in report["facts"]:
        rows = [[how, Number(*scores)] for how, scores in report["facts"]["aggregates"].items()]
        note = f"The highest AUC determined the rule, {report['aggregate']}; scores on test are with this rule."
        tables.append(Table(["eval.aggregate", "AUC, per patient"], rows, "Choice of the aggregation (val)", note))
    if "folds" in report["facts"]:
        tables += _folds(report["facts"]["folds"], classes, list(distinct_levels(test, unit)))
    for noun, level in distinct_levels(test, unit).items():
        tables.append(_classes(noun, level))
        if "confusion" in level:
            rows = [[name, *counts] for name, counts in zip(classes, level["confusion"], strict=True)]
            tables.append(Table(["true / predicted", *classes], rows, f"Confusion, per {noun} (test)"))
    tables += [_subgroups(column, groups, classes, unit) for column, groups in test["subgroups"].items()]
    if "calibration" in report:
        tables += [_calibration(report["calibration"]), _recalibration(report)]
    tables += _operating_points(config, report.get("operating_points", {}), unit)
    if report["controls"]:
        tables.append(_controls(report, unit))
    if "novelty" in report["facts"]:
        tables.append(_novelty(report["facts"]["novelty"]))
    return tables


def _folds(folds: Mapping[str, Any], classes: Sequence[str], units: Sequence[str]) -> list[Table]:
    """Returns the spread over the folds and, if each left out one source, the scores by source and the drop.

    `units` are the keys of `distinct_levels`.
    """
    rows = []
    for name, spread in folds["over"].items():
        level, _, metric = name.partition(".")
        values = (spread["mean"], spread["low"], spread["high"], *spread["values"])
        rows.append([f"{METRICS[metric]}, per {units[0] if level == 'slice' else level}", *map(Number, values)])
    names = folds.get("sources") or [f"fold {i}" for i in range(folds["count"])]
    title = "Over the sources, each left out of training once" if "sources" in folds else "Over the folds"
    tables = [Table(["", "mean", "min", "max", *names], rows, title)]
    if "sources" not in folds:
        return tables
    tables += [_subgroups("source", folds["patients"], classes, "patient")] if len(units) > 1 else []
    note = (
        "Both networks were tested on the same images: those from the source in the test split of the data set. The "
        "network of the ordinary split was trained on other patients from this source, the other one on none. The drop "
        "is the difference, with the interval of a paired bootstrap over patients. AUC needs images of several classes."
    )
    for level, noun in zip(bootstrap.UNITS, units, strict=False):
        rows = []
        for name, drop in folds["drop"].items():
            cells: list[Any] = []
            for metric in ("auc_macro", "balanced_accuracy"):
                d = drop[f"{level}.{metric}"]
                ends = () if d["low"] == d["high"] else (d["low"], d["high"])  # draws without variation
                cells += [Number(d["b"]), Number(d["a"]), Number(d["difference"], *ends)]
            rows.append([name, drop["n"], *cells])
        head = ["source", "images"]
        for metric in ("AUC", "balanced accuracy"):
            head += [f"{metric}, ordinary split", f"{metric}, left out", "drop"]
        tables.append(Table(head, rows, f"Drop from the ordinary split, per {noun}", note if level == "slice" else ""))
    return tables


def _classes(unit: str, level: Mapping[str, Any]) -> Table:
    known = ["known"] * ("confusion" not in level)  # of findings
    head = ["finding" if known else "class against the rest", "n", *known]
    head += [SHORT_METRICS.get(name, name) for name in metrics.PER_CLASS]
    rows = [
        [
            name,
            values["n"],
            *(values[key] for key in known),
            *(number(level, f"per_class.{name}.{key}", values[key]) for key in metrics.PER_CLASS),
        ]
        for name, values in level["per_class"].items()
    ]
    note = f"n is the number of {unit}s with the finding, known that of {unit}s with a known label." if known else ""
    return Table(head, rows, f"{'Findings' if known else 'Classes'}, per {unit} (test)", note)


def _subgroups(column: str, groups: Mapping[str, Any], classes: Sequence[str], unit: str) -> Table:
    with_patients = unit != "patient"
    rows = [
        [
            value, *([n["patients"]] if with_patients else ()), n["n"], *(n["per_class"][c]["n"] for c in classes),
            *(number(n, name) for name in COMPARED),
        ]
        for value, n in sorted(groups.items(), key=lambda item: (-item[1]["n"], item[0]))
    ]  # fmt: skip
    head = [column, *(["patients"] if with_patients else ()), "n", *classes, *(SHORT_METRICS[m] for m in COMPARED)]
    return Table(head, rows, f"Subgroups by {column}, per {unit} (test)")


def _calibration(calibration: Mapping[str, Any]) -> Table:
    names, temperature = ("ece", "brier", "loss"), calibration["temperature"]
    if temperature is None:
        scale = "one T per network"
    elif isinstance(temperature, float):
        scale = f"T = {rate(temperature)}"
    else:
        pairs = zip(temperature, calibration["calibrated"]["per_class"], strict=True)
        scale = "T = " + ", ".join(f"{rate(t)} ({name})" for t, name in pairs)
    kinds = {"uncalibrated": "uncalibrated", "calibrated": f"calibrated by temperature scaling, {scale}"}
    rows = [[words, *(number(calibration[kind], name) for name in names)] for kind, words in kinds.items()]
    note = (
        "A calibration error of 0 is perfect; the other two also depend on discrimination. The temperature T, fitted "
        f"on {calibration['fitted_on']}, divides the logits; a value above 1 means overconfidence. All other numbers "
        "and figures of this report, the predictions_*.csv, prediction, the service and the exports use the "
        "calibrated probabilities."
    )
    return Table(["test probabilities", *(METRICS[name] for name in names)], rows, "Calibration", note)


def _recalibration(report: Mapping[str, Any]) -> Table:
    calibration, what = report["calibration"], "finding" if report["multilabel"] else "class against the rest"
    kinds = ("uncalibrated", "calibrated")
    rows = [
        [name, *(number(calibration[kind]["per_class"][name], key) for key in ("slope", "intercept") for kind in kinds)]
        for name in calibration["calibrated"]["per_class"]
    ]
    note = (
        "From logistic regressions on the log odds of the predicted probability, on test. A slope below 1 means that "
        "the probabilities are too extreme. The intercept is calibration-in-the-large, with a slope of 1: above 0, "
        "they are too low on average. Perfect calibration has slope 1 and intercept 0, but these do not exclude "
        "curvature. An interval is missing if too many draws separate the class perfectly."
    )
    head = [what, *(f"{key}, {kind}" for key in ("slope", "intercept") for kind in kinds)]
    return Table(head, rows, "Calibration slope and intercept (test)", note)


def _operating_points(config: Config, points: Mapping[str, Any], unit: str) -> list[Table]:
    names = {name: SHORT_METRICS.get(name, name) for name in ("sensitivity", "specificity", "ppv", "npv")}
    levels = {unit if level == "slice" else level: own for level, own in points.items() if any(own.values())}
    given = {name: p for name, p in config.eval.prevalences().items() if any(name in own for own in levels.values())}
    if given:
        names |= {"ppv_at": "PPV, at prevalence", "npv_at": "NPV, at prevalence"}
    note = (
        "A class is called if its calibrated probability reaches the threshold, which was chosen on val for the "
        "maximum sum of sensitivity and specificity (Youden index) or for a minimum sensitivity on val; that on test "
        "may be lower. Prediction, the service and the exports use the same thresholds. PPV and NPV hold for the "
        "class frequencies of the test split; at a lower prevalence PPV is lower and NPV higher."
    )
    if given:
        shares = ", ".join(f"{name} {100 * p:g} %" for name, p in given.items())
        note += f" The prevalence is that of eval.prevalence: {shares}."
    tables: list[Table] = []
    for noun, classes in levels.items():
        rows = [
            [name, rule.replace("_", " "), f"{point['threshold']:.3g}", *(number(point, key) for key in names)]
            for name, rules in classes.items()
            for rule, point in rules.items()
        ]
        head = ["class", "chosen for", "threshold", *names.values()]
        tables.append(Table(head, rows, f"Operating points, per {noun} (test)", "" if tables else note))
    return tables


def _controls(report: Mapping[str, Any], unit: str) -> Table:
    levels = {"network, as tested": report["test"]["slice"]}
    levels |= {CONTROLS.get(name, name): level for name, level in report["controls"].items()}
    rows = [[words, level["n"], *(number(level, name) for name in COMPARED)] for words, level in levels.items()]
    note = "Shortcut baselines that a trained network must beat."
    if "no_lungs" in report["controls"]:
        note += " Blacked out: the lungs of all test slices in which lungs were detected."
        note += " Their outline, and lesions outside the mask, remain visible."
    return Table(["", "n", *(SHORT_METRICS[name] for name in COMPARED)], rows, f"Controls (test, per {unit})", note)


def _novelty(rates: Mapping[str, Any]) -> Table:
    kinds = {f"{split} images (false alarms)": r for split, r in rates["false_alarms"].items()} | rates["detection"]
    rows = [[kind, r["n"], Number(r["rate"], *r["interval"])] for kind, r in kinds.items()]
    note = (
        "Share of images for which prediction warns that they are unlike the training images. The other rows are "
        "generated images and photographs, which are easier to recognize than scans of another organ or modality."
    )
    return Table(["images", "n", "with a warning"], rows, "Unfamiliar images", note)


def _counts(counts: Mapping[str, Mapping[str, int]] | None, multilabel: bool) -> Table | None:
    if not counts:
        return None
    classes = list(next(iter(counts.values())))
    every = () if multilabel else ("all",)
    rows = [[split, *(n.get(c, 0) for c in classes), *(sum(n.values()) for _ in every)] for split, n in counts.items()]
    return Table(["split", *classes, *every], rows)


def _characteristics(splits: Mapping[str, Any] | None) -> Table | None:
    """Returns the table of images, patients and kept columns per split."""
    if not splits:
        return None
    rows: list[list[Any]] = [[name, *(s[key] for s in splits.values())] for name, key in CHARACTERISTICS.items()]
    columns: dict[str, Any] = {name: None for s in splits.values() for name in s["columns"]}
    for name in columns:
        parts = [(s["columns"].get(name, {}), s["groups"]) for s in splits.values()]
        if any("median" in part for part, _ in parts):
            spans = [
                "{:g} ({:g} to {:g})".format(*(round(p[key], 1) for key in ("median", "low", "high"))) if p else "-"
                for p, _ in parts
            ]
            rows += [
                [f"{name}, median (quartiles)", *spans],
                [f"{name}, missing", *(p.get("missing") for p, _ in parts)],
            ]
            continue
        for value in {value: None for part, _ in parts for value in part}:
            cells = [f"{p.get(value, 0):,} ({100 * p.get(value, 0) / n:.0f} %)" for p, n in parts]
            rows.append([f"{name}: {value}", *cells])
    note = "Columns of the data set are counted per patient; a patient with several values counts for each."
    return Table(["", *splits], rows, "Data per split", note if columns else "")


def _prepared(summary: Mapping[str, Any]) -> list[Table]:
    """Returns the tables of splits and sources of the prepared data set."""
    groups, classes = summary["group_name"], summary["classes"]
    head = ["split", *(f"{c}, images" for c in classes), *(f"{c}, {groups}" for c in classes)]
    tables = []
    note = "A patient with images of several classes counts in each." if summary["groups_with_several_labels"] else ""
    for name, splits in summary["protocols"].items():
        rows = [[split, *n["images"].values(), *n["groups"].values()] for split, n in splits.items()]
        tables.append(Table(head, rows, f"Splits of protocol {name}", note))
    if len(summary["sources"]) > 1:
        rows = [[name or "(none)", *(n.get(c, 0) for c in classes)] for name, n in summary["sources"].items()]
        tables.append(Table(["source", *classes], rows, "Images per source"))
    return tables


def leak_table(summary: Mapping[str, Any]) -> Table:
    """Returns the table of val and test images with a counterpart in train, by protocol and split."""
    rows = [
        [f"{protocol}, {split}", *(n[key] for key in LEAKS)]
        for protocol, splits in summary["twins"]["leaks"].items()
        for split, n in splits.items()
    ]
    return Table(["protocol, split", *(words.format(summary["group_name"]) for words in LEAKS.values())], rows)
