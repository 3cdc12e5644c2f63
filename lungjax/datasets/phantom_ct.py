"""Drawn chest CT slices of Normal, Pneumonia and COVID-19 patients: nothing to download.

See `lungjax.datasets.phantom.slices`. Patients are split 60 / 15 / 25 percent within each class, and each class has the
same share of every scanner.
"""

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image

from lungjax.config import nearest
from lungjax.datasets import PrepareOptions
from lungjax.datasets.listing import About, Example, Listing
from lungjax.datasets.phantom import slices as phantom

CLASSES = phantom.CLASSES
SIZES = {"default": (360, 3), "tiny": (24, 2)}  # patients, slices of each
SHARES = (0.6, 0.15)  # of the patients of a class in train and val; the rest is test


ABOUT = About(
    title="drawn axial chest CT slices: normal, pneumonia, COVID-19; nothing to download",
    origin="nowhere: lungjax draws it on first use",
    layout="There is no folder; --seed draws other patients.",
    licence="Of lungjax itself.",
    citation="lungjax (lungjax/datasets/phantom/slices.py).",
    clean="60 / 15 / 25 percent of the patients of each class; each class has the same share of every scanner.",
)


def listing(source: Path | None, config: str, options: PrepareOptions) -> Listing:
    """Lists the slices of configuration `config`; each is drawn when its bytes are asked for.

    Raises ValueError for an unknown configuration, or a source or pattern, which drawn data cannot use.
    """
    if config not in SIZES:
        raise ValueError(f"unknown configuration {config!r} of phantom_ct; {nearest(config, SIZES)}")
    given = options.for_folders() + (["--source"] if source is not None else [])
    if given:
        raise ValueError(f"{given[0]} is for images that exist: phantom_ct is drawn by lungjax; leave it out")
    patients, slices = SIZES[config]
    examples = []
    for number, (label, scanner, split) in enumerate(_plan(patients, options.seed)):
        group = f"patient{number:03}"
        patient = phantom.new_patient(options.seed * 100_000 + number, phantom.CLASSES[label], scanner)
        for place, level in enumerate(phantom.levels(patient, slices)):
            xmin, ymin, xmax, ymax = phantom.body_box(patient, level)
            examples.append(
                Example(
                    file=f"{group}_s{place:02}.png",
                    image=functools.partial(_png, patient, level),
                    label=label,
                    split=split,
                    group=group,
                    source=scanner.name,
                    box=(float(xmin), float(ymin), float(xmax), float(ymax)),
                )
            )
    return Listing(CLASSES, examples, body=True)


def _plan(patients: int, seed: int) -> list[tuple[int, phantom.Scanner, str]]:
    """Returns label, scanner and split of each patient, in shuffled order."""
    rng = np.random.default_rng([seed, 20])
    plan: list[tuple[int, phantom.Scanner, str]] = []
    for label in range(len(phantom.CLASSES)):
        count = patients // len(phantom.CLASSES)
        train, val = (round(share * count) for share in SHARES)
        split = rng.permutation(["train"] * train + ["val"] * val + ["test"] * (count - train - val))
        plan += [(label, phantom.SCANNERS[i % len(phantom.SCANNERS)], str(split[i])) for i in range(count)]
    return [plan[i] for i in rng.permutation(len(plan))]


def _png(patient: phantom.Patient, level: float) -> bytes:
    out = io.BytesIO()
    image = phantom.gray(phantom.draw_slice(patient, level).hu, patient.window)
    Image.fromarray(image).save(out, "PNG", compress_level=1)  # noise hardly gets smaller with more
    return out.getvalue()
