"""Contact sheets for a data set's page: samples, stages, augmented images and duplicates."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from lungjax import datasets
from lungjax.config import AugmentConfig, InputSpec
from lungjax.data import augment, labels, prepared, statistics
from lungjax.data import summary as summaries
from lungjax.data.imaging import images, lung_masks, study_masks
from lungjax.data.pipeline import Reader
from lungjax.data.prepared import Prepared
from lungjax.report import contact_sheet, context
from lungjax.report.contact_sheet import Section, Tile
from lungjax.report.templating import Figure

MAX_PAIRS = 12  # duplicates on a sheet
MAX_CANDIDATES = 12  # for the typical image, the one with the largest lungs
SLICES = 5  # on the sheet of the stages
DRAWS = 11  # augmented copies of the image
MAX_SIDE = 600  # pixels of an image on a sheet


@dataclasses.dataclass(frozen=True)
class View:
    """A data set with its images and summary, and the output folder."""

    data: Prepared
    data_dir: Path
    out: Path  # for figures
    seed: int
    masks: bool  # whether the images are CT slices, in which bodies and lungs can be segmented

    @cached_property
    def rng(self) -> np.random.Generator:
        """Random generator for choosing images."""
        return np.random.default_rng(self.seed)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Contents of the data set's summary.json."""
        return summaries.read(prepared.directory(self.data_dir, self.data.name))

    @cached_property
    def typical_row(self) -> int:
        """Row of a training image (any, without a train split) from the largest source; a CT slice has large lungs."""
        rows = (
            self.data.rows("train")
            if len(self.data.rows("train"))
            else np.flatnonzero(self.data.columns["split"] != "")
        )
        sources, count = np.unique(self.data.columns["source"][rows], return_counts=True)
        rows = rows[self.data.columns["source"][rows] == sources[np.argmax(count)]]
        candidates = statistics.spread(np.unique(rows), self.data, MAX_CANDIDATES, self.rng)
        if not self.masks:
            return candidates[0]
        return max(candidates, key=lambda row: float(lung_masks.lung_mask(self.gray(row)).mean()))

    def gray(self, row: int) -> np.ndarray:
        """Returns an image as uint8 [h, w]. Raises ValueError with the file name if it can't be read."""
        return images.gray(self.decoded(row))

    def picture(self, row: int) -> np.ndarray:
        """Returns a thumbnail for a sheet, uint8 [h, w] or [h, w, 3]."""
        image = Image.fromarray(self.decoded(row))
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        return np.asarray(image)

    def decoded(self, row: int) -> np.ndarray:
        """Returns an image as uint8 [h, w] or [h, w, 3]. Raises the errors of `gray`."""
        try:
            image = images.decode(self.data.records[int(row)]["image"], self.data.window)
        except ValueError as error:
            raise ValueError(f"{self.data.name}: {self.data.columns['file'][row]}: {error}") from None
        return np.rint(image).astype(np.uint8)

    def text(self, column: str, row: int) -> str:
        """Returns the text of a column."""
        return str(self.data.columns[column][row])

    def origin(self, row: int) -> tuple[str, ...]:
        """Returns the file name, source and split of an image, one line each."""
        source, split = self.text("source", row), str(statistics.cells(self.data)[row])
        return self.text("file", row), *([f"source: {source}"] if source else []), split or "in no split"

    def sheet(
        self, path: str, caption: str, tiles: Sequence[Tile], rows: Sequence[int], paired: bool = False
    ) -> Figure:
        """Draws a sheet; returns its figure with the file names of `rows`."""
        contact_sheet.draw([Section(tiles)], self.out / path, min(4 if paired else 6, len(tiles)), paired)
        return Figure(path, caption, [self.text("file", row) for row in rows])


def samples(view: View, count: int) -> dict[str, Figure]:
    """Draws up to `count` images of each class; returns the figures by class."""
    figures, of_class = {}, labels.indicators(view.data.columns["label"], len(view.data.classes))
    for label, name in enumerate(view.data.classes):
        rows = statistics.spread(np.flatnonzero(of_class[:, label]), view.data, count, view.rng)
        if rows:
            tiles = [Tile(view.picture(row), view.origin(row)) for row in rows]
            figures[name] = view.sheet(f"samples_{label}.png", f"{len(rows)} images of {name}.", tiles, rows)
    return figures


