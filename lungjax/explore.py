"""Writes a page of figures about a prepared data set: python -m lungjax.explore --dataset=folder/mine

The page shows counts, sources, sizes, gray levels, samples, stages with their masks, augmented images and duplicates.
"""

from pathlib import Path

from absl import app, flags

from lungjax import cli, datasets
from lungjax.config import PROTOCOLS, presets

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("dataset", None, "A prepared data set, as NAME/CONFIGURATION-STAGE-SIZE.")
    flags.DEFINE_string("data_dir", "data", "Folder of the prepared data sets.")
    flags.DEFINE_string("out", None, "New or empty output folder; default explore/NAME.")
    flags.DEFINE_enum("protocol", "clean", PROTOCOLS, "Protocol of the splits.")
    flags.DEFINE_list("augment", [], "Presets to show; default covidnet_ct for CT, xray_covid_online for X-rays.")
    flags.DEFINE_bool("stages", None, "Show masks and stages; by default only if body masks were stored.")
    flags.DEFINE_integer("seed", 0, "Random seed for the choice of images.", lower_bound=0)
    flags.DEFINE_integer("samples", 12, "Number of images per class.", lower_bound=1, upper_bound=120)


def main(_: list[str]) -> None:
    """Writes the page and prints its path."""
    if not FLAGS.dataset:
        raise app.UsageError(f"--dataset=NAME is missing: one of {', '.join(datasets.DATASETS)}")
    augmentations = {name: presets.preset(name) for name in FLAGS.augment}
    full = datasets.resolve(FLAGS.dataset)[0].full
    out = Path(FLAGS.out or Path("explore") / full).expanduser()
    data_dir = Path(FLAGS.data_dir).expanduser()
    data = datasets.open_dataset(FLAGS.dataset, data_dir, FLAGS.protocol)
    from lungjax.report import dataset_page  # here: it imports jax and scikit-image

    print(f"Page: {dataset_page.write(data, data_dir, out, augmentations, FLAGS.stages, FLAGS.seed, FLAGS.samples)}")


if __name__ == "__main__":
    cli.run(main, define_flags)
