"""What can be had without the network's skill: controls that a run's numbers are held against."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lungjax.data import statistics
from lungjax.data.prepared import Prepared
from lungjax.evaluation.predictions import Predictions

# AUC from which on a control is warned about; 0.5 is chance. Without lungs nothing should be left, so a little above
# chance tells. The classes' shares differ between hospitals that are honestly mixed, too: two sources of one size, of
# which one has 60 % of a class and the other 40 %, give 0.6. With 70 and 30 % they give 0.7.
TELLING = {"no_lungs": 0.6, "source_only": 0.7}


def source_only(data: Prepared, split: str = "test") -> Predictions | None:
    """Returns predictions from an image's source alone: the classes' frequencies among the train images of it.

    Of a source that train has not, and of an unknown one (""), nothing is known: those get the frequencies of train.
    See `statistics.frequencies` for the smoothing. None where the train images have fewer than two known sources.
    """
    train, rows = data.rows("train"), data.rows(split)
    sources, labels, classes = data.columns["source"], data.columns["label"], len(data.classes)
    named = train[sources[train] != ""]
    if len(np.unique(sources[named])) < 2 or not len(rows):
        return None
    known = np.isin(sources[rows], sources[named])
    overall = np.bincount(labels[train], minlength=classes) / len(train)
    told = statistics.frequencies(sources, labels, named, rows, classes)
    return Predictions(
        ids=data.columns["file"][rows],
        groups=data.columns["group"][rows],
        sources=sources[rows],
        labels=labels[rows],
        probabilities=np.where(known[:, None], told, overall),
        classes=data.classes,
    )


def warnings(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields a sentence for each control in `report` (as in report.json) whose AUC is high."""
    auc = {name: level["auc_macro"] for name, level in report["controls"].items()}
    high = {name: auc[name] for name in TELLING if auc.get(name) is not None and auc[name] >= TELLING[name]}
    whole = report["test"]["slice"]["auc_macro"]
    reached = "none" if whole is None else f"{whole:.3f}"
    if "no_lungs" in high:
        yield (
            f"With the lungs blacked out the network still reaches a test AUC of "
            f"{high['no_lungs']:.3f} ({reached} with "
            "them): part of what it reads is not in the lungs."
        )
    if "source_only" in high:
        yield (
            f"The source of an image alone, without a pixel of it, gives a test AUC of {high['source_only']:.3f} (the "
            f"network has {reached}): sources give the classes away, and it may have learned to recognise them."
        )
