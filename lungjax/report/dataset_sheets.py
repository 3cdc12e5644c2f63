"""The picture sheets of a data set's page: samples, stages, augmented images, and what is there twice.

A sheet is a function that draws its figures and returns the section's HTML.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lungjax import datasets
from lungjax.config import AugmentConfig, InputSpec
from lungjax.data import prepared, statistics
from lungjax.data.imaging import images
from lungjax.data.prepared import Prepared
from lungjax.report import dataset_charts, html
from lungjax.report.dataset_charts import Tile

PAIRS = 12  # of each kind, side by side
TRIED = 12  # images of which the one with most lung is augmented
SLICES = 5  # on the sheet of the stages
DRAWS = 11  # augmented images beside each original
LONGEST = 600  # pixels of an image on a sheet


@dataclasses.dataclass(frozen=True)
class View:
    """A data set that is looked at: its images and what is known of them."""

    data: Prepared
    data_dir: Path
    out: Path  # where figures go
    seed: int
    masks: bool  # the images are CT slices, so bodies and lungs can be found in them

    @cached_property
    def rng(self) -> np.random.Generator:
        """Draws the images that are shown."""
        return np.random.default_rng(self.seed)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What `lungjax.prepare` found."""
        where = prepared.directory(self.data_dir, self.data.name) / "summary.json"
        found: dict[str, Any] = json.loads(where.read_text("utf-8"))
        return found

    @cached_property
    def usual(self) -> int:
        """A train image of the biggest source; of CT slices one with much lung."""
        rows = self.data.rows("train")
        sources, count = np.unique(self.data.columns["source"][rows], return_counts=True)
        rows = rows[self.data.columns["source"][rows] == sources[np.argmax(count)]]
        few = statistics.spread(np.unique(rows), self.data, TRIED, self.rng)
        if not self.masks:
            return few[0]
        from lungjax.data.imaging import lung_masks

        return max(few, key=lambda row: float(lung_masks.lung_mask(self.gray(row)).mean()))

    def gray(self, row: int) -> np.ndarray:
        """Returns an image as uint8 [h, w]. Raises ValueError naming the file if it can't be read."""
        return images.gray(self._decoded(row))

    def picture(self, row: int) -> np.ndarray:
        """Returns an image for a sheet, not too large, uint8 [h, w] or [h, w, 3]."""
        image = Image.fromarray(self._decoded(row))
        image.thumbnail((LONGEST, LONGEST))
        return np.asarray(image)

    def _decoded(self, row: int) -> np.ndarray:
        try:
            image = images.decode(self.data.records[int(row)]["image"], self.data.window)
        except ValueError as error:
            raise ValueError(f"{self.data.name}: {self.data.columns['file'][row]}: {error}") from None
        return np.rint(image).astype(np.uint8)

    def text(self, column: str, row: int) -> str:
        """Returns what a column of text says of a row."""
        return str(self.data.columns[column][row])

    def where(self, row: int) -> tuple[str, ...]:
        """Returns lines on where an image comes from and in which split it is."""
        source = self.text("source", row)
        return (*([f"source: {source}"] if source else []), str(statistics.cells(self.data)[row]) or "in no split")

    def figure(self, file: str, caption: str, rows: Sequence[int] = ()) -> str:
        """Returns a figure's HTML, with the names of the files of `rows`."""
        return html.figure(file, caption, [self.text("file", row) for row in rows])


def samples(view: View, count: int) -> str:
    """Some images of each class."""
    named = view.summary["group_name"]
    parts = [
        html.heading("Samples", 2),
        html.paragraph(f"Drawn by seed {view.seed}, spread over sources and {named}."),
    ]
    for label, name in enumerate(view.data.classes):
        rows = statistics.spread(np.flatnonzero(view.data.columns["label"] == label), view.data, count, view.rng)
        if rows:
            tiles = [Tile(view.picture(row), (view.text("file", row), *view.where(row))) for row in rows]
            dataset_charts.sheet(tiles, view.out / f"samples_{label}.png", 6)
            figure = view.figure(f"samples_{label}.png", f"{len(rows)} images of {name}.", rows)
            parts += [html.heading(name, 3), figure]
    return "\n".join(parts)


