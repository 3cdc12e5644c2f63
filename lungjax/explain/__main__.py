"""Shows what a trained network looked at: python -m lungjax.explain --workdir=runs/my_run --images=scan.png,folder

For each image original, heat map and both in one, as WORKDIR/explain/NAME_METHOD.png. `--split=test` draws sheets of a
whole split, the surest answers first, and `--quality` measures what the maps are worth (`lungjax.explain.quality`).
An image that can't be read is named, the rest is done, and the exit code is 1.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from lungjax import cli, datasets
from lungjax.config import EXPLANATIONS as METHODS
from lungjax.config import metadata, nearest
from lungjax.config.metadata import Metadata
from lungjax.data import preprocess
from lungjax.inference.inputs import Item, gather
from lungjax.runtime import environment

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("workdir", None, "A finished run.")
    flags.DEFINE_list("images", [], "Files, folders, CSV lists, scans; as lungjax.predict.")
    flags.DEFINE_enum("split", None, ["train", "val", "test"], "Draws sheets of this split of the run's data set.")
    flags.DEFINE_bool("quality", False, "Measures the maps: pointing game, deletion curve, sanity check.")
    flags.DEFINE_list("method", [], f"Of {', '.join(METHODS)}; default gradcam, and all for --quality.")
    flags.DEFINE_string("class", None, "The class that the maps are about; default each image's predicted one.")
    flags.DEFINE_integer("count", None, "Images of --split (default all) or --quality (100).", lower_bound=1)
    flags.DEFINE_string("out", None, "The folder to write to; default WORKDIR/explain.")
    flags.DEFINE_bool("save_maps", False, "Writes the maps too, float32 [H, W] in 0..1, as .npy.")
    flags.DEFINE_string("data_dir", "data", "Where lungjax.prepare wrote the data sets.")
    flags.DEFINE_string("window", None, "low,high of 16-bit images; default that of the run's data set.")
    flags.DEFINE_string("hu_window", None, "centre/width in HU of CT volumes; default the run's.")


def main(_: list[str]) -> None:
    """Checks what was asked for, does it, and names what could not be read."""
    if not FLAGS.workdir:
        raise app.UsageError("--workdir=RUN is missing: the folder of a finished run")
    if not (FLAGS.images or FLAGS.split or FLAGS.quality):
        raise app.UsageError("nothing to explain: give --images=FILE,FOLDER, --split=test or --quality")
    for method in FLAGS.method:
        if method not in METHODS:
            raise ValueError(f"--method={method}: {nearest(method, METHODS)}")
    windows: dict[str, Any] = {"window": cli.read_window(FLAGS.window)} if FLAGS.window else {}
    windows |= {"hu_windows": (cli.read_hu_window(FLAGS.hu_window),)} if FLAGS.hu_window else {}
    environment.prepare_jax()
    # Here, after the flags, since they import jax.
    from lungjax.explain import sheets
    from lungjax.explain.saliency import Explainer
    from lungjax.inference.model import load_network
    from lungjax.models import outputs
    from lungjax.training import train

    run, data_dir = load_network(FLAGS.workdir), Path(FLAGS.data_dir).expanduser()
    target = class_number(run.classes, FLAGS["class"].value)
    positive = outputs.positive_class(run.config, run.classes)
    explainer = Explainer(run.module, run.variables, run.config.input, positive, run.config.eval.batch_size)
    out = Path(FLAGS.out or Path(FLAGS.workdir) / "explain").expanduser()
    out.mkdir(parents=True, exist_ok=True)
    methods = FLAGS.method or ["gradcam"]
    bad: list[str] = []
    if "occlusion" not in methods and "integrated_gradients" not in methods and max(explainer.map_size) == 1:
        print("The last map is one cell: only occlusion and integrated_gradients can tell places apart here.")
    if FLAGS.images:
        file = Path(FLAGS.workdir) / metadata.FILE
        parts = datasets.resolve(run.config.data.dataset)[0]
        known = (run.config.name, run.classes, run.config.input, parts.full, parts.stage, parts.size)
        told = metadata.read(file) if file.exists() else Metadata(*known)  # an older run's, or one that isn't finished
        told = replace(told, **windows)
        found = gather(FLAGS.images, told)
        bad += [f"{name}: {why}" for name, why in found.failures]
        pictures = read(found.items, told, bad)
        if not sheets.explain_images(explainer, pictures, run.classes, methods, target, out, FLAGS.save_maps):
            reasons = "\n  ".join(bad or ["there is none in the folders given"])
            raise ValueError(f"no image could be read:\n  {reasons}")
    if FLAGS.split:
        data = train.open_data(run.config, data_dir)
        for method in methods:
            folder = out / f"{FLAGS.split}_{method}"
            bad += sheets.explain_split(explainer, data, FLAGS.split, method, target, folder, FLAGS.count)
    if FLAGS.quality:
        count = FLAGS.count or sheets.TO_MEASURE
        drawn = datasets.resolve(run.config.data.dataset)[0].base == "phantom_ct"
        images = None if drawn else train.open_data(run.config, data_dir)
        bad += sheets.measure_quality(
            explainer, run.config, run.classes, run.step, images, FLAGS.method or METHODS, target, out, count
        )
    print(f"Written to {out}")
    for problem in dict.fromkeys(bad):
        print(f"lungjax: left out: {problem}", file=sys.stderr)
    if bad:
        sys.exit(1)


def class_number(classes: Sequence[str], name: str | None) -> int | None:
    """Returns the number of a class, None for None. Raises ValueError for an unknown one, with the nearest."""
    if name is not None and name not in classes:
        raise ValueError(f"--class={name}: {nearest(name, classes)}")
    return None if name is None else classes.index(name)


def read(items: Iterable[Item], told: Metadata, bad: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and pixels of each image; what can't be read goes to `bad`, with the reason."""
    for item in items:
        try:
            yield item.short, preprocess.picture(item.read(), told)[0]
        except (ValueError, OSError) as error:
            bad.append(str(error) if item.name in str(error) else f"{item.name}: {error}")


if __name__ == "__main__":
    cli.run(main, define_flags)
