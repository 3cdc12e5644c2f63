"""Shows what is in a prepared data set, as a page with pictures: python -m lungjax.explore --dataset=folder/mine

Counts, sources, sizes, gray levels, samples, stages with their masks, augmented images, and what is there
twice. All is read from the prepared set; jax is imported for the augmented images only.
"""

from pathlib import Path

from absl import app, flags

from lungjax import cli, datasets
from lungjax.config import PROTOCOLS, presets
from lungjax.report import dataset_page

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("dataset", None, "A prepared data set, as NAME/CONFIGURATION-STAGE-SIZE.")
    flags.DEFINE_string("data_dir", "data", "Where lungjax.prepare wrote the data sets.")
    flags.DEFINE_string("out", None, "The folder of the page, new or empty; default explore/NAME.")
    flags.DEFINE_enum("protocol", "clean", PROTOCOLS, "Whose train, val and test the page describes.")
    flags.DEFINE_list(
        "augment", [], "Presets to show, with commas; default covidnet_ct for CT and xray_covid_online for X-rays."
    )
    flags.DEFINE_bool("stages", None, "Draws masks and stages; default for sets prepared with masks of the body.")
    flags.DEFINE_integer("seed", 0, "Of the images that are drawn to be shown.", lower_bound=0)
    flags.DEFINE_integer("samples", 12, "Images shown of each class.", lower_bound=1, upper_bound=120)


def main(_: list[str]) -> None:
    """Writes the page and says where it is."""
    if not FLAGS.dataset:
        raise app.UsageError(f"--dataset=NAME is missing; there are {', '.join(datasets.DATASETS)}")
    chosen = {name: presets.preset(name) for name in FLAGS.augment}
    full = datasets.resolve(FLAGS.dataset)[0].full
    out = Path(FLAGS.out or Path("explore") / full).expanduser()
    dataset_page.check_free(out)
    data_dir = Path(FLAGS.data_dir).expanduser()
    data = datasets.open_dataset(FLAGS.dataset, data_dir, FLAGS.protocol)
    print(f"Page: {dataset_page.write(data, data_dir, out, chosen, FLAGS.stages, FLAGS.seed, FLAGS.samples)}")


if __name__ == "__main__":
    cli.run(main, define_flags)