def stages(view: View) -> str:
    """The stages of some slices with the masks that they are made with."""
    heading, stage = html.heading("Stages and masks", 2), datasets.resolve(view.data.name)[0].stage
    if not view.masks:
        words = "Left out: masks of body and lungs are for CT slices, and this set was prepared without any. "
        return f"{heading}\n{html.paragraph(words + 'Where its images are CT slices nonetheless, give --stages.')}"
    if stage:
        return f"{heading}\n{html.paragraph(f'Left out: the images of this set are in the stage {stage} already.')}"
    from lungjax.data.imaging import lung_masks, study_masks  # here: scikit-image takes a second

    rows = statistics.spread(np.arange(len(view.data.columns["label"])), view.data, SLICES, view.rng)
    tiles = []
    for row in rows:
        tiles += [_outlined(view, row), *(_staged(view, row, name)[0] for name in lung_masks.ROBUST)]
    dataset_charts.sheet(tiles, view.out / "stages.png", 6)
    # The studies' fixed gray level and contour want a whole body in a lung window; on others they fail, as published.
    whole = max(rows, key=lambda row: _whole_and_bright(view.gray(row)))
    made = [_staged(view, whole, name) for name in study_masks.STAGES]
    dataset_charts.sheet([_outlined(view, whole), *(tile for tile, _ in made)], view.out / "stages_study.png", 6)
    spent = ", ".join(f"{n} {s:.2f} s" for n, (_, s) in zip(study_masks.STAGES, made, strict=True))
    words = "The outlines on the left show whether a mask misses a lesion, or takes in what is no lung."
    caption = "The default stages (prepare --dataset=NAME-STAGE); each row is a slice, of different sources in turn."
    study = f"The published studies' own stages of one slice, and the time of each: {spent}."
    figures = [view.figure("stages.png", caption, rows), view.figure("stages_study.png", study, [whole])]
    return "\n".join([heading, html.paragraph(words), *figures])


def _whole_and_bright(gray: np.ndarray) -> tuple[bool, bool, float]:
    """Says whether lungs are found and the body is bright, as the studies take it; and less the more it is cut off."""
    from lungjax.data.imaging import lung_masks, study_masks

    body = lung_masks.body_mask(gray)
    cut = float(np.concatenate([body[0], body[-1], body[:, 0], body[:, -1]]).mean())
    bright = bool(body.any()) and float((gray[body] > study_masks.THRESHOLD).mean()) > 0.3
    return bool(lung_masks.lung_mask(gray).any()), bright, -cut


def _outlined(view: View, row: int) -> Tile:
    from lungjax.data.imaging import lung_masks

    gray = view.gray(row)
    masks = {"body mask": lung_masks.body_mask(gray), "lung mask": lung_masks.lung_mask(gray)}
    empty = [f"no {name} found" for name, mask in masks.items() if not mask.any()]
    return Tile(gray, (view.text("file", row), *view.where(row), *empty), "original", masks)


def _staged(view: View, row: int, stage: str) -> tuple[Tile, float]:
    from lungjax.data.imaging import lung_masks

    start = time.perf_counter()
    staged = lung_masks.apply(view.gray(row), stage)
    spent = time.perf_counter() - start
    height, width = staged.image.shape
    lines = (f"{width} x {height} pixels", *(() if staged.found else ("none found: one stage before",)))
    return Tile(staged.image, lines, stage), spent


