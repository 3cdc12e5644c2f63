"""Times the input pipeline against torch's DataLoader and tf.data: same files, decode, resize, batches and cores.

    python tests/benchmarks/input_pipeline.py --source=FOLDER --torch_python=PYTHON --tf_python=PYTHON
        [--work=FOLDER] [--drawn=1000] [--rounds=5] [--seconds=3] [--cores=0,1] [--threads=0]

FOLDER holds a folder of JPEG or PNG files for each class; without --source, 512 x 512 PNG slices are drawn. Every
contender makes shuffled batches of 64 gray uint8 images of 224 x 224 (bilinear, antialiased), for ever, in a process
of its own that lives for all rounds and works only in its turns:

- torch: Pillow, DataLoader with two processes; `PYTHON` needs torch, Pillow and numpy.
- tf: tf.io.decode_*, tf.image.resize, tf.data with AUTOTUNE and two threads; `PYTHON` needs tensorflow.
- source: `lungjax.data.pipeline.train_batches` at its defaults, from the prepared files as they are.
- copy: the same from a copy at 224 x 224, which the name folder/bench-224 prepares.

A turn in which others took more than a tenth of the cores is repeated, at most 15 times. Prints markdown: images per
second (median of the rounds, lowest and highest), per second of processor time (children included), the ratios of
each round to torch and tf (median, lowest and highest), and how much of the cores others took at most; then where the
processor time of one image goes in one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIDE, BATCH, NAME = 224, 64, "folder/bench"
WARM = 1.0  # seconds of each turn that don't count: batches made while the others ran are used up
OTHERS, REPEATS = 0.1, 15  # part of the cores that others may take in a turn, and how often one is repeated
CONTENDERS = ("torch", "tf", "source", "copy")


# What runs in the contenders' own processes. Each returns versions, a function that reads one file, and batches.


def torch_batches(files: list[str], threads: int) -> tuple[str, Callable[[int], np.ndarray], Iterator[Any]]:
    """torch's DataLoader."""
    import PIL
    import torch
    from PIL import Image

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1000 * len(files)  # so that no turn sees the end of an epoch

        def __getitem__(self, index: int) -> tuple[Any, int]:
            with Image.open(files[index % len(files)]) as picture:
                small = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(small)[..., None]), index % 2

    data = Files()
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=threads)
    return f"torch {torch.__version__}, Pillow {PIL.__version__}", lambda i: data[i][0].numpy(), iter(loader)


def tf_batches(files: list[str], threads: int) -> tuple[str, Callable[[int], np.ndarray], Iterator[Any]]:
    """tf.data."""
    import tensorflow as tf

    def load(file: Any, label: Any) -> Any:
        text = tf.io.read_file(file)
        if files[0].endswith(".png"):
            image = tf.io.decode_png(text, channels=1)
        else:
            image = tf.io.decode_jpeg(text, channels=1, dct_method="INTEGER_ACCURATE")  # as Pillow decodes
        image = tf.image.resize(image, (SIDE, SIDE), "bilinear", antialias=True)
        return tf.cast(tf.round(image), tf.uint8), label

    data = tf.data.Dataset.from_tensor_slices((files, [i % 2 for i in range(len(files))]))
    data = data.shuffle(len(files)).repeat().map(load, tf.data.AUTOTUNE).batch(BATCH).prefetch(tf.data.AUTOTUNE)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    return (
        f"tensorflow {tf.__version__}",
        lambda i: load(files[i], 0)[0].numpy(),
        data.with_options(options).as_numpy_iterator(),
    )


def lungjax_batches(name: str, work: Path, threads: int, steps: bool = False) -> Any:
    """lungjax's pipeline from the data set `name`."""
    from lungjax.runtime import environment

    environment.keep_freed_memory()  # as lungjax.main does

    import grain
    import PIL

    from lungjax import datasets
    from lungjax.config import Config, DataConfig, InputSpec, TrainConfig
    from lungjax.data import pipeline

    data = datasets.open_dataset(name, work / "data")
    reading, batch = DataConfig(threads=threads), TrainConfig(batch_size=BATCH)
    config = Config(input=InputSpec(size=(SIDE, SIDE)), train=batch, data=reading)
    if steps:
        return time_steps(data, config)
    rows, reader = data.rows("train"), pipeline.Reader(data, config.input)
    versions = f"lungjax, grain {grain.__version__}, Pillow {PIL.__version__}"
    return versions, lambda i: reader(rows[i]), pipeline.train_batches(data, config, start=0)


