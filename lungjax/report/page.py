"""report.html: everything a run has to say on one page that needs no other file, no network and no script.

A function of the report and the pictures. What an older report lacks is left out, and no text of the user's (names of
classes, files and sources) can become markup: `lungjax.report.html` escapes all of it, and the page itself forbids
scripts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lungjax.config import Config
from lungjax.evaluation import metrics
from lungjax.report import card, html, markdown
from lungjax.report.markdown import count, rate

TILES = {"auc_macro": "AUC, mean over classes", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}
STUDY = {
    "f1_weighted": "weighted F1, as TensorFlow Addons computes it (CT-COV19)",
    "auc_micro_logits": "AUC, all pooled, of the logits (CT-COV19)",
    "f1_macro_harmonic": "harmonic mean of the mean precision and recall (COVIDx CT)",
    "accuracy_rounded": "accuracy after the probabilities are rounded to 0 or 1 (ictcf)",
}
CONTROLS = {
    "no_lungs": "the network, lungs blacked out",
    "source_only": "no network: the source of the image alone",
}
SHORT = {"npv": "NPV", "f1": "F1", "auc": "AUC"}
POINT = ("threshold", "sensitivity", "specificity", "ppv", "npv")
SECTIONS = {
    "summary": "Summary",
    "results": "Results",
    "figures": "Figures",
    "mistakes": "Worst mistakes",
    "data": "Data",
    "configuration": "Configuration",
    "card": "Model card",
}


def page(
    config: Config,
    report: Mapping[str, Any],
    drawn: Mapping[str, str],
    plots: Path,
    summary: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Returns report.html.

    Args:
      config: of the run.
      report: as in report.json, of this lungjax or an older one; see `lungjax.report.write`.
      drawn: the pictures in the order of the page, {file name: what it shows}.
      plots: the folder they lie in, as PNG.
      summary: summary.json of the prepared data; None leaves its part out.
      about: what is known of the data set, the fields of `datasets.About`; the same.

    Raises ValueError for a picture that is no PNG, OSError for one that is missing.
    """
    data = report["facts"].get("dataset", config.data.dataset)
    title = f"{report['name']}: {config.model.name} on {data}"
    sections = [
        html.heading(title, 1),
        html.contents(SECTIONS),
        _summary(config, report, data),
        _results(config, report),
        _figures(drawn, plots),
        _mistakes(config, report, drawn, plots),
        card.data(config, report, SECTIONS["data"], summary, about),
        card.configuration(config, report, SECTIONS["configuration"]),
        card.card(config, report, SECTIONS["card"], summary, about),
    ]
    return html.page(title, sections, sealed=True)


def _heading(anchor: str) -> str:
    return html.heading(SECTIONS[anchor], 2, anchor)


def number(level: Mapping[str, Any], name: str, value: float | None) -> html.Markup:
    """Returns a table cell: the value, and under it its interval where `level` has one for this dotted name."""
    found = level.get("intervals", {}).get(name)
    around = "" if found is None else f"<small>{rate(found[0])} to {rate(found[1])}</small>"
    return html.Markup(f"{rate(value)}{around}")


def _summary(config: Config, report: Mapping[str, Any], data: str) -> str:
    """What network on what data, the headline numbers, and what to know before believing them."""
    test = report["test"]
    level, patient, classes = test["slice"], test["patient"], report["classes"]
    parts = [
        _heading("summary"),
        html.paragraph(
            f"{config.model.name}, trained on {_trained_on(config, report)}, tells {len(classes)} classes apart: "
            f"{markdown.listed(classes)}. It was tested on {count(level['n'], 'slice')} of "
            f"{count(patient['n'], 'patient')}{' of ' + data if 'external' in report['facts'] else ''}."
        ),
    ]
    for unit, held in markdown.shown_levels(test).items():
        shown = []
        for name, words in TILES.items():
            found = held.get("intervals", {}).get(name)
            around = f"{rate(found[0])} to {rate(found[1])} (95 %)" if found else ""
            shown.append((rate(held[name]), words, around))
        parts += [html.heading(f"On {count(held['n'], f'test {unit}')}", 3), html.tiles(shown)]
    parts.append(
        html.box(
            "warning",
            "<p><strong>Research use only, not for clinical use.</strong></p>",
            html.paragraph(markdown.LIMITS),
        )
    )
    if report["warnings"]:
        parts.append(
            html.box("note", "<p><strong>Before you believe it</strong></p>", html.bullets(report["warnings"]))
        )
    return "\n".join(parts)


