"""Shared fixtures: a small data set in memory, a trained run, the folder of real images, and a compilation cache."""

import atexit
import os
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from absl import flags

# Workers of pytest-xdist and subprocesses of the tests compile the same programs, so all share one temporary cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lungjax-test-xla-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

ROOT = Path(__file__).parent.parent
flags.FLAGS.mark_as_parsed()


def without_pictures(patch) -> None:
    """Omits the figures of reports, which take half the time of a small run."""
    from lungjax.report import write

    patch.setattr(write, "draw", lambda *_, **__: {})


@pytest.fixture
def no_pictures(monkeypatch):
    without_pictures(monkeypatch)


@pytest.fixture
def small_network(monkeypatch, small_data):
    """Makes runs use the small data and find the small network."""
    import small_runs

    small_runs.patched(monkeypatch, small_data)


@cache
def small_bn():
    """Returns the constructor of a network with BatchNorm that compiles in a second."""
    from lungjax.models.transfusion import Transfusion

    return partial(Transfusion, 3, (4, 8))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images for development; only tests that need it may be skipped."""
    path = ROOT / os.environ.get("LUNGJAX_SHARED", "../shared")
    if not path.is_dir():
        pytest.skip("no real images: LUNGJAX_SHARED is not a folder")
    return path


def make_small_data():
    """Returns 60 images of 40 x 40 in three classes that differ in the position of a bright square."""
    from folders import encoded

    from lungjax.data.prepared import Prepared

    rng = np.random.default_rng(0)
    n = 60
    labels = np.arange(n) % 3
    records = []
    for i, label in enumerate(labels):
        image = rng.integers(0, 60, (40, 40), dtype=np.uint8)
        image[10:25, 2 + 12 * label : 12 + 12 * label] += 150
        records.append({"image": encoded(image), "label": label, "file": f"{i}.png"})
    split = np.asarray(["train"] * 36 + ["val"] * 11 + ["test"] * 13)
    return Prepared(
        name="folder/small",
        classes=("left", "middle", "right"),
        columns={
            "file": np.asarray([f"{i:02}.png" for i in range(n)]),
            "label": labels.astype(np.int64),
            "split": split,
            "group": np.asarray([f"p{i // 3}" for i in range(n)]),
            "source": np.asarray(["a", "b"] * (n // 2)),
            "width": np.full(n, 40),
            "height": np.full(n, 40),
            "box": np.tile(np.asarray([0, 0, 40, 40], np.float32), (n, 1)),
        },
        records=records,
        window=None,
        fingerprint="0" * 64,
    )


@pytest.fixture(scope="session")
def small_data():
    return make_small_data()


class TrainedRun(NamedTuple):
    """A finished run and its data; copy it before changing anything."""

    workdir: Path  # config.json, model.json, checkpoints, report.html, predictions_test.csv, ...
    data_dir: Path  # of the prepared data set folder/mine
    images: Path  # folder of its 36 PNG files p000.png to p035.png and labels.csv
    classes: tuple[str, ...]


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> TrainedRun:
    """The network `simple`, trained for two steps on folder/mine: 3 classes, 32 x 32 pixels.

    Each class has 3 patients in train, 2 in val and 1 in test, with 2 images each. Any process can open the run.
    """
    import folders

    from lungjax.config import overrides
    from lungjax.training import train

    root, classes = tmp_path_factory.mktemp("trained"), ("left", "middle", "right")
    splits = ("train", "train", "train", "val", "val", "test")
    folders.prepare(root, "mine", folders.rows(classes, 6, splits=splits))
    train.run(overrides.override(folders.CONFIG, "data.dataset=folder/mine"), root / "run", root / "data")
    return TrainedRun(root / "run", root / "data", root / "in_mine", classes)
