"""Fills a reporting guideline from a run: python -m lungjax.checklist RUN --standard=claim|tripod_ai|stard_ai

Prints a Markdown table with each item of the guideline, the answer of the run and its place, and what authors must
state, and writes it to RUN/checklist_STANDARD.md. Only the files of the run are read. The items are in checklist.toml.
"""

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from lungjax import cli
from lungjax.config import AugmentConfig, Config, overrides
from lungjax.report import context, templating
from lungjax.report.templating import count, listed
from lungjax.runtime.files import atomic_write

FLAGS = flags.FLAGS
STANDARDS: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
AUTHORS = "authors must state"
Answer = Callable[[Config, Mapping[str, Any]], str]  # of config.json and report.json; "" if the run has none


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_enum("standard", "claim", list(STANDARDS), "Reporting guideline.")


def main(argv: list[str]) -> None:
    """Prints the checklist and writes it into the run."""
    run = Path(argv[1])
    text = checklist(run, FLAGS.standard)
    path = run / f"checklist_{FLAGS.standard}.md"
    atomic_write(path, text)
    print(f"{text}\n{path}")


def checklist(run: Path, standard: str) -> str:
    """Returns the Markdown of a guideline, filled from a finished run. Raises ValueError if there is no report."""
    if not (run / "report.json").is_file() or not (run / "config.json").is_file():
        raise ValueError(f"{run}: no report.json and config.json; name the folder of a finished run")
    config, report = overrides.read(run / "config.json"), json.loads((run / "report.json").read_text("utf-8"))
    tested = {path.parent.name: json.loads(path.read_text("utf-8")) for path in run.glob("external/*/report.json")}
    report |= {"external": {name: tested[name]["test"] for name in sorted(tested)}}
    rows, missing = [], 0
    for number, section, request, keys, remaining in STANDARDS[standard]["items"]:
        found = [
            (text, place)
            for place, answer in map(ANSWERS.__getitem__, keys.split())
            if (text := answer(config, report))
        ]
        missing += not found
        rest = f"{AUTHORS}: {remaining}" if found and remaining else "" if found else AUTHORS
        texts, places = ("; ".join(dict.fromkeys(part)) for part in zip(*found, strict=True)) if found else ("", "")
        rows.append([number, section, request, texts, places, rest])
    head = ["item", "section", "what to report", "this run", "place", "authors"]
    return templating.render(
        "checklist.md.j2",
        standard=STANDARDS[standard],
        run=run,
        name=report["name"],
        filled=len(rows) - missing,
        items=templating.Table(head, rows, text=True),
    )


def _score(level: Mapping[str, Any], names: Mapping[str, str] = context.HEADLINE) -> str:
    scores = [f"{words} {context.number(level, name)}" for name, words in names.items()]
    return f"{count(level['n'], 'example')}: {', '.join(scores)}"


def _tested(r: Mapping[str, Any]) -> str:
    return f"{count(r['test']['slice']['n'], r['unit'])} of {count(r['test']['patient']['n'], 'patient')} in test"


