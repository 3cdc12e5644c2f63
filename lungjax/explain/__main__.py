"""Draws saliency maps of a trained network: python -m lungjax.explain --workdir=runs/my_run --images=scan.png,folder

Writes each image with its map and their overlay to WORKDIR/explain/NAME_METHOD.png. `--split=test` draws contact sheets
of a split, with the most confident predictions first. `--quality` tests the maps (`lungjax.explain.quality`).
Unreadable images are reported and skipped, and the exit code is then 1.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from absl import app, flags

from lungjax import cli, datasets
from lungjax.config import EXPLANATIONS as METHODS
from lungjax.config import nearest
from lungjax.config.metadata import Metadata
from lungjax.data import preprocess
from lungjax.data.safe_text import printable
from lungjax.inference.inputs import Item, gather
from lungjax.runtime import environment

FLAGS = flags.FLAGS
QUALITY_IMAGES = 100


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("workdir", None, "Folder of a finished run.")
    flags.DEFINE_list("images", [], "Files, folders, CSV lists and scans, as for lungjax.predict.")
    flags.DEFINE_enum("split", None, ["train", "val", "test"], "Split of the run's data set for contact sheets.")
    flags.DEFINE_bool("quality", False, "Test the maps by pointing game, deletion curve and sanity check.")
    flags.DEFINE_list("method", [], f"One or more of {', '.join(METHODS)}; by default the first one possible.")
    flags.DEFINE_string("class", None, "Class to explain; default the predicted class of each image.")
    count = f"Number of images for --split (default all) and --quality (default {QUALITY_IMAGES})."
    flags.DEFINE_integer("count", None, count, lower_bound=1)
    flags.DEFINE_string("out", None, "Output folder; default WORKDIR/explain.")
    flags.DEFINE_string("data_dir", "data", "Folder of the prepared data sets.")
    cli.define_window_flags()
    cli.define_limit_flags()


def main(_: list[str]) -> None:
    """Checks the flags, draws or measures, and reports unreadable images."""
    if not FLAGS.workdir:
        raise app.UsageError("--workdir=RUN is missing: the folder of a finished run")
    if not (FLAGS.images or FLAGS.split or FLAGS.quality):
        raise app.UsageError("nothing to explain: give --images=FILE,FOLDER, --split=test or --quality")
    for method in FLAGS.method:
        if method not in METHODS:
            raise ValueError(f"--method={method}: {nearest(method, METHODS)}")
    windows = cli.windows()  # typos are reported before jax is imported
    environment.prepare_jax()
    # Here: they import jax, which is slow and must be configured first.
    from lungjax.data import pipeline
    from lungjax.explain import figures, quality
    from lungjax.explain.saliency import Explainer, check_method
    from lungjax.inference.model import load_finished
    from lungjax.training import setup

    workdir, data_dir = Path(FLAGS.workdir).expanduser(), Path(FLAGS.data_dir).expanduser()
    run, description = load_finished(workdir)
    label = FLAGS["class"].value
    if label is not None and label not in run.classes:
        raise ValueError(f"--class={label}: {nearest(label, run.classes)}")
    target = None if label is None else run.classes.index(label)
    config = run.config
    explainer = Explainer(
        run.module, run.variables, config.input, description.positive, config.eval.batch_size,
        temperature=description.temperature,
    )  # fmt: skip
    for method in FLAGS.method:
        check_method(method, explainer.methods)
    out = Path(FLAGS.out).expanduser() if FLAGS.out else workdir / "explain"
    out.mkdir(parents=True, exist_ok=True)
    methods = FLAGS.method or explainer.methods[:1]
    bad: list[str] = []
    if FLAGS.images:
        description = replace(description, **windows)
        inputs = gather(FLAGS.images, description, limits=cli.limits())
        bad += [f"{name}: {reason}" for name, reason in inputs.failures]
        pictures = read(inputs.items, description, bad)
        if not figures.draw_images(explainer, pictures, run.classes, methods, target, out, bad):
            reasons = "\n  ".join(bad or ["the folders contain no images"])
            raise ValueError(f"no image could be read:\n  {reasons}")
    synthetic = datasets.resolve(config.data.dataset)[0].base == "phantom_ct"
    needs_data = FLAGS.split or (FLAGS.quality and not synthetic)
    reader = pipeline.Reader(setup.open_data(config, data_dir), config.input) if needs_data else None
    if FLAGS.split and reader:
        for method in methods:
            folder = out / f"{FLAGS.split}_{method}"
            bad += figures.draw_split(explainer, reader, FLAGS.split, method, target, folder, FLAGS.count)
    if FLAGS.quality:
        methods, count = FLAGS.method or explainer.methods, FLAGS.count or QUALITY_IMAGES
        bad += quality.write(explainer, run, None if synthetic else reader, methods, target, out, count)
    for method in methods:
        print(f"{method}: {explainer.describe(method)}")
    print(f"Written to {out}")
    for problem in dict.fromkeys(bad):
        print(printable(f"lungjax: skipped: {problem}"), file=sys.stderr)
    if bad:
        sys.exit(1)


def read(items: Iterable[Item], description: Metadata, bad: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and pixels of each readable image; adds the errors of the others to `bad`."""
    for item in items:
        try:
            yield item.short, preprocess.picture(item.read(), description)[0]
        except (ValueError, OSError) as error:
            bad.append(str(error) if item.name in str(error) else f"{item.name}: {error}")


if __name__ == "__main__":
    cli.run(main, define_flags)