def augmented(view: View, chosen: Mapping[str, AugmentConfig]) -> str:
    """What each preset makes of one train image."""
    height, width = InputSpec().size
    parts = [
        html.heading("Augmentation", 2),
        html.paragraph(
            f"One train image as a network of {width} x {height} pixels gets it, and {DRAWS} draws of seed "
            f"{view.seed}. A finding that the disease is named by should still be seen in them."
        ),
    ]
    for name, config in chosen.items():
        dataset_charts.sheet(_draws(view, view.usual, config), view.out / f"augment_{name}.png", 6)
        fields = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
        values = ", ".join(f"{name}={_value(getattr(config, name))}" for name in fields) or "nothing is changed"
        caption = f"--set=augment={name}: {values}."
        parts += [html.heading(name, 3), view.figure(f"augment_{name}.png", caption, [view.usual])]
    return "\n".join(parts)


def _draws(view: View, row: int, config: AugmentConfig) -> list[Tile]:
    import jax

    from lungjax.data import augment
    from lungjax.data.pipeline import Reader

    margin = config.box_jitter  # room for the edges of the box to move
    spec = InputSpec(crop="box" if margin else "none", box_margin=margin)
    example = Reader(view.data, spec, margin, body=config.exterior > 0).example(row)
    batch = {name: np.repeat(value[None], DRAWS, axis=0) for name, value in example.items()}
    key = jax.random.fold_in(jax.random.key(view.seed), 1)  # as in training with this seed
    places = np.arange(DRAWS, dtype=np.uint32)
    change = jax.jit(augment.augment, static_argnums=(3, 4))
    made = change(batch["image"], places, key, config, spec.size, batch.get("box"), batch.get("body"))
    pictures = np.clip(np.rint(np.asarray(made)), 0, 255).astype(np.uint8)[..., 0]
    draws = [Tile(picture, head=f"draw {i}") for i, picture in enumerate(pictures, 1)]
    return [Tile(Reader(view.data, spec)(row)[..., 0], head="as it is"), *draws]


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def twice(view: View) -> str:
    """Exact copies and near twins, side by side."""
    from lungjax.datasets.build import near_duplicates  # here: with it comes TFDS

    named, leaks = view.summary["group_name"], view.summary["twins"]["leaks"]
    head = ["protocol, split", "images", "exact copy in train", "near twin in train", f"{named} in train", "any"]
    keys = ("images", "exact_twin_in_train", "near_twin_in_train", "group_in_train", "any")
    rows = [[f"{p}, {s}", *(held[k] for k in keys)] for p, of in leaks.items() for s, held in of.items()]
    parts = [
        html.heading("Images that are there twice", 2),
        html.paragraph("Val and test images that are known from train:"),
    ]
    parts.append(html.table(head, rows))
    kinds = {
        "Exact copies": ("the same in every pixel", statistics.copies(view.data)),
        "Near twins": (
            f"one picture saved twice, of different {named}",
            near_duplicates.read(view.data, view.data_dir),
        ),
    }
    for title, (what, pairs) in kinds.items():
        parts.append(html.heading(title, 3))
        if not len(pairs):
            parts.append(html.paragraph(f"None: no two images are {what}."))
            continue
        worst, across, differ = statistics.worst_first(pairs, view.data)
        shown, file = worst[:PAIRS], f"{title.replace(' ', '_').lower()}.png"
        tiles = [Tile(view.picture(row), _described(view, row)) for row in shown.ravel().tolist()]
        dataset_charts.sheet(tiles, view.out / file, 4, paired=True)
        words = f"Pairs of images that are {what}: {len(pairs):,}; in two splits of protocol={view.data.protocol}: "
        words += f"{across:,}; with two labels: {differ:,}."
        caption = f"{len(shown)} of {len(pairs):,} pairs, the most harmful first; the two of a pair stand together."
        parts += [html.paragraph(words), view.figure(file, caption, shown.ravel().tolist())]
    return "\n".join(parts)


def _described(view: View, row: int) -> tuple[str, ...]:
    clean, study = (view.text(key, row) or "left out" for key in ("split", "split_study"))
    splits = f"clean: {clean}, study: {study}" if view.summary["study"] else f"split: {clean}"
    label = view.data.classes[view.data.columns["label"][row]]
    return view.text("file", row), f"label: {label}", splits, f"group: {view.text('group', row)}"