def stages(view: View) -> list[Figure]:
    """Draws the stages of some slices; returns [] without masks, or if a stage was already applied to the data set."""
    if not view.masks or datasets.resolve(view.data.name)[0].stage:
        return []
    rows = statistics.spread(np.arange(len(view.data.columns["label"])), view.data, SLICES, view.rng)
    tiles = []
    for row in rows:
        tiles += [_outlined(view, row), *(_staged(view, row, name) for name in lung_masks.ROBUST)]
    # The fixed threshold and contour of the studies fail on many slices, but work on one with large lungs.
    typical = view.typical_row
    study = [_outlined(view, typical), *(_staged(view, typical, name) for name in study_masks.STAGES)]
    caption = "The default stages (prepare --dataset=NAME-STAGE); one row per slice, from different sources."
    return [
        view.sheet("stages.png", caption, tiles, rows),
        view.sheet("stages_study.png", "The stages of the published studies for one slice.", study, [typical]),
    ]


def _outlined(view: View, row: int) -> Tile:
    gray = view.gray(row)
    masks = {"body mask": lung_masks.body_mask(gray), "lung mask": lung_masks.lung_mask(gray)}
    empty = [f"no {name} found" for name, mask in masks.items() if not mask.any()]
    return Tile(gray, (*view.origin(row), *empty), "original", masks)


def _staged(view: View, row: int, stage: str) -> Tile:
    staged = lung_masks.apply(view.gray(row), stage)
    height, width = staged.image.shape
    lines = (f"{width} x {height} pixels", *(() if staged.found else ("not found: previous stage shown",)))
    return Tile(staged.image, lines, stage)


def augmentations(view: View, presets: Mapping[str, AugmentConfig]) -> dict[str, Figure]:
    """Draws augmentations of a training image for each preset; returns the figures by preset."""
    figures = {}
    for name, config in presets.items():
        fields = context.changed(config, AugmentConfig()).items()
        values = ", ".join(f"{field}={value}" for field, value in fields) or "no augmentation"
        tiles = _draws(view, view.typical_row, config)
        caption = f"--set=augment={name}: {values}."
        figures[name] = view.sheet(f"augment_{name}.png", caption, tiles, [view.typical_row])
    return figures


def _draws(view: View, row: int, config: AugmentConfig) -> list[Tile]:
    margin = config.box_jitter  # space for the edges of the box to move
    spec = InputSpec(crop="box" if margin else "none", box_margin=margin)
    example = Reader(view.data, spec, margin, body=config.exterior > 0).example(row)
    batch = {name: np.repeat(value[None], DRAWS, axis=0) for name, value in example.items()}
    key = jax.random.fold_in(jax.random.key(view.seed), 1)  # as in training with this seed
    places = np.arange(DRAWS, dtype=np.uint32)
    change = jax.jit(augment.augment, static_argnums=(3, 4))
    images = change(batch["image"], places, key, config, spec.size, batch.get("box"), batch.get("body"))
    pictures = np.clip(np.rint(np.asarray(images)), 0, 255).astype(np.uint8)[..., 0]
    draws = [Tile(picture, head=f"draw {i}") for i, picture in enumerate(pictures, 1)]
    return [Tile(Reader(view.data, spec)(row)[..., 0], head="original"), *draws]


def duplicates(view: View) -> list[dict[str, Any]]:
    """Draws exact copies and near duplicates side by side; returns the counts and the figure for each kind."""
    near = f"nearly identical but from different {view.summary['group_name']}"
    return [
        _pairs(view, "Exact copies", "identical in every pixel", statistics.copies(view.data)),
        _pairs(view, "Near duplicates", near, view.data.near),
    ]


def _pairs(view: View, title: str, what: str, pairs: np.ndarray) -> dict[str, Any]:
    kind: dict[str, Any] = {"title": title, "what": what, "pairs": len(pairs), "figure": None}
    if len(pairs):
        worst, kind["across"], kind["labels"] = statistics.worst_first(pairs, view.data)
        rows = worst[:MAX_PAIRS].ravel().tolist()
        tiles = [Tile(view.picture(row), _labels(view, row)) for row in rows]
        caption = f"{len(rows) // 2} of {len(pairs):,} pairs, most harmful first; each pair is side by side."
        kind["figure"] = view.sheet(f"{title.replace(' ', '_').lower()}.png", caption, tiles, rows, paired=True)
    return kind


def _labels(view: View, row: int) -> tuple[str, ...]:
    clean, study = (view.text(key, row) or "excluded" for key in ("split", "split_study"))
    splits = f"clean: {clean}, study: {study}" if view.summary["study"] else f"split: {clean}"
    label = labels.text(view.data.columns["label"][row], view.data.classes)
    return view.text("file", row), f"label: {label}", splits, f"group: {view.text('group', row)}"
