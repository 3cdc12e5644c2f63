"""External validation: the best weights of a run on another prepared data set, whose patients it has never seen.

    python -m lungjax.main --mode=evaluate --workdir=RUN --dataset=OTHER --label_map=NCP=COVID-19,CP=Pneumonia,Normal=-

Refused where a patient or a picture of the tested images is also among those that the run was trained or validated on;
no flag changes that. Only RUN/external is written to.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungjax import datasets
from lungjax.config import Config, nearest, overrides
from lungjax.data import pipeline
from lungjax.data.prepared import SPLITS, Prepared
from lungjax.datasets import overlap
from lungjax.evaluation import baselines, bootstrap, predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.models import trees
from lungjax.report import write
from lungjax.runtime import distributed, provenance
from lungjax.runtime.checkpoint import restore_best
from lungjax.training import program, train
from lungjax.weights import load

PARTS = (*SPLITS, "all")  # of the other data set, that may be tested
OUT = "-"  # in a label map: a class that is left out


@dataclass(frozen=True)
class LabelMap:
    """How the classes of the other data set are those of the run."""

    classes: tuple[str, ...]  # that are tested, in the order of the run's first class of each
    members: tuple[tuple[int, ...], ...]  # for each, the run's classes whose probabilities are added up
    labels: tuple[int, ...]  # for each class of the other data set, the place in `classes`; -1 is left out


def evaluate(
    config: Config,
    workdir: Path,
    data_dir: Path,
    dataset: str,
    label_map: str = "",
    split: str = "test",
) -> Path:
    """Tests the run in `workdir` on another data set; returns WORKDIR/external/NAME/report.md.

    Args:
      config: of the run, as config.json there; fields that change no weights may differ.
      workdir: of a finished run, or an interrupted one.
      data_dir: holds both prepared data sets: without the run's own nobody can tell whether patients are in both.
      dataset: the other one, with the splits of its clean protocol.
      label_map: "OTHERCLASS=RUNCLASS+RUNCLASS,OTHERCLASS=-,...", see `read_map`; "" where the names are the same.
      split: of the other data set, one of PARTS; NAME ends with it if it isn't test.

    The folder NAME (of the data set, with "_" for "/") holds predictions, report.json, report.md and plots as a run's
    does. Its val split, which thresholds and temperature are chosen on, is the run's own, under the label map.

    Raises ValueError for a run, data set, class or split that isn't there, and where images are not new to the run.
    """
    started = time.time()
    if split not in PARTS:
        raise ValueError(f"--split={split}: {nearest(split, PARTS)}")
    this = distributed.run_on_all_hosts(
        lambda: train.set_up(load.resolve(config), workdir, data_dir, "evaluate", started)
    )
    other = distributed.run_on_all_hosts(lambda: datasets.open_dataset(dataset, data_dir))
    distributed.check_same(
        {
            "the configuration": overrides.to_json(this.config),
            "the prepared data": this.data.fingerprint + other.fingerprint,
            "--label_map and --split": f"{label_map} {split}",
        }
    )
    mapping = read_map(label_map, other.classes, this.data.classes)
    view = tested(other, mapping, split)
    what = "every split" if split == "all" else f"the {split} split"
    notes = distributed.run_on_all_hosts(lambda: overlap.refuse(this.data, view, data_dir, f"{what} of {other.name}"))
    notes += _notes(this.config, this.data, view)
    variables, step = restore_best(workdir, this.program.abstract_state.variables)
    results = {}
    with program.memory_explained(this.config, this.program.mesh.size):
        for name, images in (("test", view), ("no_lungs", datasets.without_lungs(view, data_dir))):
            if images is not None:
                named = replace(images, classes=this.data.classes)  # what the network says; labels come below
                blank = replace(named, columns=images.columns | {"label": images.columns["label"] * 0})
                said = train.predict(this, variables, blank, "test")
                results[name] = mapped(said, mapping, images.columns["label"][images.rows("test")])
    own = workdir / "predictions_val.csv"
    if own.exists():
        results["val"] = of_run(predictions.read(own), mapping, this.data.name)
        notes.append(f"The val split is the run's own, of {this.data.name}; thresholds and temperature come from it.")
    counts = np.bincount(results["test"].labels, minlength=len(mapping.classes))
    facts = {
        "dataset": other.name,
        "classes": list(mapping.classes),
        "fingerprint": other.fingerprint,
        "counts": {"test": dict(zip(mapping.classes, counts.tolist(), strict=True))},
        "parameters": sum(x.size for x in trees.flatten(this.program.abstract_state.params).values()),
        "steps": this.program.steps,
        "best_step": step,
        "compute_type": str(np.dtype(this.program.module.dtype)),
        "seconds": round(time.time() - started, 1),
        **provenance.facts(),
        "external": {
            "trained_on": this.data.name,
            "split": split,
            "label_map": {name: _target(mapping, label) for label, name in enumerate(other.classes)},
        },
        "notes": [f"Tested on {what} of {other.name}; trained and chosen on {this.data.name}.", *notes],
    }
    folder = workdir / "external" / (other.name.replace("/", "_") + f"_{split}" * (split != "test"))
    # A map is of one class of the run: where a tested class is several of them, there is none to show.
    alone = all(len(members) == 1 for members in mapping.members)
    explain = train.explainer(this, variables) if alone else None
    told = datasets.describe(other, data_dir)

    def write() -> None:
        _write(folder, this.config, results, facts, view, explain and _of_run(explain, mapping), told)

    distributed.run_on_all_hosts(lambda: write() if distributed.is_first_host() else None)
    return folder / "report.md"


def _of_run(explain: write.Explain, mapping: LabelMap) -> write.Explain:
    """Returns `explain` for the numbers of tested classes, each of which is one class of the run."""
    ours = np.asarray([members[0] for members in mapping.members])
    return lambda images, targets: explain(images, ours[targets])


def _write(
    folder: Path,
    config: Config,
    results: dict[str, Predictions],
    facts: dict[str, Any],
    view: Prepared,
    explain: write.Explain | None,
    told: dict[str, Any],
) -> None:
    reader, rows = pipeline.Reader(view, config.input), view.rows("test")
    folder.mkdir(parents=True, exist_ok=True)
    said = write.write_report(folder, config, results, [], facts, lambda i: reader(rows[i]), explain, **told)
    for line in baselines.warnings(said):
        train.tell(line)


def read_map(text: str, theirs: Sequence[str], ours: Sequence[str]) -> LabelMap:
    """Reads "A=X,B=Y+Z,C=-": A is the run's class X, B is Y or Z together, C is left out.

    Classes of the other data set with the same right side are tested as one; a class of the run that is on no right
    side is taken for impossible. The tested classes bear the run's names, such as "Y+Z".

    Args:
      text: "" if both have the same names.
      theirs: classes of the other data set in label order.
      ours: those of the run.

    Raises ValueError for an unknown name (with the nearest), one that is missing or given twice, right sides that
    overlap, and fewer than two classes left to tell apart.
    """
    if not text:
        if set(theirs) != set(ours):
            raise ValueError(
                f"the classes of the data set are {', '.join(theirs)}, those of the run {', '.join(ours)}: say with "
                f"--label_map which is which, such as --label_map={theirs[0]}={ours[0]},... ({theirs[0]}={OUT} leaves "
                "a class out)"
            )
        return LabelMap(tuple(ours), tuple((i,) for i in range(len(ours))), tuple(map(list(ours).index, theirs)))
    targets: dict[str, tuple[int, ...]] = {}
    for item in text.split(","):
        name, equals, right = (part.strip() for part in item.partition("="))
        if not equals or not right:
            raise ValueError(f"--label_map={text}: {item!r} is not CLASS=CLASS, CLASS=CLASS+CLASS or CLASS={OUT}")
        if name not in theirs:
            raise ValueError(f"--label_map={text}: the data set has no class {name!r}; {nearest(name, theirs)}")
        if name in targets:
            raise ValueError(f"--label_map={text}: {name} is given twice")
        wanted = [] if right == OUT else [part.strip() for part in right.split("+")]
        for part in wanted:
            if part not in ours:
                raise ValueError(f"--label_map={text}: the run has no class {part!r}; {nearest(part, ours)}")
        targets[name] = tuple(sorted({list(ours).index(part) for part in wanted}))
    missing = [name for name in theirs if name not in targets]
    if missing:
        raise ValueError(
            f"--label_map={text}: nothing is said of {', '.join(missing)}; {missing[0]}={OUT} leaves it out"
        )
    members = sorted({target for target in targets.values() if target})
    used = Counter(i for target in members for i in target)
    twice = [ours[i] for i, times in used.items() if times > 1]
    if twice:
        raise ValueError(
            f"--label_map={text}: {twice[0]} is part of two different right sides; each may be in one only"
        )
    if len(members) < 2:
        raise ValueError(f"--label_map={text}: fewer than two classes are left to tell apart")
    return LabelMap(
        classes=tuple("+".join(ours[i] for i in target) for target in members),
        members=tuple(members),
        labels=tuple(members.index(targets[name]) if targets[name] else -1 for name in theirs),
    )


def _target(mapping: LabelMap, label: int) -> str:
    place = mapping.labels[label]
    return OUT if place < 0 else mapping.classes[place]


def tested(other: Prepared, mapping: LabelMap, split: str) -> Prepared:
    """Returns the other data set with the images of `split` that the map keeps as its test split, and no other.

    Raises ValueError if there is none.
    """
    there = other.columns["split"] if split != "all" else np.where(other.columns["split"] == "", "", "all")
    kept = (there == split) & (np.asarray(mapping.labels)[other.columns["label"]] >= 0)
    if not kept.any():
        raise ValueError(f"{other.name}: no image is left to test in its {split} split; --split={', '.join(PARTS)}")
    return replace(other, columns=other.columns | {"split": np.where(kept, "test", "")})


def mapped(said: Predictions, mapping: LabelMap, labels: np.ndarray) -> Predictions:
    """Returns what a run said about images as probabilities of the tested classes.

    Probabilities of the members of a class are added up and then all divided by their sum; in logits that is a
    log-sum-exp, which stays exact where a network is very sure.

    Args:
      said: over the run's C classes.
      mapping: to K tested classes.
      labels: [N] of the other data set, all of them mapped.
    """
    logits = said.logits
    if logits is None:
        logits = np.log(np.maximum(said.probabilities, np.finfo(np.float32).smallest_subnormal))
    parts = [
        np.logaddexp.reduce(logits[:, members].astype(np.float64), axis=1) for members in map(list, mapping.members)
    ]
    joined = np.stack(parts, axis=1)
    powers = np.exp(joined - joined.max(axis=1, keepdims=True))
    return replace(
        said,
        labels=np.asarray(mapping.labels)[labels],
        probabilities=(powers / powers.sum(axis=1, keepdims=True)).astype(np.float32),
        logits=joined.astype(np.float32),
        classes=mapping.classes,
    )


def of_run(val: Predictions, mapping: LabelMap, name: str) -> Predictions:
    """Returns the run's own predictions as probabilities of the tested classes, without images of other classes.

    Patients are named after the data set, so that no equal name in the other one is taken for the same person.
    """
    place = {i: k for k, members in enumerate(mapping.members) for i in members}
    own = replace(mapping, labels=tuple(place.get(i, -1) for i in range(len(val.classes))))
    kept = np.flatnonzero(np.asarray(own.labels)[val.labels] >= 0)
    val = bootstrap.take(val, kept)
    groups = np.asarray([f"{name}: {group}" if group else "" for group in val.groups.tolist()], np.str_)
    return replace(mapped(val, own, val.labels), groups=groups)


def _notes(config: Config, own: Prepared, view: Prepared) -> list[str]:
    """Returns what a reader should know of how the images are fed, in words."""
    notes, rows, columns = [], view.rows("test"), view.columns
    stages = [datasets.resolve(data.name)[0].stage for data in (own, view)]
    if stages[0] != stages[1]:
        was, now = (f"images of the stage {stage}" if stage else "whole images" for stage in stages)
        notes.append(f"The run was trained on {was} and is tested on {now}.")
    if config.input.crop == "box":
        whole = np.column_stack([0 * columns["width"], 0 * columns["height"], columns["width"], columns["height"]])
        without = int((columns["box"] == whole).all(axis=1)[rows].sum())
        if without:
            notes.append(
                f"The run sees the box of the body (input.crop=box); {without:,} of {len(rows):,} images have none and "
                "are shown whole."
            )
    return notes
