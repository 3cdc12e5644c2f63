"""Values of the fields in `Config.auto`, chosen from the number of training images.

It aims at 15 minutes for up to MAX_SMALL images: two cores train EfficientNet-Lite0 on about 25 images/s at 160 px.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lungjax.config import Config, overrides
from lungjax.config.schema import fields_of
from lungjax.data import pipeline
from lungjax.data.prepared import Prepared
from lungjax.runtime.checkpoint import is_begun
from lungjax.runtime.distributed import print_once
from lungjax.training import program
from lungjax.training import workdir as workdirs
from lungjax.weights import download, load

MAX_SMALL = 4000  # training images; five epochs then take about 13 minutes


def resolve(config: Config, data: Prepared, folder: Path, weights_dir: Path | None) -> Config:
    """Returns `config` with values for the fields in `auto`; a run that has begun keeps those of its config.json."""
    if not config.auto:
        return config
    if is_begun(folder) and "config.json" not in workdirs.lost_files(folder):
        saved = overrides.read(folder / "config.json")
        fields = [path for path in fields_of(saved) if {path, path.partition(".")[0]} & {*config.auto}]
        for path in fields:
            config = overrides.override(config, f"{path}={fields_of(saved)[path]}")
        return config
    images = len(pipeline.train_rows(data))
    chosen = []
    for path in config.auto:
        chosen.append(f"{path}={choose(path, config, images, weights_dir)}")
        config = overrides.override(config, chosen[-1])
    print_once(f"Chosen for {images:,} training images: {' '.join(chosen)} (--set=FIELD=VALUE overrides each)")
    return config


def choose(path: str, config: Config, images: int, weights_dir: Path | None = None) -> str | float:
    """Returns the value of a field; those before it in `schema.AUTO` have their final values in `config`."""
    if path == "model.weights":
        try:
            record = load.parse(replace(config.model, weights="imagenet")).record
            assert record is not None
            download.locate(record, weights_dir)
        except ValueError as error:
            print_once(f"Starting from random weights. {error}")
            return "none"
        return "imagenet"
    if path == "optim.lr":
        return 1e-3 if config.model.weights == "none" or config.optim.tune == "head" else 3e-4
    if path == "train.batch_size":  # a power of two that gives at least 10 steps per epoch, if possible
        return 2 ** int(np.clip(np.log2(images / 10), 3, 5))
    if path == "train.epochs":  # 4,000 images in total
        return int(np.clip(4000 / images, 5, 20))
    if path == "input.size":  # larger sets need an accelerator or hours
        return 160 if images <= MAX_SMALL else 224
    if path == "augment":  # for images that are repeated; with five epochs it lowered the AUC of CT slices on val
        return "light" if config.train.epochs > 5 else "none"
    # At a validation, after five or more steps, at most 5 % of BatchNorm's statistics are older than the previous one.
    assert path == "model.momentum", path
    return round(float(np.clip(1 - 3 / program.step_counts(config, images)[1], 0.5, 0.9)), 3)
