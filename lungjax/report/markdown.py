"""report.md, the page for people: what `report.json` says, in words and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from lungjax.config import Config, fields_of
from lungjax.evaluation import metrics

LIMITS = (
    "These numbers describe one network on one data set. They say nothing about patients from another hospital, "
    "scanner or time."
)
NOT_CLINICAL = f"> **Not for clinical use.** {LIMITS}"
HEADLINE = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy (mean recall)",
    "auc_macro": "AUC, mean over classes",
    "auc_micro": "AUC, all pooled",
    "average_precision_macro": "average precision, mean over classes",
    "precision_macro": "precision, mean over classes",
    "recall_macro": "recall (sensitivity), mean over classes",
    "specificity_macro": "specificity, mean over classes",
    "f1_macro": "F1, mean over classes",
    "f1_weighted": "F1, weighted by class size",
    "loss": "cross-entropy",
    "ece": "expected calibration error",
    "brier": "Brier score",
}
POINT = {"sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV", "npv": "NPV"}


def markdown(config: Config, report: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    """Returns report.md; `drawn` are the files under plots/ with what they show."""
    test, facts = report["test"], report["facts"]
    level, patient = test["slice"], test["patient"]
    columns = {
        f"{s}, per {unit}": report[s][unit] for s in ("test", "val") if s in report for unit in ("slice", "patient")
    }
    data = facts.get("dataset", config.data.dataset)
    parts = [
        f"# {report['name']}: {config.model.name} on {_cell(data)}",
        f"On {count(level['n'], 'test slice')} the network names the right one of "
        f"{len(report['classes'])} classes in {rate(level['accuracy'])} of the cases "
        f"(AUC {rate(level['auc_macro'])}); on {count(patient['n'], 'test patient')} in "
        f"{rate(patient['accuracy'])} (AUC {rate(patient['auc_macro'])}).",
        NOT_CLINICAL,
    ]
    if report["warnings"]:
        parts += ["## Before you believe it", "\n".join(f"- {_cell(text)}" for text in report["warnings"])]
    rows = [[text, *(with_interval(v, name) for v in columns.values())] for name, text in HEADLINE.items()]
    counts = ["examples", *(f"{v['n']:,}" for v in columns.values())]
    parts += ["## Results", _table(["", *columns], [counts, *rows])]
    parts.append(
        "A dash is a number that has no definition there, such as the recall of a class without an example. "
        "Per patient is the mean probability over a patient's slices. In brackets: the 95 % interval by bootstrap over "
        f"patients, {config.eval.draws:,} draws."
    )
    if "folds" in facts:
        parts += ["### Over the folds", _table(*folds_table(facts["folds"]))]
    for unit, values in shown_levels(test).items():
        head = [f"class (test, per {unit})", "n", *map(_cell, metrics.PER_CLASS)]
        body = [
            [_cell(name), f"{v['n']:,}", *(rate(v[key]) for key in metrics.PER_CLASS)]
            for name, v in values["per_class"].items()
        ]
        parts += [f"### Classes, per {unit}", _table(head, body)]
        body = [
            [f"**{_cell(name)}**", *(f"{n:,}" for n in row)]
            for name, row in zip(report["classes"], values["confusion"], strict=True)
        ]
        parts.append(_table(["true \\ predicted", *map(_cell, report["classes"])], body))
    if test["by_source"]:
        parts += ["### Sources", _source_table(test["by_source"], report["classes"])]
    if "no_lungs" in report:
        none = report["no_lungs"]
        parts += [
            "### With the lungs blacked out",
            f"{count(none['n'], 'test slice')} (those in which lungs are found), every lung black: accuracy "
            f"{with_interval(none, 'accuracy')}, AUC {with_interval(none, 'auc_macro')}. What is left of the score was "
            "not read inside them, though their outline, and lesions that the mask missed, can still be seen.",
        ]
    if "source_only" in report["controls"]:
        alone = report["controls"]["source_only"]
        parts += [
            "### From the source alone",
            "Naming classes by their frequencies in the train images of the same source, without looking at an image: "
            f"accuracy {with_interval(alone, 'accuracy')}, AUC {with_interval(alone, 'auc_macro')}. The network's "
            "score means something as far as it lies above.",
        ]
    parts += [*_calibration_text(report), *_points_text(config, report)]
    parts.append("## Pictures")
    parts += [f"![{text.split(':')[0]}](plots/{name})\n\n*{text}.*" for name, text in drawn.items()]
    parts += ["## How it was trained", _table(["", ""], _training_rows(config, report))]
    parts += ["## Data", _data_text(facts, data)]
    parts += [
        "## Files",
        "`report.html` is this page and more, with the pictures in it, to open in a browser or to send. "
        "`report.json` has every number of this page and more (keys: `python -c 'import lungjax.report.write; "
        "help(lungjax.report.write)'`), `predictions_test.csv` what the network said about each image, "
        "`config.json` the whole configuration (`--experiment=config.json` repeats the run), "
        "`metrics.jsonl` the training log.",
    ]
    return "\n\n".join(parts) + "\n"


def folds_table(folds: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the table of a cross-validation's numbers; `folds` as `facts.folds` of its report."""
    rows = []
    for name, of in folds["over"].items():
        unit, _, number = name.partition(".")
        shown = (of["mean"], of["low"], of["high"], *of["values"])
        rows.append([f"{HEADLINE[number]}, per {unit}", *map(rate, shown)])
    return ["", "mean", "least", "greatest", *(f"fold {i}" for i in range(folds["count"]))], rows


