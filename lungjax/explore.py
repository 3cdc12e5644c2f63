"""Shows what is in a prepared data set, as a page with pictures: python -m lungjax.explore --dataset=folder/mine

Counts, sources, sizes, gray levels, samples, stages with their masks, augmented images, and what is there
twice. All is read from the prepared set; jax is imported for the augmented images only.
"""

from pathlib import Path

from absl import app, flags

from lungjax import cli, datasets
from lungjax.config import PROTOCOLS, presets
from lungjax.report import dataset_page

DATASET = flags.DEFINE_string("dataset", None, "A prepared data set, as NAME/CONFIGURATION-STAGE-SIZE.")
DATA_DIR = flags.DEFINE_string("data_dir", "data", "Where lungjax.prepare wrote the data sets.")
OUT = flags.DEFINE_string("out", None, "The folder of the page, new or empty; default explore/NAME.")
PROTOCOL = flags.DEFINE_enum("protocol", "clean", PROTOCOLS, "Whose train, val and test the page describes.")
AUGMENT = flags.DEFINE_list(
    "augment", [], "Presets to show, with commas; default covidnet_ct for CT and xray_covid_online for X-rays."
)
STAGES = flags.DEFINE_bool("stages", None, "Draws masks and stages; default for sets prepared with masks of the body.")
SEED = flags.DEFINE_integer("seed", 0, "Of the images that are drawn to be shown.", lower_bound=0)
SAMPLES = flags.DEFINE_integer("samples", 12, "Images shown of each class.", lower_bound=1, upper_bound=120)
flags.adopt_module_key_flags(cli)


def main(_: list[str]) -> None:
    """Writes the page and says where it is."""
    if not DATASET.value:
        raise app.UsageError(f"--dataset=NAME is missing; there are {', '.join(datasets.DATASETS)}")
    chosen = {name: presets.preset(name) for name in AUGMENT.value}
    full = datasets.resolve(DATASET.value)[0].full
    out = Path(OUT.value or Path("explore") / full).expanduser()
    dataset_page.check_free(out)
    data_dir = Path(DATA_DIR.value).expanduser()
    data = datasets.open_dataset(DATASET.value, data_dir, PROTOCOL.value)
    print(f"Page: {dataset_page.write(data, data_dir, out, chosen, STAGES.value, SEED.value, SAMPLES.value)}")


if __name__ == "__main__":
    cli.run(main)
