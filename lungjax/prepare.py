"""Prepares images for training: python -m lungjax.prepare --dataset=folder/mine --source=DIR

Only the flags are read here; `lungjax.datasets.write` does the work. TensorFlow and JAX are never imported.
"""

from pathlib import Path

from absl import app, flags

from lungjax import datasets, entry
from lungjax.data import summary

DATASET = flags.DEFINE_string("dataset", None, f"{', '.join(datasets.DATASETS)}, as NAME or NAME/CONFIGURATION.")
SOURCE = flags.DEFINE_string("source", None, "The folder that holds the images as they were downloaded.")
DATA_DIR = flags.DEFINE_string("data_dir", "data", "Where prepared data sets go.")
WINDOW = flags.DEFINE_string("window", None, "low,high: 16-bit pixel values shown as black and as white.")
BAD = flags.DEFINE_enum("on_bad_image", "fail", ["fail", "skip"], "What a damaged or missing image does.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replaces a data set that is already prepared.")
SEED = flags.DEFINE_integer("seed", 0, "Of the splits that are made, and of drawn data sets.")
GROUP = flags.DEFINE_string("group_pattern", "", "folder: regex; its (...) over the file name is the patient.")
ORIGIN = flags.DEFINE_string("source_pattern", "", "folder: regex; its (...) over the file name is the source.")
CLASSES = flags.DEFINE_list("classes", [], "folder: the class names in label order; default sorted.")
flags.adopt_module_key_flags(entry)


def main(argv: list[str]) -> None:
    """Prepares the data set and prints its summary."""
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: every flag starts with --")
    if not DATASET.value:
        raise app.UsageError(f"--dataset=NAME is missing; there are {', '.join(datasets.DATASETS)}")
    options = datasets.Options(SEED.value, ORIGIN.value, GROUP.value, tuple(CLASSES.value))
    window = read_window(WINDOW.value) if WINDOW.value else None
    source = Path(SOURCE.value).expanduser() if SOURCE.value else None
    data_dir = Path(DATA_DIR.value).expanduser()
    how = {"window": window, "on_bad_image": BAD.value, "overwrite": OVERWRITE.value}
    result = datasets.write(DATASET.value, source, data_dir, options, **how)

    print(summary.markdown(result))
    print(f"Train on it with --set=data.dataset={result['name']} --data_dir={data_dir}")


def read_window(text: str) -> tuple[float, float]:
    """Returns low and high of "low,high". Raises ValueError for anything else."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--window={text}: wanted two numbers low,high such as --window=-160,240") from None
    if not low < high:
        raise ValueError(f"--window={text}: low must be below high")
    return low, high


if __name__ == "__main__":
    entry.run(main)