def _reasons(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {n:,}" for reason, n in reasons.items())


def _partition(c: Config, r: Mapping[str, Any]) -> str:
    splits = r.get("flow", {}).get("splits", {})
    sizes = ", ".join(f"{s} {n['images']:,} images of {n['groups']:,} patients" for s, n in splits.items())
    origin = f"protocol {c.data.protocol}"
    if "folds" in r["facts"] or c.data.folds:
        origin = f"cross-validation, {r['facts'].get('folds', {}).get('count', c.data.folds)} folds by patient"
    elif c.data.test_source:
        origin = f"test is the source {c.data.test_source}"
    return f"{origin}: {sizes}" if sizes else origin


def _disjoint(c: Config, r: Mapping[str, Any]) -> str:
    if c.data.protocol == "study":
        return "the splits of the study, which may share patients; see the leak check in report.md"
    if r["test"]["slice"]["n"] == r["test"]["patient"]["n"]:
        return "patient; no two test images share a patient, so check that the data set has patient IDs"
    return "patient; exact copies and detected near duplicates are also in one split only"


def _missing(c: Config, r: Mapping[str, Any]) -> str:
    columns = r["facts"].get("characteristics", {}).get("all", {}).get("columns", {})
    unknown = {name: v.get("unknown", 0) + v.get("missing", 0) for name, v in columns.items()}
    known = [f"{name} is unknown for {count(n, 'patient')}, who stay included" for name, n in unknown.items() if n]
    images = r.get("flow", {}).get("skipped", {})
    return "; ".join([*known, *([f"images excluded, {_reasons(images)}"] if images else [])])


def _outcomes(c: Config, r: Mapping[str, Any]) -> str:
    counts = r["facts"].get("counts", {})
    return "images, " + "; ".join(f"{s}: {_reasons(n)}" for s, n in counts.items()) if counts else ""


def _flow(c: Config, r: Mapping[str, Any]) -> str:
    stages = {"found": "found", "read": "prepared", "used": "used"}
    flow = r.get("flow")
    return (
        ", ".join(f"{flow[k]['images']:,} images {words}" for words, k in stages.items()) + "; figure" if flow else ""
    )


def _exclusions(c: Config, r: Mapping[str, Any]) -> str:
    reasons = r.get("flow", {}).get("skipped", {}) | r.get("flow", {}).get("removed", {})
    return f"images excluded, {_reasons(reasons) or 'none'}" if "flow" in r else ""


def _preprocessing(c: Config, r: Mapping[str, Any]) -> str:
    i = c.input
    unset = ("0", "1") if c.model.weights == "none" else ("of the weights",) * 2
    mean, std = (templating.plain(v) if v else word for v, word in zip((i.mean, i.std), unset, strict=True))
    size = f"resized to {i.size[0]} x {i.size[1]} ({i.interpolation}), crop {i.crop}"
    return f"{size}, {count(i.channels, 'channel')}, mean {mean}, std {std}"


def _points(c: Config, r: Mapping[str, Any]) -> str:
    points = r.get("operating_points", {}).get("slice", {})
    rules = [
        f"{name}, {rule}: threshold {p['threshold']:.3g}, sensitivity {context.number(p, 'sensitivity')}, "
        f"specificity {context.number(p, 'specificity')}"
        for name, own in points.items()
        for rule, p in own.items()
        if rule == "youden"
    ]
    return f"thresholds chosen on val, evaluated on test: {'; '.join(rules)}" if rules else ""


def _subgroups(c: Config, r: Mapping[str, Any]) -> str:
    groups = {name: len(values) for name, values in r["test"]["subgroups"].items()}
    return "scores by " + listed([f"{name} ({n} values)" for name, n in groups.items()]) if groups else ""


def _robustness(c: Config, r: Mapping[str, Any]) -> str:
    names = [f"{context.CONTROLS.get(k, k)}: AUC {context.number(v, 'auc_macro')}" for k, v in r["controls"].items()]
    return "; ".join(names)


def _imbalance(c: Config, r: Mapping[str, Any]) -> str:
    return f"sampling {c.data.sampling}, class weights {c.optim.class_weights}"


# By key in checklist.toml: the place of the answer, and a function that returns it.
ANSWERS: dict[str, tuple[str, Answer]] = {
    "augmentation": ("config.json: augment", lambda c, r: f"augmentation: {_changes(c)}"),
    "calibration": (
        "report.json: calibration",
        lambda c, r: f"temperature scaling fitted on val; test: {_calibration(r)}" if "calibration" in r else "",
    ),
    "caveats": (
        "report.md: Caveats",
        lambda c, r: f"{count(len(r['warnings']), 'caveat')} of the report" * bool(r["warnings"]),
    ),
    "characteristics": (
        "report.md: Data per split",
        lambda c, r: "table of images, patients and kept columns per split" * ("characteristics" in r["facts"]),
    ),
    "code": ("report.json: facts", lambda c, r: f"lungjax, commit {r['facts'].get('commit') or 'unknown'}, Apache-2.0"),
    "configuration": (
        "config.json",
        lambda c, r: "complete configuration, with which main --experiment repeats the run",
    ),
    "confusion": ("report.md: Confusion", lambda c, r: f"confusion matrix of {_tested(r)}"),
    "dataset": (
        "data.json, report.md: Data",
        lambda c, r: (
            f"{r['facts'].get('dataset', c.data.dataset)}, fingerprint {r['facts'].get('fingerprint', '')[:16]}"
        ),
    ),
    "disjoint": ("config.json: data", _disjoint),
    "ensemble": (
        "report.json: facts",
        lambda c, r: "one network per fold; no averaging" if "folds" in r["facts"] else "none: one network",
    ),
    "evaluation_data": (
        "report.json: external",
        lambda c, r: f"tested on {listed([c.data.dataset, *r['external']])}; the first is the development data set",
    ),
    "exclusions": ("report.json: flow", _exclusions),
    "explain": ("report.json: facts", lambda c, r: r["facts"].get("heat_maps", "")),
    "external": (
        "external/*/report.json",
        lambda c, r: "; ".join(f"{name}, {_score(t['slice'])}" for name, t in r["external"].items()),
    ),
    "failures": (
        "report.md: Worst mistakes",
        lambda c, r: (
            f"confusion matrix and the {len(r['mistakes'])} worst mistakes with heat maps" * bool(r["mistakes"])
        ),
    ),
    "flow": ("plots/flow.png", _flow),
    "imbalance": ("config.json: data, optim", _imbalance),
    "initialization": (
        "config.json: model, optim",
        lambda c, r: (
            f"initial weights: {'random' if c.model.weights == 'none' else c.model.weights}; tuned: {c.optim.tune}"
        ),
    ),
    "labels": ("report.json: classes", lambda c, r: f"labels of the data set: {', '.join(r['classes'])}; not checked"),
    "metrics": ("report.md: Results", lambda c, r: "; ".join(context.METRICS.values())),
    "missing": ("report.json: flow, facts", _missing),
    "model": (
        "config.json: model",
        lambda c, r: (
            f"{c.model.name}, {r['facts'].get('parameters', 0):,} parameters; input {c.input.size[0]} x "
            f"{c.input.size[1]}; a probability for each of {len(r['classes'])} classes"
        ),
    ),
    "operating_points": ("report.json: operating_points", _points),
    "outcomes": ("report.json: facts.counts", _outcomes),
    "output": ("model.json", lambda c, r: "calibrated probability per class; the predicted class is the highest"),
    "outputs": ("predictions_test.csv", lambda c, r: "the probabilities of each test image are stored"),
    "partition": ("config.json: data, report.json: flow", _partition),
    "performance": ("report.json: test", lambda c, r: _score(r["test"]["slice"])),
    "prediction": ("model.json", lambda c, r: "python -m lungjax.predict, or an export, from the files of the run"),
    "predictors": ("config.json: input", lambda c, r: "the pixels of one image; no clinical variables"),
    "preprocessing": ("config.json: input", _preprocessing),
    "robustness": ("report.md: Controls", _robustness),
    "selection": (
        "report.json: best",
        lambda c, r: (
            f"step {r['best']['step']}, "
            + ("the last" if c.train.keep == "last" else f"the best val {c.train.monitor}")
        ),
    ),
    "software": (
        "report.json: facts",
        lambda c, r: templating.plain({"Python": r["facts"].get("python", "unknown")} | r["facts"].get("versions", {})),
    ),
    "sources": (
        "report.json: test.subgroups.source",
        lambda c, r: (
            f"scores per source: {', '.join(names)}" if (names := r["test"]["subgroups"].get("source")) else ""
        ),
    ),
    "subgroups": ("report.json: test.subgroups", _subgroups),
    "subset": (
        "config.json: train, data",
        lambda c, r: f"{100 * c.train.fraction:g} % of the train patients; protocol {c.data.protocol}",
    ),
    "task": ("config.json: model", lambda c, r: f"deep learning ({c.model.name}): {listed(r['classes'], 'or')}"),
    "test_size": ("report.json: test", lambda c, r: _tested(r)),
    "training": (
        "config.json: optim, train",
        lambda c, r: (
            f"{c.optim.name}, learning rate {c.optim.lr:g} ({c.optim.schedule}), batch {c.train.batch_size}, "
            f"{r['facts'].get('steps', '?')} steps, weight decay {c.optim.weight_decay:g}, seed {c.train.seed}"
        ),
    ),
    "uncertainty": (
        "report.json: intervals",
        lambda c, r: f"95 % intervals, bootstrap over patients, {c.eval.draws:,} draws" * bool(c.eval.draws),
    ),
    "unfamiliar": (
        "report.json: facts.novelty",
        lambda c, r: "prediction warns about images unlike the training images" * ("novelty" in r["facts"]),
    ),
}


def _changes(c: Config) -> str:
    return ", ".join(f"{k}={v}" for k, v in context.changed(c.augment, AugmentConfig()).items()) or "none"


def _calibration(r: Mapping[str, Any]) -> str:
    names = {name: context.METRICS[name] for name in ("ece", "brier")}
    return ", ".join(f"{words} {context.number(r['calibration']['calibrated'], name)}" for name, words in names.items())


if __name__ == "__main__":
    cli.run(main, define_flags, ("RUN",))
