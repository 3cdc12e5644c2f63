"""Metadata of a tested run for model.json, and the novelty score of its data set."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lungjax import datasets
from lungjax.config import Config, InputSpec
from lungjax.config.metadata import HU_WINDOWS, NOTICE, Metadata
from lungjax.data import preprocess
from lungjax.data.imaging import images
from lungjax.data.prepared import Prepared
from lungjax.data.summary import split_counts
from lungjax.evaluation import novelty, outliers
from lungjax.models.outputs import positive_class

MAX_IMAGES = 1000  # of a split, for the novelty score
MODIFIED = 50  # test images that are modified to measure its detection rate
BODY_BOX = "Tested with the body boxes of the data set; prediction detects the body, and its box may differ slightly."
SCORES = ("n", "accuracy", "balanced_accuracy", "auc_macro", "ece")


def fit_novelty(data: Prepared) -> novelty.Novelty | None:
    """Fits the novelty score to at most MAX_IMAGES readable images per split; returns None for too few images."""
    try:
        train, val, test = (_pictures(data, split) for split in ("train", "val", "test"))
        return novelty.fit(train, val, test, _outliers(data))
    except ValueError:
        return None


def _outliers(data: Prepared) -> Iterator[tuple[str, Iterator[Any]]]:
    """Yields the kinds of `outliers.builtin`, preprocessed as for prediction, and modified test images."""
    name, _ = datasets.resolve(data.name)
    spec = InputSpec((novelty.SIDE, novelty.SIDE))
    plain = Metadata("", data.classes, spec, data.name, name.stage, name.size, orientation=data.orientation)
    limit = 4 if name.stage.startswith("study") else None  # these stages take up to two seconds per image
    for kind, pictures in outliers.builtin(data.modality).items():
        yield kind, (preprocess.picture(picture, plain)[1] for picture in pictures[:limit])
    yield "test images, inverted", (255 - np.asarray(picture) for picture in _pictures(data, "test", MODIFIED))
    yield "test images, upside down", (np.asarray(picture)[::-1] for picture in _pictures(data, "test", MODIFIED))


def _pictures(data: Prepared, split: str, limit: int = MAX_IMAGES) -> Iterator[Any]:
    rows = np.unique(data.rows(split))
    for row in rows[np.linspace(0, len(rows) - 1, min(len(rows), limit)).round().astype(int)]:
        try:
            yield images.load(data.records[int(row)]["image"], data.window)
        except ValueError:
            continue


def describe(
    config: Config,
    data: Prepared,
    report: Mapping[str, Any],
    detector: novelty.Novelty | None,
    dataset: Mapping[str, Any],
) -> Metadata:
    """Returns the content of model.json for a run that was just tested; `config` is complete and `data` is its data.

    `report` is the content of report.json, `detector` is from `fit_novelty`, `dataset` from `datasets.describe`.
    """
    name, _ = datasets.resolve(data.name)
    volumes = data.volumes or {}
    facts, box = report["facts"], _box(config, data)
    about = dataset.get("about") or {}
    several = len(np.unique(data.columns["group"])) < len(data.columns["group"])  # images of some patient
    return Metadata(
        name=config.name,
        classes=data.classes,
        input=config.input,
        dataset=data.name,
        stage=name.stage,
        stored=name.size,
        box=box,
        window=data.window,
        hu_windows=tuple(tuple(map(float, window)) for window in volumes.get("hu_windows", HU_WINDOWS)),  # type: ignore[misc]
        plane=volumes.get("plane", "axial"),
        position=volumes.get("position", "all"),
        orientation=data.orientation,
        modality=data.modality,
        positive=positive_class(config, data.classes),
        tta=config.eval.tta,
        temperature=report.get("calibration", {}).get("temperature", 1.0),
        aggregate=report.get("aggregate", "mean"),
        points=report.get("operating_points", {}),
        scores={level: _scores(report["test"][level]) for level in ("slice", "patient")},
        counts=facts.get("counts", {}),
        patients={s: n["groups"] for s, n in split_counts(data).items()} if several else {},
        novelty=None if detector is None else detector.to_dict(),
        about={
            "notice": NOTICE,
            "network": config.model.name,
            "weights": config.model.weights,
            "noncommercial_weights": config.model.noncommercial,
            "data_licence": about.get("licence", ""),
            "data_title": about.get("title", ""),
            "protocol": config.data.protocol,
            "warnings": [*report["warnings"], *([BODY_BOX] if box == "body" else [])],
            **{key: facts.get(key) for key in ("parameters", "best_step", "fingerprint", "commit", "versions")},
        },
    )


def _box(config: Config, data: Prepared) -> str:
    name, entry = datasets.resolve(data.name)
    columns = data.columns
    frames = np.column_stack([0 * columns["width"], 0 * columns["height"], columns["width"], columns["height"]])
    if config.input.crop != "box" or (columns["box"] == frames).all():
        return ""
    return "body" if entry.axial and name.base != "folder" else "given"  # boxes that users provide may contain anything


def _scores(level: Mapping[str, Any]) -> dict[str, Any]:
    intervals = level.get("intervals", {})
    return {
        **{key: level.get(key) for key in SCORES},
        "intervals": {key: intervals[key] for key in SCORES if key in intervals},
    }
