"""Mean predictions of an ensemble."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import special

from lungjax.evaluation import bootstrap, predictions
from lungjax.evaluation.predictions import Predictions


def mean(members: Sequence[Predictions]) -> Predictions:
    """Returns the mean of the calibrated probabilities, in the order of the first member.

    Its logits are the logarithms (of findings, the log odds) of the mean uncalibrated probabilities. Raises ValueError
    if the examples, their labels or patients are not the same.
    """
    first, logits = members[0], None
    members = [bootstrap.align(first, p) for p in members]
    scores = [p.logits for p in members if p.logits is not None]
    if len(scores) == len(members):
        tiny = np.finfo(np.float32).tiny
        if first.multilabel:
            sides = (np.mean([special.expit(sign * z) for z in scores], axis=0) for sign in (1, -1))
            present, absent = (np.log(np.maximum(side, tiny)) for side in sides)
            logits = present - absent
        else:
            plain = np.mean([special.softmax(z, axis=1) for z in scores], axis=0)
            logits = np.log(np.maximum(plain, tiny))
    return replace(first, probabilities=np.mean([p.probabilities for p in members], axis=0), logits=logits)


def average(folders: Sequence[Path], split: str) -> Predictions | None:
    """Returns the `mean` of the predictions_SPLIT.csv of several folders.

    Returns None if a file is missing, or if the examples, their labels or patients are not the same in all of them.
    """
    files = [folder / f"predictions_{split}.csv" for folder in folders]
    if not all(file.exists() for file in files):
        return None
    members = [predictions.read(file) for file in files]
    try:
        return mean(members)
    except ValueError:
        return None
