"""What report.html says of data, configuration and network: data summary, settings, and a model card.

The card has the headings of Mitchell et al., "Model Cards for Model Reporting" (FAT* 2019, arXiv 1810.03993), and says
what the run knows and what it does not; nothing is claimed that was not measured.
"""

from collections.abc import Mapping
from typing import Any

from lungjax.config import AugmentConfig, Config, fields_of, overrides
from lungjax.report import html
from lungjax.report.markdown import count, duration, listed, rate

SHOWN = 20  # skipped images that are named
TWICE = {
    "images": "images",
    "exact_twin_in_train": "exact copy in train",
    "near_twin_in_train": "near twin in train",
    "group_in_train": "group in train",
    "any": "any of these",
}
TOLD = {"title": "What it is", "origin": "Where it comes from", "licence": "Licence", "citation": "To cite"}


def data(
    config: Config,
    report: Mapping[str, Any],
    title: str,
    summary: Mapping[str, Any] | None,
    about: Mapping[str, Any] | None,
) -> str:
    """Returns the data section: what the run used, what the prepared set holds, and what leaks between splits."""
    facts = report["facts"]
    name = facts.get("dataset", config.data.dataset)
    protocol = "clean" if "external" in facts else config.data.protocol
    parts = [
        html.heading(title, 2, "data"),
        html.paragraph(
            f"{name}, protocol {protocol}, fingerprint {facts.get('fingerprint', '?')[:16]}. "
            f"{_splits_text(config, facts)}"
        ),
        _counts(facts),
    ]
    if about:
        parts += [html.linked(f"{words}: {about[key]}") for key, words in TOLD.items() if about.get(key)]
        if _own_splits(config, facts) and about.get(protocol):
            parts.append(html.linked(f"Splits of protocol {protocol}: {about[protocol]}"))
    if summary:
        parts += _summary(config, facts, summary)
    return "\n".join(parts)


def _own_splits(config: Config, facts: Mapping[str, Any]) -> bool:
    """Says whether the run was trained and tested on the splits of the data set that the report names."""
    return not config.data.folds and "folds" not in facts and "external" not in facts


def _splits_text(config: Config, facts: Mapping[str, Any]) -> str:
    text = ""
    if "external" in facts:
        return f"None of the tested images was used in training. Tested ({facts['external']['split']}):"
    if "folds" in facts:
        text = f"Dealt by patient into {config.data.folds} parts, each of which was test once. "
    elif config.data.folds:
        text = f"Splits made anew by patient: part {config.data.fold} of {config.data.folds} (from 0) is test. "
    if config.train.fraction < 1:
        text += f"Of the train patients {100 * config.train.fraction:g} % are used. "
    return text + "Images of each class that the run used:"


def _counts(facts: Mapping[str, Any]) -> str:
    counts = facts.get("counts")
    if not counts:
        return html.paragraph("The report does not say how many.")
    classes = list(next(iter(counts.values())))
    rows = [[split, *(n.get(c, 0) for c in classes), sum(n.values())] for split, n in counts.items()]
    return html.table(["split", *classes, "all"], rows)


