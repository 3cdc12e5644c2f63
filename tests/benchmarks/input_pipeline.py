"""Times the input pipeline against torch's DataLoader and tf.data: same files, decode, resize, batches and cores.

    python tests/benchmarks/input_pipeline.py --source=FOLDER --torch_python=PYTHON --tf_python=PYTHON
        [--work=FOLDER] [--drawn=1000] [--rounds=5] [--seconds=3] [--cores=0,1] [--threads=0]

FOLDER contains a folder of JPEG or PNG files per class; without --source, 512 x 512 PNG slices are drawn. Every
contender makes endless shuffled batches of 64 gray uint8 images of 224 x 224 (bilinear, antialiased). Each runs in its
own process; they take turns and are idle otherwise:

- torch: Pillow, DataLoader with two processes; `PYTHON` needs torch, Pillow and numpy.
- tf: tf.io.decode_*, tf.image.resize, tf.data with AUTOTUNE and two threads; `PYTHON` needs tensorflow.
- source: `lungjax.data.pipeline.train_batches` with defaults, from unmodified prepared files.
- copy: the same from a copy at 224 x 224, prepared as folder/bench-224.

A turn in which other processes used more than 10% of the cores is repeated, at most 15 times. Prints markdown: images
per second (median, lowest and highest of the rounds), per second of CPU time (children included), the ratios to torch
and tf per round (median, lowest and highest), and the highest use of the cores by others; then the CPU time of one
image in one thread, step by step.
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
WARM_UP = 1.0  # seconds per turn, in which batches made during other turns are consumed
MAX_OTHERS, MAX_REPEATS = 0.1, 15  # fraction of the cores that others may use in a turn; repetitions of a turn
CONTENDERS = ("torch", "tf", "source", "copy")


# Runs in the contenders' processes. Each returns versions, a function that reads one file, and batches.


def torch_batches(files: list[str], threads: int) -> tuple[str, Callable[[int], np.ndarray], Iterator[Any]]:
    """torch's DataLoader."""
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
    """Returns the CPU microseconds per image of each step, in one thread."""
    from lungjax.data import pipeline
    from lungjax.data.imaging import images

    rows = np.random.default_rng(0).permutation(data.rows("train"))[:count].tolist()
    boxes, reader = data.columns["box"], pipeline.Reader(data, config.input)

    def timed(function: Callable[[Any], Any], items: list[Any]) -> tuple[float, list[Any]]:
        start = time.process_time()
        results = [function(item) for item in items]
        return 1e6 * (time.process_time() - start) / len(items), results

    times: dict[str, list[float]] = {}
    order, size = pipeline.order(data, config), 16  # more images at a time would not stay in the cache
    for first in range(0, len(rows) - size + 1, size):
        part = rows[first : first + size]
        choose, _ = timed(lambda place: order[place], [*range(first, first + size)])
        read, encoded = timed(lambda row: data.records[row]["image"], part)
        decode, decoded = timed(lambda text: images.load(text, data.window), encoded)
        pairs = [*zip(decoded, part, strict=True)]
        resize, _ = timed(lambda pair: images.to_input(pair[0], boxes[pair[1]], config.input, 0.0), pairs)
        total, examples = timed(reader.example, part)
        copy, _ = timed(np.stack, [[example["image"] for example in examples]])
        steps = {"choose the row": choose, "read the record": read, "decode": decode, "resize": resize}
        steps |= {"the rest of an example": total - read - decode - resize, "copy into the batch": copy / size}
        for key, value in steps.items():
            times.setdefault(key, []).append(value)
    return {key: statistics.fmean(values[1:]) for key, values in times.items()}  # without the warm-up


