"""The COVID-XRay-5K study's notebook in Keras 3 on its own images, independent of lungjax, which it does not import.

    python tests/parity/xray_study_keras.py --source=CLONE --work=runs/xray_keras             # five seeds
    python tests/parity/xray_study_keras.py --source=CLONE --work=runs/xray_keras --dropout   # with both dropout layers

CLONE is a folder with data_set/{train,test}/{covid,non}. Needs keras, jax, scipy and pillow, and 5 to 10 minutes per
seed on 2 cores. WORK gets one JSON file per seed; rerun the same command to make the missing ones. Data, network and
training are those of the notebook: Keras's ImageDataGenerator, train images of 265 x 256 and test images of 256 x 256
pixels, one generated image per file in train/covid, all of the last file (here by name; the study's order is unknown),
and 100 times 3 batches. There is no validation, which had no effect. The scores are those of the last weights on all
test images, and on random draws of 96 as the study printed: mean and 2.5th to 97.5th percentile.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")  # before keras is imported

import keras
import numpy as np
from keras.src.legacy.preprocessing.image import ImageDataGenerator
from keras.utils import img_to_array, load_img

STEPS, BATCH, DRAWS, DRAWN = 100 * 3, 32, 2000, 96
COMMON: dict[str, Any] = {
    "rescale": 1 / 255, "shear_range": 0.2, "horizontal_flip": True, "brightness_range": (0.2, 1.0),
    "fill_mode": "nearest",
}  # fmt: skip
OFFLINE = ImageDataGenerator(rotation_range=5, zoom_range=0.3, **COMMON)
ONLINE = ImageDataGenerator(rotation_range=40, width_shift_range=0.2, height_shift_range=0.2, zoom_range=0.2, **COMMON)


class Network(keras.Model):
    """The study's CNN; not a Sequential, which would refuse train images of another size than test images."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stack = []
        for width in (64, 32):
            self.stack += [keras.layers.Conv2D(width, 3, 3, activation="relu"), keras.layers.MaxPooling2D(2, 2)]
            self.stack += [keras.layers.Dropout(dropout)] if dropout else []
        self.stack += [keras.layers.Flatten(), keras.layers.Dense(256, activation="relu")]
        self.stack += [keras.layers.Dense(1, activation="sigmoid")]  # the probability of "non"

    def call(self, x: Any, training: bool = False) -> Any:
        for layer in self.stack:
            x = layer(x, training=training) if isinstance(layer, keras.layers.Dropout) else layer(x)
        return x


def make_train_folder(source: Path, folder: Path) -> None:
    """Links the train images into `folder` and adds those generated from the last file, one per file in train/covid."""
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("covid", "non"):
        (partial / name).mkdir(parents=True)
        for path in (source / name).iterdir():
            (partial / name / path.name).symlink_to(path.resolve())
    originals = sorted((partial / "covid").iterdir())
    keras.utils.set_random_seed(0)
    last = img_to_array(load_img(originals[-1]))[None]
    saving = {"save_to_dir": str(partial / "covid"), "save_prefix": "a", "save_format": "jpg"}
    batches = OFFLINE.flow(last, batch_size=1, **saving)
    while len(list((partial / "covid").iterdir())) < 2 * len(originals):  # names end in a random number and may repeat
        next(batches)
    partial.rename(folder)


def train_and_test(source: Path, train: Path, seed: int, steps: int, dropout: float) -> dict[str, Any]:
    """Returns the labels and probabilities of the test images after training."""
    keras.utils.set_random_seed(seed)
    options = {"batch_size": BATCH, "class_mode": "binary"}
    batches = ONLINE.flow_from_directory(str(train), target_size=(265, 256), follow_links=True, **options)
    model = Network(dropout)
    model.compile(optimizer=keras.optimizers.Adam(), loss="binary_crossentropy", metrics=["accuracy"])
    for step in range(1, steps + 1):
        loss, accuracy = model.train_on_batch(*next(batches))
        if step % 30 == 0 or step == steps:
            print(f"seed {seed}, step {step} of {steps}: mean loss {loss:.4f}, accuracy {accuracy:.4f}", flush=True)
        if step % 3 == 0:
            model.reset_metrics()  # the mean over an epoch, as Keras prints it
    plain = ImageDataGenerator(rescale=1 / 255)
    test = plain.flow_from_directory(str(source / "test"), target_size=(256, 256), shuffle=False, **options)
    outputs = [np.asarray(model.predict_on_batch(test[i][0]))[:, 0] for i in range(len(test))]
    probabilities = np.concatenate(outputs)
    return {
        "parameters": model.count_params(),
        "train": np.bincount(batches.classes).tolist(),
        "labels": test.classes.tolist(),
        "probabilities": probabilities.astype(float).tolist(),
    }


def summarize(runs: list[dict[str, Any]]) -> str:
    """Returns the scores of each run on all test images, and those of draws of 96 from a random run."""
    lines, rng = [], np.random.default_rng(0)
    drawn: list[np.ndarray] = []  # per run: [DRAWS, 2]
    totals = []
    for number, run in enumerate(runs):
        labels, p = np.array(run["labels"]), np.array(run["probabilities"]).clip(1e-7, 1 - 1e-7)
        scores = np.column_stack([(p > 0.5) == labels, -np.log(np.where(labels, p, 1 - p))])  # accuracy and loss
        drawn.append(np.stack([scores[rng.permutation(len(p))[:DRAWN]].mean(axis=0) for _ in range(DRAWS)]))
        found, covid = int((p[labels == 0] <= 0.5).sum()), int((labels == 0).sum())
        totals.append([*scores.mean(axis=0), found / covid])
        lines.append(
            f"seed {number}: accuracy {totals[-1][0]:.4f}, loss {totals[-1][1]:.4f} on {len(p):,} test images; "
            f"{found} of {covid} COVID images found"
        )
    for name, values in zip(("accuracy", "loss", "COVID images found"), np.transpose(totals), strict=True):
        lines.append(f"{name}: mean {values.mean():.4f}, from {values.min():.4f} to {values.max():.4f} over the seeds")
    for name, values in zip(("accuracy", "loss"), np.concatenate(drawn).T, strict=True):
        low, high = np.percentile(values, [2.5, 97.5])
        lines.append(f"{name} of {DRAWN} random test images: mean {values.mean():.4f} ({low:.4f} to {high:.4f})")
    return "\n".join(lines)


def main() -> None:
    """Makes the missing runs and prints the scores of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with data_set/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dropout", action="store_true", help="add the dropout layers (0.25) of the study's README")
    options = parser.parse_args()
    source, train = options.source / "data_set", options.work / "train"
    make_train_folder(source / "train", train)
    runs = []
    for seed in range(options.seeds):
        file = options.work / f"seed{seed}-{options.steps}{'-dropout' * options.dropout}.json"
        if not file.exists():
            result = train_and_test(source, train, seed, options.steps, 0.25 * options.dropout)
            file.with_suffix(".partial").write_text(json.dumps(result))
            file.with_suffix(".partial").rename(file)
        runs.append(json.loads(file.read_text()))
    print(f"{runs[0]['parameters']:,} parameters; train images: {runs[0]['train'][0]} covid, {runs[0]['train'][1]} non")
    print(summarize(runs))


if __name__ == "__main__":
    main()