def _trained_on(config: Config, report: Mapping[str, Any]) -> str:
    facts = report["facts"]
    name = facts.get("external", {}).get("trained_on", facts.get("dataset", config.data.dataset))
    parts = f", {facts['folds']['count']} times without a part that was then tested" if "folds" in facts else ""
    return f"{name} (protocol {config.data.protocol}{parts})"


def _results(config: Config, report: Mapping[str, Any]) -> str:
    """Every table of numbers."""
    test = report["test"]
    columns = {
        f"{split}, per {unit}": level
        for split in ("test", "val")
        if split in report
        for unit, level in markdown.shown_levels(report[split]).items()
    }
    rows: list[list[Any]] = [["examples", *(level["n"] for level in columns.values())]]
    rows += [
        [words, *(number(level, name, level.get(name)) for level in columns.values())]
        for name, words in markdown.HEADLINE.items()
        if any(name in level for level in columns.values())
    ]
    small = (
        f"Small below a number: its 95 % interval, a percentile bootstrap of {config.eval.draws:,} draws of patients. "
        if any(level.get("intervals") for level in columns.values())
        else ""
    )
    parts = [
        _heading("results"),
        html.table(["", *columns], rows),
        html.paragraph(
            f"{small}A dash is a number that has no definition there, such as the recall of a class without an "
            "example. Per patient is the mean probability over a patient's slices."
        ),
    ]
    if "folds" in report["facts"]:
        parts += [html.heading("Over the folds", 3), html.table(*markdown.folds_table(report["facts"]["folds"]))]
    for unit, level in markdown.shown_levels(test).items():
        parts += _classes(unit, level, report["classes"])
    if test["by_source"]:
        parts += _sources(test["by_source"], report["classes"])
    return "\n".join([*parts, *_calibration(report), *_points(config, report), *_controls(report), *_study(columns)])


