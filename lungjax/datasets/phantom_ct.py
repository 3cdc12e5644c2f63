"""Synthetic chest CT slices of Normal, Pneumonia and COVID-19 patients, drawn by `lungjax.datasets.phantom.slices`."""

import functools
from pathlib import Path

import numpy as np

from lungjax.data.imaging import images
from lungjax.datasets import PrepareOptions
from lungjax.datasets.listing import About, Example, Listing
from lungjax.datasets.phantom import slices as phantom

CLASSES = phantom.CLASSES
SIZES = {"default": (360, 3), "tiny": (24, 2)}  # patients, slices per patient
SHARES = (0.6, 0.15)  # of the patients of a class in train and val; the others are test

ABOUT = About(
    title="synthetic axial chest CT slices: normal, pneumonia, COVID-19; no download",
    origin="none: lungjax draws the images on first use",
    layout="No folder is needed; --seed draws other patients.",
    licence="That of lungjax.",
    citation="lungjax (lungjax/datasets/phantom/slices.py).",
    clean="60 / 15 / 25 percent of the patients of each class; each class has the same share of every scanner.",
)


def listing(source: Path | None, config: str, options: PrepareOptions) -> Listing:
    """Lists the slices of configuration `config`; each is drawn when its bytes are requested."""
    patients, slices = SIZES[config]
    examples = []
    for number, (label, scanner, split) in enumerate(_plan(patients, options.seed)):
        group = f"patient{number:03}"
        patient = phantom.new_patient(options.seed * 100_000 + number, CLASSES[label], scanner)
        for index, level in enumerate(phantom.levels(patient, slices)):
            xmin, ymin, xmax, ymax = map(float, phantom.body_box(patient, level))
            box, image = (xmin, ymin, xmax, ymax), functools.partial(_png, patient, level)
            examples.append(Example(f"{group}_s{index:02}.png", image, label, split, group, scanner.name, box))
    return Listing(CLASSES, examples, body=True)


def _plan(patients: int, seed: int) -> list[tuple[int, phantom.Scanner, str]]:
    """Returns label, scanner and split of each patient, in shuffled order."""
    rng = np.random.default_rng([seed, 20])
    plan: list[tuple[int, phantom.Scanner, str]] = []
    count = patients // len(CLASSES)
    train, val = (round(share * count) for share in SHARES)
    for label in range(len(CLASSES)):
        split = rng.permutation(["train"] * train + ["val"] * val + ["test"] * (count - train - val))
        plan += [(label, phantom.SCANNERS[i % len(phantom.SCANNERS)], str(split[i])) for i in range(count)]
    return [plan[i] for i in rng.permutation(len(plan))]


def _png(patient: phantom.Patient, level: float) -> bytes:
    return images.encode(phantom.gray(phantom.draw_slice(patient, level).hu, patient.window))