def family_seconds() -> float:
    """Returns the CPU seconds of this process and its children, running or ended."""
    parents, ticks = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)], ticks[int(entry.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    family = {os.getpid()}
    while children := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= children
    return sum(ticks[pid] for pid in family) / os.sysconf("SC_CLK_TCK")


def busy_seconds(cores: list[int]) -> float:
    """Returns the seconds that `cores` were busy since the machine started."""
    lines = Path("/proc/stat").read_text().splitlines()
    times = [line.split() for line in lines if line.split()[0] in {f"cpu{core}" for core in cores}]
    # user, nice, system, irq, softirq (not idle, iowait); guests are part of user
    return sum(int(t[i]) for t in times for i in (1, 2, 3, 6, 7)) / os.sysconf("SC_CLK_TCK")


def contend(name: str, work: Path, cores: list[int], threads: int) -> None:
    """Serves turns: reads a line with seconds, writes a line of JSON."""
    os.sched_setaffinity(0, cores)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the output of libraries out of the answers
    files = json.loads((work / "files.json").read_text())
    if name in ("source", "copy"):
        versions, read, batches = lungjax_batches(NAME if name == "source" else f"{NAME}-{SIDE}", work, threads)
    else:
        versions, read, batches = {"torch": torch_batches, "tf": tf_batches}[name](files, len(cores))
    means = [float(np.mean(read(i))) for i in range(min(16, len(files)))]
    print(json.dumps({"versions": versions, "mean": statistics.mean(means)}), file=out, flush=True)
    for line in sys.stdin:
        until = time.perf_counter() + WARM_UP
        while time.perf_counter() < until:
            next(batches)
        start, used, busy, images = time.perf_counter(), family_seconds(), busy_seconds(cores), 0
        while time.perf_counter() - start < float(line):
            batch = next(batches)
            images += len(batch["image"] if isinstance(batch, dict) else batch[0])
        wall, cpu = time.perf_counter() - start, family_seconds() - used
        others = (busy_seconds(cores) - busy - cpu) / wall / len(cores)
        print(json.dumps({"rate": images / wall, "of_cpu": images / cpu, "others": others}), file=out, flush=True)
    os._exit(0)  # threads of libraries may be busy with a batch


# Runs in the process that the user starts.


def draw(folder: Path, count: int) -> None:
    """Writes `count` synthetic slices as 512 x 512 gray PNG, one folder per class."""
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
    """Prepares the files and their copy if necessary, and returns the training files."""
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
        print(f"{name}: {size / len(data.records):.0f} bytes per image in the records")
    return [str(source / file) for file in data.columns["file"][data.rows("train")]]


def measure(pythons: dict[str, str], args: argparse.Namespace, work: Path) -> dict[str, list[dict[str, float]]]:
    """Runs all contenders in turns; returns the measurements of each round."""
    runs: dict[str, Any] = {}
    for name, python in pythons.items():
        command = [python, __file__, f"--contender={name}", f"--work={work}", f"--cores={args.cores}"]
        command.append(f"--threads={args.threads}")
        runs[name] = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
            text=True,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
        )
        about = json.loads(runs[name].stdout.readline() or "{}")
        if not about:
            raise SystemExit(f"{name} did not start: --verbose shows why")
        print(f"{name}: {about['versions']}; mean of the first files {about['mean']:.2f}", flush=True)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            for _ in range(MAX_REPEATS):
                print(args.seconds, file=run.stdin, flush=True)
                turn = json.loads(run.stdout.readline())
                if turn["others"] < MAX_OTHERS:
                    break
            rounds[name].append(turn)
    for run in runs.values():
        run.stdin.close()
        run.wait()
    return rounds


def table(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Prints rates, and the median of the ratios per round."""
    others = [name for name in ("torch", "tf") if name in rounds]
    heads = ["images/s", "lowest..highest", "images/s of a core"]
    heads += [f"{what} / {other}" for other in others for what in ("rate", "of a core")] + ["others"]
    print(f"\n| | {' | '.join(heads)} |\n| --- |{' ---: |' * len(heads)}")
    for name, turns in rounds.items():
        rates, of_cpu = ([r[key] for r in turns] for key in ("rate", "of_cpu"))
        cells = [f"{statistics.median(rates):.0f}", f"{min(rates):.0f}..{max(rates):.0f}"]
        cells.append(f"{statistics.median(of_cpu):.0f}")
        for other in others:
            for key in ("rate", "of_cpu"):
                ratios = [a[key] / b[key] for a, b in zip(turns, rounds[other], strict=True)]
                cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})")
        cells.append(f"{max(r['others'] for r in turns):.0%}")
        print(f"| {name} | {' | '.join(cells)} |")


def step_table(work: Path) -> None:
    """Prints the time of each step."""
    times = [lungjax_batches(name, work, 1, steps=True) for name in (NAME, f"{NAME}-{SIDE}")]
    print("\n| one thread, microseconds per image | source | copy |\n| --- | ---: | ---: |")
    for key in times[0]:
        print(f"| {key} | {times[0][key]:.0f} | {times[1][key]:.0f} |")
    print(f"| total | {' | '.join(f'{sum(t.values()):.0f}' for t in times)} |")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a folder with one folder of images per class; drawn by default")
    parser.add_argument("--work", type=Path, help="folder for the data, reused by the next run")
    parser.add_argument("--torch_python", default="")
    parser.add_argument("--tf_python", default="")
    parser.add_argument("--drawn", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--cores", default="0,1")
    parser.add_argument("--threads", type=int, default=0, help="data.threads of lungjax; 0 is one more than cores")
    parser.add_argument("--verbose", action="store_true", help="show the output of the contenders")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args.contender, args.work, [int(core) for core in args.cores.split(",")], args.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
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
