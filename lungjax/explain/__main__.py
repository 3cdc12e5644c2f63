"""Draws saliency maps of a trained network: python -m lungjax.explain --model=runs/my_run --images=scan.png,folder

Writes each image with its map and their overlay to RUN/explain/NAME_METHOD.png. The map of an ensemble is the mean of
those of its members. `--split=test` draws contact sheets of a split, with the most confident predictions first.
`--quality` tests the maps (`lungjax.explain.quality`).
Unreadable images are reported and skipped, and the exit code is then 1.
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
from lungjax.config import nearest
from lungjax.data.safe_text import printable
from lungjax.inference import ensembles
from lungjax.inference.inputs import Item, gather
from lungjax.runtime import environment

FLAGS = flags.FLAGS
QUALITY_IMAGES = 100


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list("model", [], cli.MODEL_HELP.format("Folder of a finished run, or a model.pyz"))
    flags.DEFINE_list("images", [], "Files, folders, CSV lists and scans, as for lungjax.predict.")
    flags.DEFINE_enum("split", None, ["train", "val", "test"], "Split of the run's data set for contact sheets.")
    flags.DEFINE_bool("quality", False, "Test the maps by pointing game, deletion curve and sanity check.")
    flags.DEFINE_list("method", [], f"One or more of {', '.join(METHODS)}; by default the first one possible.")
    flags.DEFINE_string(
        "class", None, "Class to explain; by default the predicted class of each image, or every finding."
    )
    count = f"Number of images for --split (default all) and --quality (default {QUALITY_IMAGES})."
    flags.DEFINE_integer("count", None, count, lower_bound=1)
    flags.DEFINE_string("out", None, "Output folder; default RUN/explain.")
    flags.DEFINE_string("data_dir", "data", "Folder of the prepared data sets.")
    cli.define_window_flags()
    cli.define_limit_flags()


def main(_: list[str]) -> None:
    """Checks the flags, draws or measures, and reports unreadable images."""
    if not FLAGS.model:
        raise app.UsageError("--model=RUN is missing: the folder of a finished run")
    if not (FLAGS.images or FLAGS.split or FLAGS.quality):
        raise app.UsageError("nothing to explain: give --images=FILE,FOLDER, --split=test or --quality")
    for method in FLAGS.method:
        if method not in METHODS:
            raise ValueError(f"--method={method}: {nearest(method, METHODS)}")
    windows = cli.windows()  # typos are reported before jax is imported
    environment.prepare_jax()
    # Here: they import jax, which is slow and must be configured first.
    from lungjax.explain import figures
    from lungjax.inference.model import load

    out, model = cli.out_folder(ensembles.find(FLAGS.model), "explain"), load(FLAGS.model)
    if model.network is None and (FLAGS.split or FLAGS.quality):
        raise app.UsageError("--split and --quality need the folder of a single run")
    label, classes = FLAGS["class"].value, model.metadata.classes
    if label is not None and label not in classes:
        raise ValueError(f"--class={label}: {nearest(label, classes)}")
    target = None if label is None else classes.index(label)
    methods = [model.check_method(method) for method in FLAGS.method or [None]]
    model = replace(model, metadata=model.metadata.override(**windows))
    out.mkdir(parents=True, exist_ok=True)
    bad: list[str] = []
    if FLAGS.images:
        inputs = gather(FLAGS.images, model.metadata, limits=cli.limits())
        bad += [f"{name}: {reason}" for name, reason in inputs.failures]
        pictures = read(inputs.items, model, bad)
        if not figures.draw_images(model.explain_pixels, pictures, model.metadata, methods, target, out, bad):
            reasons = "\n  ".join(bad or ["the folders contain no images"])
            raise ValueError(f"no image could be read:\n  {reasons}")
    if model.network is not None:
        bad += explain_data(model, target, methods, out)
    for method in methods:
        print(f"{method}: {model.describe(method)}")
    print(f"Written to {out}")
    for problem in dict.fromkeys(bad):
        print(printable(f"lungjax: skipped: {problem}"), file=sys.stderr)
    if bad:
        sys.exit(1)


def explain_data(model: Any, target: int | None, methods: Sequence[str], out: Path) -> list[str]:
    """Draws the contact sheets and measures the quality; returns the errors of unreadable images."""
    from lungjax.data import pipeline  # here: see `main`
    from lungjax.explain import figures, quality
    from lungjax.explain.saliency import Explainer
    from lungjax.training import setup

    bad: list[str] = []
    run, data_dir, description = model.network, Path(FLAGS.data_dir).expanduser(), model.metadata
    config = run.config
    explainer = Explainer(
        run.module, run.variables, config.input, description.positive, config.eval.batch_size,
        temperature=description.temperature, tta=description.tta,
    )  # fmt: skip
    synthetic = datasets.resolve(config.data.dataset)[0].base == "phantom_ct"
    needs_data = FLAGS.split or (FLAGS.quality and not synthetic)
    reader = pipeline.Reader(setup.open_data(config, data_dir), config.input) if needs_data else None
    if FLAGS.split and reader:
        for method in methods:
            folder = out / f"{FLAGS.split}_{method}"
            bad += figures.draw_split(explainer, reader, FLAGS.split, method, target, folder, FLAGS.count)
    if FLAGS.quality:
        if description.multilabel and synthetic:
            raise ValueError("--quality: the synthetic slices have one finding each; test a run on phantom_ct instead")
        methods, count = FLAGS.method or explainer.methods, FLAGS.count or QUALITY_IMAGES
        bad += quality.write(explainer, run, None if synthetic else reader, methods, target, out, count)
    return bad


def read(items: Iterable[Item], model: Any, bad: list[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields name, network input and image of each readable image; adds the errors of the others to `bad`."""
    from lungjax.inference.artifacts import picture  # here: see `main`

    for item in items:
        try:
            pixels = model.prepare(item.read()).pixels
            yield item.short, pixels, picture(model.metadata, pixels)
        except (ValueError, OSError) as error:
            bad.append(str(error) if item.name in str(error) else f"{item.name}: {error}")


if __name__ == "__main__":
    cli.run(main, define_flags)