def _summary(config: Config, facts: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """What `lungjax.prepare` found in the whole data set."""
    named, classes = summary.get("group_name", "patients"), summary["classes"]
    parts = [html.heading("The prepared data set", 3)]
    if not _own_splits(config, facts):
        parts.append(html.paragraph("As it was prepared; train, val and test below are not those of this report."))
    parts.append(html.bullets(summary.get("warnings", []), strong=True))
    parts += _leaks(summary, named, config.data.protocol if _own_splits(config, facts) else "")
    for protocol, splits in summary.get("protocols", {}).items():
        head = ["split", *(f"{c}, images" for c in classes), *(f"{c}, {named}" for c in classes)]
        rows = [[s, *held["images"].values(), *held["groups"].values()] for s, held in splits.items()]
        parts += [html.heading(f"Splits of protocol {protocol}", 4), html.table(head, rows)]
    sources = summary.get("sources", {})
    if len(sources) > 1:
        rows = [[source or "(none)", *(held.get(c, 0) for c in classes)] for source, held in sources.items()]
        parts += [html.heading("Images of each source", 4), html.table(["source", *classes], rows)]
    parts += [html.table(["", ""], _found(summary, named), words=True), html.bullets(summary.get("notes", []))]
    skipped = summary.get("skipped", [])
    if skipped:
        more = [f"and {len(skipped) - SHOWN:,} more, in summary.json"] if len(skipped) > SHOWN else []
        parts.append(html.details("Skipped images", html.bullets([*skipped[:SHOWN], *more])))
    return parts


def _leaks(summary: Mapping[str, Any], named: str, protocol: str) -> list[str]:
    """What of val and test is known from train, by protocol; `protocol` is the run's, "" for none of them."""
    leaks = summary.get("twins", {}).get("leaks", {})
    rows = [
        [f"{name}, {split}", *(held.get(key, "-") for key in TWICE)]
        for name, splits in leaks.items()
        for split, held in splits.items()
    ]
    if not rows:
        return []
    head = [f"{named} in train" if key == "group_in_train" else words for key, words in TWICE.items()]
    parts = [html.heading("Leak check: val and test images known from train", 4)]
    used = leaks.get(protocol, {})
    known = {split: held["any"] for split, held in used.items() if held.get("any")}
    if known:
        words = listed([f"{n:,} {split} images" for split, n in known.items()])
        parts.append(html.box("warning", html.paragraph(f"In this run's protocol {words} are known from train.")))
    elif used:
        parts.append(html.paragraph("None in this run's protocol."))
    return [*parts, html.table(["protocol, split", *head], rows)]


def _found(summary: Mapping[str, Any], named: str) -> list[list[str]]:
    """What the prepared set holds, as rows of (what, value)."""
    size, sizes, pixels = (summary.get(key) or {} for key in ("size", "sizes", "pixels"))
    copies, twins = summary.get("duplicates", {}), summary.get("twins", {})
    rows = [["images", f"{summary['images']:,}"], [named, f"{summary.get('groups', 0):,}"]]
    if summary.get("stage"):
        rows.append(["stage", summary["stage"]])
    if size:
        rows.append(["stored, height x width", f"{size[0]} x {size[1]}"])
    if sizes:
        common = ", ".join(f"{words} ({n:,})" for words, n in sizes["common"])
        rows += [[f"{k}, pixels", "{} to {}, median {}".format(*(sizes[k][i] for i in (0, 2, 1)))] for k in sizes
                 if k != "common"]  # fmt: skip
        rows.append(["most common, width x height", common])
    if pixels:
        rows.append(["train pixels, of 0..1", f"mean {pixels['mean']}, standard deviation {pixels['std']}"])
    if copies:
        rows.append(["equal images", f"{copies['images']:,} in {copies['sets']:,} sets"])
        rows.append(["of these with different labels", count(copies["sets_with_several_labels"], "set")])
    if twins:
        rows.append(["near twins", f"{twins.get('near_pairs', 0):,} pairs of different {named}"])
        rows.append(["left out of protocol clean", count(twins.get("left_out", 0), "image")])
    rows.append([f"{named} with several classes", f"{summary.get('groups_with_several_labels', 0):,}"])
    rows.append(["no body or lung found by the stage", count(len(summary.get("unstaged", [])), "image")])
    rows.append(["skipped", count(len(summary.get("skipped", [])), "image")])
    return rows


def configuration(config: Config, report: Mapping[str, Any], title: str) -> str:
    """Returns the section of settings, versions and machine."""
    facts, own = report["facts"], changed(config, Config())
    parts = [
        html.heading(title, 2, "configuration"),
        html.heading("Fields that differ from the defaults", 3),
        html.table(["", ""], [[path, _words(value)] for path, value in own.items()], words=True)
        if own
        else html.paragraph("None."),
        html.details("The whole configuration (config.json)", html.preformatted(overrides.to_json(config))),
        html.heading("Code and machine", 3),
    ]
    shown = {"commit": "commit", "code": "digest of lungjax's files", "python": "Python", "device_kind": "device",
             "devices": "devices", "hosts": "hosts", "compute_type": "computes in"}  # fmt: skip
    rows = [[words, _words(facts[key])] for key, words in shown.items() if facts.get(key)]
    if "seconds" in facts:
        rows.append(["time, last start to end", duration(facts["seconds"])])
    rows += [[name, version] for name, version in facts.get("versions", {}).items()]
    parts.append(html.table(["", ""], rows, words=True) if rows else html.paragraph("Not recorded."))
    return "\n".join(parts)


def changed(section: Any, usual: Any) -> dict[str, Any]:
    """Returns the leaf fields of `section` that differ from those of `usual`, by dotted path, but for the name."""
    before = fields_of(usual)
    return {k: v for k, v in fields_of(section).items() if v != before[k] and k != "name"}


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def card(
    config: Config,
    report: Mapping[str, Any],
    title: str,
    summary: Mapping[str, Any] | None,
    about: Mapping[str, Any] | None,
) -> str:
    """Returns the model card."""
    told = {
        "Model details": _details(config, report),
        "Intended use": [
            "Made for research: to compare networks, training and test protocols on this data set.",
            "For people who can judge whether data and protocol answer their question.",
            "Out of scope: diagnosis, triage or any other decision about a person, and images of another kind than "
            "the training images.",
        ],
        "Factors": _factors(report),
        "Metrics": _metrics(config, report),
        "Evaluation data": _evaluation(config, report, summary),
        "Training data": _training(config, report),
        "Quantitative analyses": [
            "By class, by patient and by source: see Results. Class and source together: only the counts are given.",
        ],
        "Ethical considerations": _ethics(config, report, about),
        "Caveats and recommendations": _caveats(report),
    }
    parts = [html.heading(title, 2, "card")]
    parts.append(
        html.linked(
            "Headings of Mitchell et al. 2019, https://arxiv.org/abs/1810.03993. Filled in by the run from what it "
            "knows; what it can't know is named, for the person who passes the network on."
        )
    )
    for words, lines in told.items():
        parts += [html.heading(words, 3), html.bullets(lines)]
    return "\n".join(parts)


def _details(config: Config, report: Mapping[str, Any]) -> list[str]:
    facts, model, optim, best = report["facts"], config.model, config.optim, report["best"]
    height, width = config.input.size
    size = f", {facts['parameters']:,} parameters" if "parameters" in facts else ""
    start = "random numbers" if model.weights == "none" else model.weights
    lines = [
        f"Network: {model.name}{size}; classes in label order: {', '.join(report['classes'])}.",
        f"Input: {height} x {width} pixels, {count(config.input.network_channels, 'channel')}. Output: a probability "
        "of each class.",
        f"Started from {start}; trained: {optim.tune}; {optim.name}, learning rate {optim.lr:g} ({optim.schedule}), "
        f"batch {config.train.batch_size}, {facts.get('steps', '?')} steps, seed {config.train.seed}.",
        f"Weights that are tested: {'of each fold' if 'folds' in facts else 'step {}'.format(best['step'])}, "
        + (
            "the last."
            if config.train.keep == "last"
            else f"the best by val {best['monitor']}"
            + ("." if best.get("score") is None else f" ({best['score']:.4f}).")
        ),
        f"Made with lungjax {facts.get('versions', {}).get('lungjax', 'of unknown version')}, commit "
        f"{facts.get('commit') or 'unknown'}.",
        "Not recorded by the run: who answers for the network, how to reach them, and under which licence the weights "
        "are given.",
    ]
    if model.noncommercial:
        lines.append(
            "First weights whose licence forbids commercial use were allowed (model.noncommercial): what was learned "
            "from them may be bound by it."
        )
    return lines


def _factors(report: Mapping[str, Any]) -> list[str]:
    sources = list(report["test"]["by_source"])
    known = f"sources of the test images: {listed(sources)}" if sources else "the sources of the images are not known"
    return [
        f"Looked at: the class, the patient, and the source; {known}.",
        "Not looked at: age, sex, origin, severity, scanner, dose and anything else; the network may be better for "
        "some people than for others without these numbers showing it.",
    ]


def _metrics(config: Config, report: Mapping[str, Any]) -> list[str]:
    lines = [
        "A class is named where its probability is the highest. Area under the ROC curve, precision, recall, "
        "specificity, NPV and F1 of each class against the rest, and their means over the classes.",
    ]
    if report.get("operating_points"):
        lines.append("Thresholds of single classes were chosen on val and tested on test: see Operating points.")
    false = report["facts"].get("familiarity", {}).get("test")
    if false:
        lines.append(
            "Images unlike the training images are warned about in prediction; wrongly so for "
            f"{false['alarms']:,} of {false['n']:,} test images."
        )
    if report["test"]["slice"].get("intervals"):
        lines.append(
            f"95 % intervals: percentile bootstrap over patients, {config.eval.draws:,} draws. They are of one run "
            "of training; how much another seed would change is not in them."
        )
    else:
        lines.append("No intervals: how much the numbers would change with other patients is not known.")
    return lines


def _evaluation(config: Config, report: Mapping[str, Any], summary: Mapping[str, Any] | None) -> list[str]:
    test, facts, protocol = report["test"], report["facts"], config.data.protocol
    tested = f"{count(test['slice']['n'], 'slice')} of {count(test['patient']['n'], 'patient')}"
    name = facts.get("dataset", config.data.dataset)
    if "external" in facts:
        other = "the data set" if facts["external"]["trained_on"] == name else "not the data set"
        return [f"{tested} of {name} ({facts['external']['split']}), which is {other} of the training images."]
    what = "All parts" if "folds" in facts else "A part" if config.data.folds else "The test split"
    how = "of a cross-validation by patient" if config.data.folds or "folds" in facts else f"of protocol {protocol}"
    lines = [
        f"{what} {how} of {name}: {tested}. From the same data set as the training images, so it is no test on another "
        "hospital's.",
    ]
    leaks = (summary or {}).get("twins", {}).get("leaks", {}).get(protocol, {}).get("test")
    if leaks and _own_splits(config, facts):
        lines.append(f"Of {leaks['images']:,} test images {leaks['any']:,} are known from train (copy, twin or group).")
    return lines


def _training(config: Config, report: Mapping[str, Any]) -> list[str]:
    counts = report["facts"].get("counts", {}).get("train")
    lines = [f"Train images: {', '.join(f'{name} {n:,}' for name, n in counts.items())}."] if counts else []
    augment = changed(config.augment, AugmentConfig())
    words = ", ".join(f"{k}={_words(v)}" for k, v in augment.items()) or "none"
    weights = config.optim.class_weights
    external = report["facts"].get("external", {})
    return [
        *([f"Data set: {external['trained_on']}."] if external else []),
        *lines,
        f"Sampling: {config.data.sampling}; class weights: {weights}; augmentation: {words}.",
        "Labels are those of the data set; the run did not check them.",
    ]


def _ethics(config: Config, report: Mapping[str, Any], about: Mapping[str, Any] | None) -> list[str]:
    licence = (about or {}).get("licence")
    lines = [
        f"Data licence: {licence}" if licence else "The licence of the data is not known to this page.",
        "This page shows images and file names of the data set: pass it on only where its licence and the patients' "
        "consent allow that.",
    ]
    found = {**({"no_lungs": report["no_lungs"]} if "no_lungs" in report else {}), **(report.get("controls") or {})}
    reached = report["test"]["slice"]["auc_macro"]
    if found:
        words = {"no_lungs": "with the lungs blacked out", "source_only": "from the source alone"}
        shown = [f"{rate(level.get('auc_macro'))} {words.get(name, name)}" for name, level in found.items()]
        lines.append(f"Risk of a shortcut: an AUC of {listed(shown)}, against {rate(reached)} of the network.")
    else:
        lines.append("Whether the network reads marks outside the lungs was not tested.")
    return lines


def _caveats(report: Mapping[str, Any]) -> list[str]:
    return [
        *report["warnings"],
        "Test it on images of the place where it is to be studied, by patient, before any further claim.",
    ]