def time_steps(data: Any, config: Any, count: int = 512) -> dict[str, float]:
    """Returns microseconds of processor time that each step takes for an image, in one thread."""
    from lungjax.data import pipeline
    from lungjax.data.imaging import images

    rows = np.random.default_rng(0).permutation(data.rows("train"))[:count].tolist()
    boxes, reader = data.columns["box"], pipeline.Reader(data, config.input)

    def spent(function: Callable[[Any], Any], items: list[Any]) -> tuple[float, list[Any]]:
        start = time.process_time()
        made = [function(item) for item in items]
        return 1e6 * (time.process_time() - start) / len(items), made

    taken: dict[str, list[float]] = {}
    order, few = pipeline.order(data, config), 16  # more pictures at a time would not stay in the cache
    for first in range(0, count, few):
        some = rows[first : first + few]
        choose, _ = spent(lambda place: order[place], [*range(first, first + few)])
        read, encoded = spent(lambda row: data.records[row]["image"], some)
        decode, pictures = spent(lambda text: images.load(text, data.window), encoded)
        pairs = [*zip(pictures, some, strict=True)]
        resize, _ = spent(lambda pair: images.to_input(pair[0], boxes[pair[1]], config.input, 0.0), pairs)
        whole, made = spent(reader.example, some)
        copy, _ = spent(np.stack, [[example["image"] for example in made]])
        found = {"choose the row": choose, "read the record": read, "decode": decode, "resize": resize}
        found |= {"the rest of an example": whole - read - decode - resize, "copy into the batch": copy / few}
        for key, value in found.items():
            taken.setdefault(key, []).append(value)
    return {key: statistics.fmean(values[1:]) for key, values in taken.items()}  # the first warms up