def _classes(unit: str, level: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    rows = [
        [name, held["n"], *(number(level, f"per_class.{name}.{key}", held[key]) for key in metrics.PER_CLASS)]
        for name, held in level["per_class"].items()
    ]
    names = [SHORT.get(name, name.replace("_", " ")) for name in metrics.PER_CLASS]
    confusion = [[name, *row] for name, row in zip(classes, level["confusion"], strict=True)]
    return [
        html.heading(f"Classes, per {unit} (test)", 3),
        html.table(["class against the rest", "n", *names], rows),
        html.heading(f"Confusion, per {unit} (test)", 3),
        html.table(["true \\ predicted", *classes], confusion),
    ]


def _sources(by_source: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    # Neither F1 nor precision: a source without some class would get a zero for each mistaken naming of it.
    names = ("accuracy", "balanced_accuracy", "auc_macro")
    rows = [
        [source, held["n"], *(held["per_class"][c]["n"] for c in classes)]
        + [number(held, name, held[name]) for name in names]
        for source, held in sorted(by_source.items(), key=lambda item: (-item[1]["n"], item[0]))
    ]
    return [
        html.heading("Sources, per slice (test)", 3),
        html.table(["source", "n", *classes, "accuracy", "balanced accuracy", "AUC"], rows),
    ]


def _calibration(report: Mapping[str, Any]) -> list[str]:
    found = report.get("calibration")
    if not found:
        return []
    names = {"ece": "expected calibration error", "brier": "Brier score", "loss": "cross-entropy"}
    kinds = {"test": "as they are", "test_scaled": f"after temperature {rate(found.get('temperature'))}"}
    rows = [
        [words, *(number(found[kind], name, found[kind].get(name)) for name in names)]
        for kind, words in kinds.items()
        if found.get(kind)
    ]
    return [
        html.heading("Calibration", 3),
        html.table(["test probabilities", *names.values()], rows),
        html.paragraph(
            "Whether a probability of 0.8 is right in 8 of 10 cases; 0 is best. Temperature: the logits are divided by "
            f"it; fitted on {found.get('fitted_on', 'val')}. Above 1 the network was too sure of itself."
        ),
    ]


def _points(config: Config, report: Mapping[str, Any]) -> list[str]:
    """Sensitivity, specificity and predictive values at thresholds that were chosen on val."""
    found = report.get("operating_points") or {}
    prevalent = any(point.get("ppv_at") is not None for rules in found.values() for point in rules.values())
    names = [*POINT, *(["ppv_at", "npv_at"] if prevalent else [])]
    rows = [
        [name, rule.replace("_", " "), *(number(point, key, point.get(key)) for key in names)]
        for name, rules in found.items()
        for rule, point in rules.items()
    ]
    if not rows:
        return []
    at = f", at {100 * config.eval.prevalence:g} % prevalence"
    words = {"ppv": "PPV", "npv": "NPV", "ppv_at": f"PPV{at}", "npv_at": f"NPV{at}"}
    return [
        html.heading("Operating points (test)", 3),
        html.table(["class", "chosen for", *(words.get(name, name) for name in names)], rows),
        html.paragraph(
            "A class is named where its probability reaches the threshold, which was chosen on the val split: for the "
            "largest sum of sensitivity and specificity (youden), or for a sensitivity. PPV and NPV are those of the "
            "test split's own share of the class; where fewer people have it, PPV is lower."
        ),
    ]


def _controls(report: Mapping[str, Any]) -> list[str]:
    """What is reached without the lungs, or without any image."""
    found = dict(report.get("controls") or {})
    if "no_lungs" in report:
        found.setdefault("no_lungs", report["no_lungs"])
    if not found:
        return []
    names = ("accuracy", "balanced_accuracy", "auc_macro")
    levels = {"the network, as tested": report["test"]["slice"]}
    levels |= {CONTROLS.get(name, name.replace("_", " ")): level for name, level in found.items()}
    rows = [
        [words, level.get("n", ""), *(number(level, name, level.get(name)) for name in names)]
        for words, level in levels.items()
    ]
    text = "What can be had without looking into the lungs. The network's score means something only above these."
    if "no_lungs" in found:
        text += (
            " Blacked out: every lung of the test slices in which lungs are found is black; their outline, and lesions "
            "that the mask missed, can still be seen."
        )
    return [
        html.heading("Controls (test, per slice)", 3),
        html.table(["", "n", "accuracy", "balanced accuracy", "AUC"], rows),
        html.paragraph(text),
    ]


def _study(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The published studies' own definitions, for a comparison with their tables."""
    held = {column: level["study"] for column, level in columns.items() if level.get("study")}
    rows = [
        [words, *(number(columns[column], f"study.{name}", study.get(name)) for column, study in held.items())]
        for name, words in STUDY.items()
        if any(study.get(name) is not None for study in held.values())
    ]
    if not rows:
        return []
    words = "Numbers as published studies define them, to compare with their tables and for nothing else."
    table = html.table(["definition", *held], rows)
    return [html.heading("The studies' own definitions", 3), html.paragraph(words), table]


def _figures(drawn: Mapping[str, str], plots: Path) -> str:
    shown = [html.embedded(plots / name, f"{words}.") for name, words in drawn.items() if name != "mistakes.png"]
    hint = html.paragraph("On a small screen, wide pictures and tables scroll sideways.")
    return "\n".join([_heading("figures"), hint, *shown])


def _mistakes(config: Config, report: Mapping[str, Any], drawn: Mapping[str, str], plots: Path) -> str:
    """The wrong answers that the network was surest of, with what it looked at."""
    parts, wrong = [_heading("mistakes")], report.get("mistakes", [])
    if "mistakes.png" in drawn:
        parts.append(html.embedded(plots / "mistakes.png", f"{drawn['mistakes.png']}."))
        parts.append(
            html.paragraph(
                "A map says where the score came from, not whether it is right to look there, and it is as coarse as "
                "the network's last layer. A mark far from the lungs is a reason to look at the data."
            )
        )
    if wrong:
        rows = [[one["id"], one["true"], one["predicted"], rate(one["probability"])] for one in wrong]
        parts += [
            html.table(["image (test)", "true", "predicted", "probability"], rows, words=True),
            html.paragraph("The true classes take turns, the surest mistake first, one of each patient before more."),
        ]
    elif "mistakes.png" not in drawn:
        none = "No example is wrong." if config.eval.examples and "mistakes" in report else "None are listed."
        parts.append(html.paragraph(none))
    return "\n".join(parts)
