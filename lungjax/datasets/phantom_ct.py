"""Synthetic chest CT slices of Normal, Pneumonia and COVID-19 patients, drawn by `lungjax.datasets.phantom.slices`.

In the configuration "findings", a patient has consolidation (as in pneumonia), ground glass (as in COVID-19), both or
neither, and some labels of training images are unknown.
"""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.data import labels
from lungjax.data.imaging import images
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import Example, Listing
from lungjax.datasets.phantom import findings as lesions
from lungjax.datasets.phantom import slices as phantom

FINDINGS = ("consolidation", "ground glass")
# The classes by configuration; of patients of the other configuration: neither finding, one of them, or both.
CLASSES = {"default": phantom.CLASSES, "tiny": phantom.CLASSES, "findings": FINDINGS}
COMBINATIONS = ((0, 0), (1, 0), (0, 1), (1, 1))
UNKNOWN = 0.2  # of the labels of train patients with several findings
SIZES = {"default": (360, 3), "tiny": (24, 2), "findings": (360, 3)}  # patients, slices per patient
SHARES = (0.6, 0.15)  # of the patients of a class in train and val; the others are test

ABOUT = files.about("phantom_ct")


def listing(source: Path | None, config: str, options: PrepareOptions) -> Listing:
    """Lists the slices of configuration `config`; each is drawn when its bytes are requested."""
    patients, slices = SIZES[config]
    examples, rng = [], np.random.default_rng([options.seed, 21])
    several = config == "findings"
    plan = _plan(patients, len(COMBINATIONS if several else phantom.CLASSES), options.seed)
    for number, (kind, scanner, split) in enumerate(plan):
        label: Any = kind
        group, seed = f"patient{number:03}", options.seed * 100_000 + number
        patient = phantom.new_patient(seed, phantom.CLASSES[kind % len(phantom.CLASSES)], scanner)
        if several:
            if kind == 3:
                parts = (lesions.new_lesions(name, np.random.default_rng([seed, 2])) for name in phantom.CLASSES)
                patient = replace(patient, lesions=sum(parts, ()))
            known = rng.random(len(FINDINGS)) >= (UNKNOWN if split == "train" else 0)
            label = tuple(int(n) if k else labels.UNKNOWN for n, k in zip(COMBINATIONS[kind], known, strict=True))
        for index, level in enumerate(phantom.levels(patient, slices)):
            xmin, ymin, xmax, ymax = map(float, phantom.body_box(patient, level))
            box, image = (xmin, ymin, xmax, ymax), functools.partial(_png, patient, level)
            examples.append(Example(f"{group}_s{index:02}.png", image, label, split, group, scanner.name, box))
    return Listing(CLASSES[config], examples, body=True)


def _plan(patients: int, kinds: int, seed: int) -> list[tuple[int, phantom.Scanner, str]]:
    """Returns kind (0 to `kinds` - 1), scanner and split of each patient, in shuffled order."""
    rng = np.random.default_rng([seed, 20])
    plan: list[tuple[int, phantom.Scanner, str]] = []
    count = patients // kinds
    train, val = (round(share * count) for share in SHARES)
    for kind in range(kinds):
        split = rng.permutation(["train"] * train + ["val"] * val + ["test"] * (count - train - val))
        plan += [(kind, phantom.SCANNERS[i % len(phantom.SCANNERS)], str(split[i])) for i in range(count)]
    return [plan[i] for i in rng.permutation(len(plan))]


def _png(patient: phantom.Patient, level: float) -> bytes:
    return images.encode(phantom.gray(phantom.draw_slice(patient, level).hu, patient.window))