def family_seconds() -> float:
    """Returns the processor time of this process and those it started, dead or alive."""
    parents, ticks = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)], ticks[int(entry.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(ticks[pid] for pid in mine) / os.sysconf("SC_CLK_TCK")


def busy_seconds(cores: list[int]) -> float:
    """Returns the seconds that `cores` have worked for anybody since the machine started."""
    lines = Path("/proc/stat").read_text().splitlines()
    times = [line.split() for line in lines if line.split()[0] in {f"cpu{core}" for core in cores}]
    # user, nice, system, (idle, iowait left out,) irq, softirq; those of guests are in user
    return sum(int(t[i]) for t in times for i in (1, 2, 3, 6, 7)) / os.sysconf("SC_CLK_TCK")


def contend(name: str, work: Path, cores: list[int], threads: int) -> None:
    """Serves turns: a line with seconds comes in, a line of JSON goes out."""
    os.sched_setaffinity(0, cores)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
    files = json.loads((work / "files.json").read_text())
    if name in ("source", "copy"):
        versions, read, batches = lungjax_batches(NAME if name == "source" else f"{NAME}-{SIDE}", work, threads)
    else:
        versions, read, batches = {"torch": torch_batches, "tf": tf_batches}[name](files, len(cores))
    means = [float(np.mean(read(i))) for i in range(min(16, len(files)))]
    print(json.dumps({"versions": versions, "mean": statistics.mean(means)}), file=out, flush=True)
    for line in sys.stdin:
        until = time.perf_counter() + WARM
        while time.perf_counter() < until:
            next(batches)
        start, used, busy, images = time.perf_counter(), family_seconds(), busy_seconds(cores), 0
        while time.perf_counter() - start < float(line):
            batch = next(batches)
            images += len(batch["image"] if isinstance(batch, dict) else batch[0])
        wall, cpu = time.perf_counter() - start, family_seconds() - used
        others = (busy_seconds(cores) - busy - cpu) / wall / len(cores)
        print(json.dumps({"rate": images / wall, "of_cpu": images / cpu, "others": others}), file=out, flush=True)
    os._exit(0)  # libraries' threads may be in the middle of a batch


# What runs in the process that the user starts.


def draw(folder: Path, count: int) -> None:
    """Writes `count` drawn slices as 512 x 512 gray PNG, a folder for each class."""
    from PIL import Image

    from lungjax.datasets.phantom import slices

    for seed in range(count):
        finding = slices.CLASSES[seed % len(slices.CLASSES)]
        patient = slices.new_patient(seed, finding)
        slice_ = slices.draw_slice(patient, slices.levels(patient, 5)[seed % 5])
        picture = Image.fromarray(slices.gray(slice_.hu, patient.window))
        (folder / finding).mkdir(parents=True, exist_ok=True)
        picture.resize((512, 512), Image.Resampling.BICUBIC).save(folder / finding / f"p{seed:05}.png")


def prepare(source: Path, work: Path) -> list[str]:
    """Prepares the files and their copy where that is not done yet, and returns the training files."""
    from lungjax import datasets

    for name in (NAME, f"{NAME}-{SIDE}"):
        try:
            data = datasets.open_dataset(name, work / "data")
        except ValueError:
            start = time.perf_counter()
            datasets.write(name, source, work / "data", datasets.PrepareOptions())
            data = datasets.open_dataset(name, work / "data")
            print(f"{name}: {len(data.records)} images prepared in {time.perf_counter() - start:.1f} s")
        size = sum(file.stat().st_size for file in (work / "data" / name).rglob("*array_record*"))
        print(f"{name}: {size / len(data.records):.0f} bytes an image in the records")
    return [str(source / file) for file in data.columns["file"][data.rows("train")]]


def measure(pythons: dict[str, str], args: argparse.Namespace, work: Path) -> dict[str, list[dict[str, float]]]:
    """Runs all contenders in turns; returns what each round measured."""
    runs: dict[str, Any] = {}
    for name, python in pythons.items():
        command = [
            python,
            __file__,
            f"--contender={name}",
            f"--work={work}",
            f"--cores={args.cores}",
            f"--threads={args.threads}",
        ]
        runs[name] = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
            text=True,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
        )
        told = json.loads(runs[name].stdout.readline() or "{}")
        if not told:
            raise SystemExit(f"{name} did not start: --verbose shows why")
        print(f"{name}: {told['versions']}; mean of the first files {told['mean']:.2f}", flush=True)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            for _ in range(REPEATS):
                print(args.seconds, file=run.stdin, flush=True)
                found = json.loads(run.stdout.readline())
                if found["others"] < OTHERS:
                    break
            rounds[name].append(found)
    for run in runs.values():
        run.stdin.close()
        run.wait()
    return rounds


def table(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Prints rates and ratios; a ratio is taken within each round, the median is shown."""
    others = [name for name in ("torch", "tf") if name in rounds]
    heads = ["images/s", "lowest..highest", "images/s of a core"]
    heads += [f"{what} / {other}" for other in others for what in ("rate", "of a core")] + ["others"]
    print(f"\n| | {' | '.join(heads)} |\n| --- |{' ---: |' * len(heads)}")
    for name, found in rounds.items():
        rates, of_cpu = ([r[key] for r in found] for key in ("rate", "of_cpu"))
        cells = [f"{statistics.median(rates):.0f}", f"{min(rates):.0f}..{max(rates):.0f}"]
        cells.append(f"{statistics.median(of_cpu):.0f}")
        for other in others:
            for key in ("rate", "of_cpu"):
                ratios = [a[key] / b[key] for a, b in zip(found, rounds[other], strict=True)]
                cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})")
        cells.append(f"{max(r['others'] for r in found):.0%}")
        print(f"| {name} | {' | '.join(cells)} |")


def step_table(work: Path) -> None:
    """Prints where the time of an image goes."""
    found = [lungjax_batches(name, work, 1, steps=True) for name in (NAME, f"{NAME}-{SIDE}")]
    print("\n| one thread, microseconds an image | source | copy |\n| --- | ---: | ---: |")
    for key in found[0]:
        print(f"| {key} | {found[0][key]:.0f} | {found[1][key]:.0f} |")
    print(f"| together | {' | '.join(f'{sum(f.values()):.0f}' for f in found)} |")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a folder of images for each class; drawn if left out")
    parser.add_argument("--work", type=Path, help="where the data goes; kept, so a second run is quicker")
    parser.add_argument("--torch_python", default="")
    parser.add_argument("--tf_python", default="")
    parser.add_argument("--drawn", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--cores", default="0,1")
    parser.add_argument(
        "--threads", type=int, default=0, help="data.threads of lungjax; 0, its default, is one more than cores"
    )
    parser.add_argument("--verbose", action="store_true", help="show what the contenders say")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args.contender, args.work, [int(core) for core in args.cores.split(",")], args.threads)
    with tempfile.TemporaryDirectory() as made:
        work = args.work or Path(made)
        source = args.source or work / "drawn"
        if not source.exists():
            draw(source, args.drawn)
        files = prepare(source, work)
        (work / "files.json").write_text(json.dumps(files))
        pythons = {"torch": args.torch_python, "tf": args.tf_python, "source": sys.executable, "copy": sys.executable}
        table(measure({name: python for name, python in pythons.items() if python}, args, work))
        step_table(work)


if __name__ == "__main__":
    main()
