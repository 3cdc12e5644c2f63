"""Times the input pipeline against torch's DataLoader and tf.data on the same files, sizes, batches and cores.

    python -m tests.benchmarks.input_pipeline --source=FOLDER --torch_python=PYTHON --tf_python=PYTHON
        [--work=FOLDER] [--drawn=1000] [--rounds=5]

FOLDER contains one folder of JPEG or PNG files per class (default: synthetic slices). The interpreter of --torch_python
needs torch, numpy and Pillow; that of --tf_python needs tensorflow.
"""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import harness

SIDE, BATCH, NAME = 224, 64, "folder/bench"
NAMES = {"source": NAME, "copy": f"{NAME}-{SIDE}"}
CORES = (0, 1)
SECONDS, WARM_UP = 3.0, 1.0  # per turn; the warm-up consumes batches made during other turns
Batches = tuple[str, Iterator[Any]]  # with versions


def torch_batches(files: list[str]) -> Batches:
    import PIL
    import torch
    from PIL import Image

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1000 * len(files)  # no turn reaches the end of an epoch

        def __getitem__(self, index: int) -> tuple[Any, int]:
            with Image.open(files[index % len(files)]) as picture:
                small = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(small)[..., None]), index % 2

    loader = torch.utils.data.DataLoader(Files(), BATCH, shuffle=True, num_workers=len(CORES))
    return f"torch {torch.__version__}, Pillow {PIL.__version__}", iter(loader)


def tf_batches(files: list[str]) -> Batches:
    import tensorflow as tf

    def load(file: Any, label: Any) -> Any:
        as_pillow = {} if files[0].endswith(".png") else {"dct_method": "INTEGER_ACCURATE"}
        decode = tf.io.decode_jpeg if as_pillow else tf.io.decode_png
        image = decode(tf.io.read_file(file), channels=1, **as_pillow)
        image = tf.image.resize(image, (SIDE, SIDE), "bilinear", antialias=True)
        return tf.cast(tf.round(image), tf.uint8), label

    data = tf.data.Dataset.from_tensor_slices((files, [i % 2 for i in range(len(files))]))
    data = data.shuffle(len(files)).repeat().map(load, tf.data.AUTOTUNE).batch(BATCH).prefetch(tf.data.AUTOTUNE)
    options = tf.data.Options()
    options.threading.private_threadpool_size = len(CORES)
    return f"tensorflow {tf.__version__}", data.with_options(options).as_numpy_iterator()


def lungjax_batches(name: str, work: str) -> Batches:
    """Returns the library versions and lungjax's batches from the data set `name`."""
    harness.keep_freed_memory()
    import grain
    import PIL

    from lungjax import datasets
    from lungjax.config import Config, InputSpec, TrainConfig
    from lungjax.data import pipeline

    data = datasets.open_dataset(name, Path(work, "data"))
    config = Config(input=InputSpec(size=(SIDE, SIDE)), train=TrainConfig(batch_size=BATCH))
    batches = pipeline.train_batches(data, config, start=0)
    return f"lungjax, grain {grain.__version__}, Pillow {PIL.__version__}", batches


def family_seconds() -> float:
    """Returns the CPU seconds of this process and of its running and finished children."""
    parents, ticks = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)], ticks[int(entry.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    family = {os.getpid()}
    while children := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= children
    return sum(ticks[pid] for pid in family) / os.sysconf("SC_CLK_TCK")


def contender(name: str, work: str, files: list[str]) -> tuple[dict[str, Any], Callable[[], dict[str, float]]]:
    """Returns the library versions of a contender, and a function that measures one turn."""
    os.sched_setaffinity(0, CORES)
    if name in NAMES:
        versions, batches = lungjax_batches(NAMES[name], work)
    else:
        versions, batches = (torch_batches if name == "torch" else tf_batches)(files)

    def turn() -> dict[str, float]:
        until = time.perf_counter() + WARM_UP
        while time.perf_counter() < until:
            next(batches)
        watch, until, images = harness.Watch(family_seconds), time.perf_counter() + SECONDS, 0
        while time.perf_counter() < until:
            next(batches)
            images += BATCH
        wall, used, others = watch.read()
        return {"rate": images / wall, "of_cpu": images / used, "others": others}

    return {"versions": versions}, turn


def draw(folder: Path, count: int) -> None:
    """Writes `count` synthetic slices as grayscale PNG files of 512 x 512 pixels in one folder per class."""
    for seed in range(count):
        finding, picture = harness.phantom(seed)
        (folder / finding).mkdir(parents=True, exist_ok=True)
        picture.save(folder / finding / f"p{seed:05}.png")


def prepare(source: Path, work: Path) -> list[str]:
    """Prepares the data sets that do not exist yet; returns the paths of the training files."""
    from lungjax import datasets

    for name in NAMES.values():
        if not (work / "data" / name).exists():
            datasets.write(name, source, work / "data", datasets.PrepareOptions())
    data = datasets.open_dataset(NAME, work / "data")
    return [str(source / file) for file in data.columns["file"][data.rows("train")]]


def measure(pythons: dict[str, str], rounds: int, work: Path, files: list[str]) -> dict[str, list[dict[str, float]]]:
    """Runs all contenders in turns; returns the measurements of each, one per round."""
    processes = {}
    for name, python in pythons.items():
        processes[name] = harness.Process(python, "input_pipeline", "contender", name=name, work=str(work), files=files)
        print(f"{name}: {processes[name].answer()['versions']}", flush=True)
    turns = harness.take_turns({name: process.ask for name, process in processes.items()}, rounds)
    for process in processes.values():
        process.close()
    return turns


def rate_table(turns: dict[str, list[dict[str, float]]]) -> str:
    """Returns the table of rates, with their median ratios over the rounds."""
    peers = [name for name in ("torch", "tf") if name in turns]
    heads = ["", "images/s", "lowest..highest", "images per CPU second"]
    heads += [f"{what} / {peer}" for peer in peers for what in ("rate", "per CPU second")] + ["others"]
    values = {name: {key: [turn[key] for turn in own] for key in own[0]} for name, own in turns.items()}
    rows = []
    for name, own in values.items():
        rates = own["rate"]
        cells = [name, f"{statistics.median(rates):.0f}", f"{min(rates):.0f}..{max(rates):.0f}"]
        cells.append(f"{statistics.median(own['of_cpu']):.0f}")
        cells += [harness.ratio(own[key], values[peer][key]) for peer in peers for key in ("rate", "of_cpu")]
        rows.append([*cells, f"{max(own['others']):.0%}"])
    return harness.table(heads, rows)


def main() -> None:
    args = harness.parse(__doc__, source=Path, work=Path, torch_python="", tf_python="", drawn=1000, rounds=5)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        source = args.source or work / "drawn"
        if not source.exists():
            draw(source, args.drawn)
        files = prepare(source, work)
        pythons = {name: getattr(args, f"{name}_python") for name in ("torch", "tf")}
        pythons = {name: python for name, python in pythons.items() if python} | dict.fromkeys(NAMES, "")
        print("\n" + rate_table(measure(pythons, args.rounds, work, files)))


if __name__ == "__main__":
    main()