def _source_table(by_source: Mapping[str, Any], classes: Sequence[str]) -> str:
    # Neither F1 nor precision: a source without some class would get a zero for each mistaken naming of it.
    names = ("accuracy", "balanced_accuracy", "auc_macro")
    body = [
        [_cell(source), f"{v['n']:,}", *(f"{v['per_class'][c]['n']:,}" for c in classes)]
        + [with_interval(v, name) for name in names]
        for source, v in sorted(by_source.items(), key=lambda item: (-item[1]["n"], item[0]))
    ]
    return _table(["source (test, per slice)", "n", *map(_cell, (*classes, *names))], body)


def _calibration_text(report: Mapping[str, Any]) -> list[str]:
    found = report.get("calibration")
    if not found:
        return []
    names = ("ece", "brier", "loss")
    kinds = {"test": "as they are", "test_scaled": f"after temperature {rate(found['temperature'])}"}
    body = [[words, *(rate(found[kind][name]) for name in names)] for kind, words in kinds.items()]
    return [
        "### Calibration",
        _table(["test probabilities", *(HEADLINE[name] for name in names)], body),
        "Whether a probability of 0.8 is right in 8 of 10 cases; 0 is best. The temperature, by which the logits are "
        f"divided, was fitted on {found['fitted_on']}; above 1 the network was too sure of itself.",
    ]


def _points_text(config: Config, report: Mapping[str, Any]) -> list[str]:
    """Sensitivity, specificity and predictive values of the test split at thresholds that were chosen on val."""
    names = dict(POINT)
    if config.eval.prevalence:
        at = f", at {100 * config.eval.prevalence:g} % prevalence"
        names |= {"ppv_at": f"PPV{at}", "npv_at": f"NPV{at}"}
    body = [
        [_cell(name), _cell(rule.replace("_", " ")), f"{point['threshold']:.3g}"]
        + [with_interval(point, key) for key in names]
        for name, rules in report.get("operating_points", {}).items()
        for rule, point in rules.items()
    ]
    if not body:
        return []
    return [
        "### Operating points (test, per slice)",
        _table(["class", "chosen for", "threshold", *names.values()], body),
        "A class is named where its probability reaches the threshold. Thresholds were chosen on val, for the highest "
        "sum of sensitivity and specificity (youden) or the highest one that reaches a sensitivity there. PPV and NPV "
        "hold for the test split's own share of the class; where fewer people have it, PPV is lower.",
    ]


def _training_rows(config: Config, report: Mapping[str, Any]) -> list[list[str]]:
    facts, best, leaves = report["facts"], report["best"], fields_of(config)
    score = "" if best["score"] is None else f" {best['score']:.4f}"
    size = f"{facts['parameters']:,} parameters" if "parameters" in facts else ""
    height, width = config.input.size
    last = config.train.keep == "last"
    why = (
        f"the last; val {_cell(best['monitor'])}{score}" if last else f"the best by val {_cell(best['monitor'])}{score}"
    )
    tested = f"step {best['step']} of {facts.get('steps', '?')}, {why}"
    rows = [
        ["network", ", ".join(filter(None, [_cell(config.model.name), size]))],
        ["first weights", "random" if config.model.weights == "none" else _cell(config.model.weights)],
        ["input", f"{height} x {width} px, {count(config.input.network_channels, 'channel')}"],
        ["tested weights", "those of each fold" if "folds" in facts else tested],
    ]
    if "seconds" in facts:
        rows.append(["time, last start to end", duration(facts["seconds"])])
    shown = ("compute_type", "device_kind", "devices", "hosts", "python", "versions", "commit", "code")
    rows += [[name, _words(facts[name])] for name in shown if name in facts]
    usual = fields_of(Config())
    own = [f"{_cell(k)}={_words(v)}" for k, v in leaves.items() if v != usual[k] and k != "name"]
    return [*rows, ["fields that differ from the defaults", ", ".join(own) or "none"]]


def _data_text(facts: Mapping[str, Any], data: str) -> str:
    counts = facts.get("counts")
    text = f"{_cell(data)}, fingerprint `{facts.get('fingerprint', '?')[:16]}`."
    if not counts:
        return text
    classes = list(next(iter(counts.values())))
    body = [[split, *(f"{n.get(c, 0):,}" for c in classes), f"{sum(n.values()):,}"] for split, n in counts.items()]
    return f"{text} Images:\n\n" + _table(["split", *map(_cell, classes), "all"], body)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)] if any(head) else ["---"] * len(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def rate(value: float | None) -> str:
    """Returns "0.931", and "-" for a number that has no definition."""
    return "-" if value is None else f"{value:.3f}"


def with_interval(level: Mapping[str, Any], name: str) -> str:
    """Returns "0.912 (0.884 to 0.937)", without the brackets where `level` has no interval of that name."""
    ends = level.get("intervals", {}).get(name)
    return rate(level[name]) + (f" ({rate(ends[0])} to {rate(ends[1])})" if ends else "")


def count(n: int, what: str) -> str:
    """Returns "1 slice" or "2,000 slices"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Returns "a, b and c"; of many the first eight."""
    if len(names) > 8:
        return ", ".join(names[:8]) + f" and {len(names) - 8} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{k} {v}" for k, v in value.items()]
    return _cell(", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))


def _cell(text: str) -> str:
    """Keeps a name from ending its table cell or turning into markup."""
    text = " ".join(text.split())
    for sign in ("\\", "|", "*", "_", "`", "<", "[", "$"):
        text = text.replace(sign, "\\" + sign)
    return text


def duration(seconds: float) -> str:
    """Returns "3 min 5 s" or "2 h 10 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def shown_levels(levels: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the slice level, and the patient level where it tells something else."""
    units = ["slice", "patient"] if 0 < levels["patient"]["n"] < levels["slice"]["n"] else ["slice"]
    return {unit: levels[unit] for unit in units}
