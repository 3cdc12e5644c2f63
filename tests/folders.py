"""Synthetic images and small prepared folders for tests: the class is the position of a bright square."""

import csv
import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from lungjax import datasets
from lungjax.config import Config, EvalConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig

CONFIG = Config(
    name="small",
    input=InputSpec(size=(32, 32), mean=(0.3,), std=(0.2,)),
    model=ModelConfig(name="simple"),
    optim=OptimConfig(lr=3e-2),
    train=TrainConfig(batch_size=8, steps=2, eval_steps=2, log_steps=1, monitor="slice.accuracy"),
    eval=EvalConfig(batch_size=8, examples=1, draws=40),
)


def encoded(image, form="PNG", **options) -> bytes:
    """Returns a Pillow image or an array as the bytes of an image file."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


def picture(place: int, seed: int) -> np.ndarray:
    """A 40 x 40 image of coarse noise, different for each seed, with a square at `place` 0, 1 or 2."""
    noise = np.random.default_rng(seed).integers(0, 90, (10, 10), dtype=np.uint8)
    image = np.kron(noise, np.ones((4, 4), np.uint8))
    image[10:25, 2 + 12 * place : 12 + 12 * place] += 150
    return image


@cache
def chest(seed: int, size: int = 64, vessels: int = 12) -> np.ndarray:
    """A synthetic slice, uint8 [size, size]: body, lungs and vessels whose places and sizes depend on `seed`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    wide, high = rng.uniform(0.38, 0.48), rng.uniform(0.3, 0.42)
    image = 20.0 + 150 * ((x / wide) ** 2 + (y / high) ** 2 < 1)
    for side in (-1, 1):
        image[((x - 0.45 * wide * side) / (0.35 * wide)) ** 2 + (y / (0.7 * high)) ** 2 < 1] = 50
    for _ in range(vessels):
        cy, cx, r = *rng.uniform(-0.4, 0.4, 2), rng.uniform(0.01, 0.04)
        image += rng.uniform(30, 80) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / r**2)
    return np.clip(image + rng.normal(0, rng.uniform(1, 5), image.shape), 0, 255).astype(np.uint8)


def rows(classes, patients, images=2, splits=None, prefix="p", seed=0):
    """Returns rows of labels.csv with images from two sources: `patients` per class and `images` per patient."""
    made = []
    for place, name in enumerate(classes):
        for p in range(patients):
            for i in range(images):
                number = (place * patients + p) * images + i
                split = splits[p] if splits else ""
                made.append(
                    {"path": f"{prefix}{number:03}.png", "label": name, "split": split,
                     "group": f"{prefix}{place}_{p}", "source": ("north", "south")[p % 2],
                     "image": picture(place % 3, 1000 * seed + number)}
                )  # fmt: skip
    return made


def prepare(root: Path, name: str, made) -> None:
    """Writes the images of `made` (arrays, or encoded bytes) and prepares them in root/data as folder/NAME."""
    folder = root / f"in_{name}"
    folder.mkdir()
    for row in made:
        if isinstance(row["image"], bytes):
            (folder / row["path"]).write_bytes(row["image"])
        else:
            Image.fromarray(row["image"]).save(folder / row["path"])
    with (folder / "labels.csv").open("w", newline="") as file:
        columns = ["path", "label", "split", "group", "source"]
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(made)
    datasets.write(f"folder/{name}", folder, root / "data", datasets.PrepareOptions(), quiet=True)
