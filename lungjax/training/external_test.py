"""External validation: the best weights of a run on another prepared data set with new patients.

python -m lungjax.main --mode=evaluate --workdir=RUN --dataset=OTHER --label_map=NCP=COVID-19,CP=Pneumonia,Normal=-
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logsumexp, softmax

from lungjax import datasets
from lungjax.config import Config, metadata, nearest, overrides
from lungjax.data import pipeline, summary
from lungjax.data.labels import indicators
from lungjax.data.prepared import SPLITS, Prepared
from lungjax.datasets import overlap
from lungjax.evaluation import baselines, calibration, predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.report import write as reporting
from lungjax.runtime import distributed
from lungjax.runtime.checkpoint import restore_best
from lungjax.training import final_report, program, setup
from lungjax.training.setup import Run

TESTABLE_SPLITS = (*SPLITS, "all")
IGNORED = "-"  # right-hand side of a label map for a class that is not tested


@dataclass(frozen=True)
class LabelMap:
    """Maps the classes of the run and of the other data set to tested classes."""

    classes: tuple[str, ...]  # tested classes, in the order of the first class of the run in each
    members: tuple[tuple[int, ...], ...]  # per tested class, the classes of the run whose probabilities are added
    labels: tuple[int, ...]  # per class of the other data set, the index in `classes`; -1 is ignored


def evaluate(
    config: Config,
    workdir: Path,
    data_dir: Path,
    dataset: str,
    label_map: str = "",
    split: str = "test",
    drop_overlap: bool = False,
) -> Path:
    """Tests the run in `workdir` on another data set; returns WORKDIR/external/NAME/report.md.

    `config` is that of the run; fields that do not change weights may differ. `data_dir` has both data sets. The other
    one has the clean protocol; `split` is one of TESTABLE_SPLITS, `label_map` as in `read_map`; `drop_overlap` drops
    patients that the run has seen. NAME is `dataset` with "_" for "/", and ends with `split` unless it is test.

    Temperature, thresholds and test-time augmentation are those in the run's model.json. If the label map joins or
    leaves out classes of the run, thresholds are chosen on the run's val split with the label map applied. Raises
    ValueError for a missing run, data set, class or split, or if the run has seen some of the images.
    """
    started = time.time()
    path = workdir / metadata.FILE
    model = metadata.read(path) if path.exists() else None  # the run may not be finished
    if model and config.eval.tta != model.tta:
        if config.eval.tta != overrides.read(workdir / "config.json").eval.tta:
            setting = f"--set=eval.tta={config.eval.tta}"
            raise ValueError(
                f"{setting}: the run was calibrated with eval.tta={model.tta}; first test the run itself with {setting}"
            )
        config = replace(config, eval=replace(config.eval, tta=model.tta))
    run = distributed.run_on_all_hosts(lambda: setup.set_up(config, workdir, data_dir, "evaluate", started))
    other = distributed.run_on_all_hosts(lambda: datasets.open_dataset(dataset, data_dir))
    distributed.check_same(
        {
            "the configuration": overrides.to_json(run.config),
            "the prepared data": run.data.fingerprint + other.fingerprint,
            "--label_map, --split and --overlap": f"{label_map} {split} {drop_overlap}",
        }
    )
    findings = run.data.columns["label"].ndim == 2
    if findings or other.columns["label"].ndim == 2:
        other = with_findings(other, run.data, label_map)
    mapping = read_map(label_map, other.classes, run.data.classes)
    # Images that are stored upside down are rotated to the orientation of the training images.
    selected = replace(select(other, mapping, split), rotate=other.orientation != run.data.orientation)
    what = "every split" if split == "all" else f"the {split} split"
    view, notes = distributed.run_on_all_hosts(
        lambda: overlap.check(run.data, selected, data_dir, f"{what} of {other.name}", drop_overlap)
    )
    notes += _notes(run.config, run.data, view)
    variables, step = restore_best(workdir, run.program.abstract_state.variables)
    temperature, points = (model.temperature, model.points) if model else (1.0, None)
    results = {}
    with program.memory_advice(run.config, run.program.mesh.size):
        for name, images in (("test", view), ("no_lungs", datasets.without_lungs(view, data_dir))):
            if images is not None:
                results[name] = _predict(run, variables, images, mapping, model)
    if model:
        own_val = predictions.read(workdir / "predictions_val.csv")
        results["val"] = own_val if findings else map_val(own_val, mapping, run.data.name, temperature)
        notes.append(f"Thresholds and temperature come from the val split of {run.data.name}, the run's own data.")
    else:
        notes.append("The run is not finished: its probabilities are not calibrated, and it has no thresholds.")
    counts = indicators(results["test"].labels, len(mapping.classes)).sum(axis=0)
    facts = final_report.describe(run) | {
        "dataset": other.name,
        "classes": list(mapping.classes),
        "fingerprint": other.fingerprint,
        "counts": {"test": dict(zip(mapping.classes, counts.tolist(), strict=True))},
        "characteristics": summary.characteristics(view),
        "best_step": step,
        "seconds": round(time.time() - started, 1),
        "external": {
            "trained_on": run.data.name,
            "split": split,
            "label_map": {
                name: IGNORED if index < 0 else mapping.classes[index]
                for name, index in zip(other.classes, mapping.labels, strict=True)
            },
        },
        "notes": [f"Tested on {what} of {other.name}; the model was trained and selected on {run.data.name}.", *notes],
    }
    suffix = "" if split == "test" else f"_{split}"
    folder = workdir / "external" / (other.name.replace("/", "_") + suffix)
    # A heat map explains one class of the run, not a tested class that merges several.
    unmerged = all(len(members) == 1 for members in mapping.members)
    explain_class, heat_maps = final_report.explainer(run, variables) if unmerged else (None, {})
    run_classes = np.asarray([members[0] for members in mapping.members])
    explain = explain_class and (lambda images, targets: explain_class(images, run_classes[targets]))
    description = datasets.describe(other, data_dir)
    reader, rows = pipeline.Reader(view, run.config.input), view.rows("test")

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        report = reporting.write_report(
            folder, run.config, results, [], facts | heat_maps, lambda i: reader(rows[i]), explain, **description,
            temperature=temperature, points=points if model and mapping.classes == model.classes else None,
        )  # fmt: skip
        for warning in baselines.warnings(report):
            distributed.print_once(warning)

    distributed.on_first_host(write)
    return folder / "report.md"


def _predict(
    run: Run, variables: dict[str, Any], images: Prepared, mapping: LabelMap, model: metadata.Metadata | None
) -> Predictions:
    """Returns the calibrated predictions of the tested classes on the test split of `images`."""
    labels, temperature = images.columns["label"], model.temperature if model else 1.0
    if labels.ndim == 2:
        result = calibration.apply_temperature(run.predict(variables, "test", images), temperature)
    else:
        # Labels of the other data set are not classes of the run, so `map_predictions` sets them later.
        unlabeled = replace(images, classes=run.data.classes, columns=images.columns | {"label": np.zeros_like(labels)})
        predicted = run.predict(variables, "test", unlabeled)
        result = map_predictions(predicted, mapping, labels[images.rows("test")], temperature)
    return predictions.with_rule(result, model.aggregate) if model and model.aggregate != "mean" else result


def with_findings(other: Prepared, own: Prepared, label_map: str) -> Prepared:
    """Returns `other` with the findings of `own`, unknown if `other` lacks them, for a run on several findings.

    Raises ValueError if only one of the two has several findings, for a label map, or if they have none in common.
    """
    labels, shared = other.columns["label"], [name for name in own.classes if name in other.classes]
    if labels.ndim != own.columns["label"].ndim:
        several = own if own.columns["label"].ndim == 2 else other
        raise ValueError(
            f"{other.name} can't test a run on {own.name}: only {several.name} has several findings per image"
        )
    if label_map or not shared:
        advice = "findings are matched by name; rename the columns in labels.csv to those of the run"
        raise ValueError(f"{advice}: {', '.join(own.classes)} (--label_map is for one class per image)")
    columns = [
        labels[:, other.classes.index(name)] if name in shared else -np.ones_like(labels[:, 0]) for name in own.classes
    ]
    return replace(other, classes=own.classes, columns=other.columns | {"label": np.stack(columns, axis=1)})


def read_map(text: str, other_classes: Sequence[str], run_classes: Sequence[str]) -> LabelMap:
    """Parses "A=X,B=Y+Z,C=-", where A is the class X of the run, B is Y or Z, and C is ignored; "" for equal classes.

    Classes of the other data set with the same right-hand side are tested as one class; probabilities of run classes
    without an entry are dropped. The tested classes are named after those of the run, such as "Y+Z". Raises ValueError
    for unknown, missing, repeated or overlapping names, or for fewer than two tested classes.
    """
    if not text:
        if set(other_classes) != set(run_classes):
            names = f"{', '.join(other_classes)}, but those of the run are {', '.join(run_classes)}"
            hint = f"--label_map={other_classes[0]}={run_classes[0]},... (CLASS={IGNORED} ignores a class)"
            raise ValueError(f"the classes of the data set are {names}: map them with {hint}")
        indices = [list(run_classes).index(name) for name in other_classes]
        return LabelMap(tuple(run_classes), tuple((i,) for i in range(len(run_classes))), tuple(indices))
    entries: list[tuple[str, tuple[int, ...]]] = []
    for item in text.split(","):
        name, equals, right = (part.strip() for part in item.partition("="))
        if not equals or not right:
            raise ValueError(f"--label_map={text}: {item!r} is not CLASS=CLASS, CLASS=CLASS+CLASS or CLASS={IGNORED}")
        if name not in other_classes:
            raise ValueError(f"--label_map={text}: the data set has no class {name!r}; {nearest(name, other_classes)}")
        members = [] if right == IGNORED else [member.strip() for member in right.split("+")]
        for member in members:
            if member not in run_classes:
                raise ValueError(f"--label_map={text}: the run has no class {member!r}; {nearest(member, run_classes)}")
        entries.append((name, tuple(sorted({list(run_classes).index(member) for member in members}))))
    counts = Counter(name for name, _ in entries)
    for name in other_classes:
        if counts[name] != 1:
            raise ValueError(f"--label_map={text}: {name} needs exactly one entry; {name}={IGNORED} ignores it")
    targets = dict(entries)
    groups = sorted({target for target in targets.values() if target})
    for i, count in Counter(i for target in groups for i in target).items():
        if count > 1:
            raise ValueError(f"--label_map={text}: {run_classes[i]} is on two right-hand sides; only one is allowed")
    if len(groups) < 2:
        raise ValueError(f"--label_map={text}: at least two tested classes are needed")
    return LabelMap(
        classes=tuple("+".join(run_classes[i] for i in target) for target in groups),
        members=tuple(groups),
        labels=tuple(groups.index(targets[name]) if targets[name] else -1 for name in other_classes),
    )


def select(other: Prepared, mapping: LabelMap, split: str) -> Prepared:
    """Returns the other data set with the mapped images of `split` for testing. Raises ValueError if there are none."""
    splits = other.columns["split"]
    in_split = splits != "" if split == "all" else splits == split
    labels = other.columns["label"]
    in_test = in_split & (labels.max(axis=1) >= 0 if labels.ndim == 2 else np.asarray(mapping.labels)[labels] >= 0)
    if not in_test.any():
        allowed = ", ".join(TESTABLE_SPLITS)
        raise ValueError(f"{other.name}: no image to test in split {split}; --split is one of {allowed}")
    return replace(other, columns=other.columns | {"split": np.where(in_test, "test", "")})


def map_predictions(
    predicted: Predictions, mapping: LabelMap, labels: np.ndarray, temperature: Any = 1.0
) -> Predictions:
    """Converts predictions over the classes of a run to calibrated predictions over the tested classes.

    Adds the probabilities of the members of each class at the run's temperature, by the log-sum-exp of logits, which
    stays accurate for confident networks; the resulting logits are those at temperature 1. `labels` [N] are labels of
    the other data set, all of them mapped.
    """
    logits = predicted.logits
    if logits is None:
        logits = np.log(np.maximum(predicted.probabilities, np.finfo(np.float32).smallest_subnormal))

    def merged(temperature: float) -> np.ndarray:
        scaled = logits.astype(np.float64) / temperature
        return np.stack([logsumexp(scaled[:, list(members)], axis=1) for members in mapping.members], axis=1)

    return replace(
        predicted,
        labels=np.asarray(mapping.labels)[labels],
        probabilities=softmax(merged(temperature), axis=1).astype(np.float32),
        logits=merged(1.0).astype(np.float32),
        classes=mapping.classes,
    )


def map_val(val: Predictions, mapping: LabelMap, name: str, temperature: Any = 1.0) -> Predictions:
    """Maps predictions on the run's val split; drops other classes, and prefixes patients with the data set's name."""
    indices = {i: k for k, members in enumerate(mapping.members) for i in members}
    own = replace(mapping, labels=tuple(indices.get(i, -1) for i in range(len(val.classes))))
    val = predictions.take(val, np.flatnonzero(np.asarray(own.labels)[val.labels] >= 0))
    groups = np.asarray([f"{name}: {group}" if group else "" for group in val.groups.tolist()], np.str_)
    return replace(map_predictions(val, own, val.labels, temperature), groups=groups)


def _notes(config: Config, own: Prepared, view: Prepared) -> list[str]:
    """Returns caveats about differences in the input images."""
    notes, rows, columns = [], view.rows("test"), view.columns
    stages = [datasets.resolve(data.name)[0].stage for data in (own, view)]
    if stages[0] != stages[1]:
        was, now = (f"images of the stage {stage}" if stage else "unprocessed images" for stage in stages)
        notes.append(f"The run was trained on {was} and is tested on {now}.")
    if config.input.crop == "box":
        zeros = np.zeros_like(columns["width"])
        full = np.column_stack([zeros, zeros, columns["width"], columns["height"]])
        without = int((columns["box"] == full).all(axis=1)[rows].sum())
        if without:
            notes.append(f"Unlike in training, {without:,} of {len(rows):,} images have no box and are not cropped.")
    return notes
