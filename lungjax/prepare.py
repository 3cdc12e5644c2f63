"""Prepares images for training: python -m lungjax.prepare --dataset=folder/mine --source=DIR

With --dataset=NAME --help: where to get that data set and what its folder must look like. With --cross=OTHER:
patients and images that two prepared data sets share. Only the flags are read here; `lungjax.datasets.write` does
the work. TensorFlow and JAX are never imported.
"""

import itertools
import sys
from pathlib import Path

from absl import app, flags

from lungjax import cli, datasets
from lungjax.data import summary

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("dataset", None, f"{', '.join(datasets.DATASETS)}, as NAME/CONFIGURATION-STAGE-SIZE.")
    flags.DEFINE_string("source", None, "The folder that holds the images as they were downloaded.")
    flags.DEFINE_string("data_dir", "data", "Where prepared data sets go.")
    flags.DEFINE_string("window", None, "low,high: 16-bit pixel values shown as black and as white.")
    flags.DEFINE_enum("on_bad_image", "fail", ["fail", "skip"], "What a damaged or missing image does.")
    flags.DEFINE_enum(
        "on_no_lung",
        "keep",
        ["keep", "skip", "fail"],
        "An image in which a stage finds no lung: keep it one stage before.",
    )
    flags.DEFINE_bool("overwrite", False, "Replaces a data set that is already prepared.")
    flags.DEFINE_string("cross", None, "A prepared data set: lists patients and images that both hold.")
    flags.DEFINE_integer("seed", 0, "Of the splits that are made, and of drawn data sets.")
    flags.DEFINE_string("group_pattern", "", "folder: regex; its (...) over the file name is the patient, as it is.")
    flags.DEFINE_string("source_pattern", "", "folder: regex; its (...) over the file name is the source.")
    flags.DEFINE_list("classes", [], "folder: the class names in label order; default sorted.")
    flags.DEFINE_enum(
        "modality", "", ["", "ct", "xray"], "folder: ct keeps a mask of the body of each slice, for augment.exterior."
    )
    flags.DEFINE_list(
        "hu_window", ["-600/1500"], "DICOM, NIfTI: centre/width in HU; three with commas become three channels."
    )
    flags.DEFINE_enum("plane", "axial", ["axial", "coronal", "sagittal"], "DICOM, NIfTI: how volumes are cut.")
    flags.DEFINE_enum("position", "all", ["all", "mid"], "DICOM, NIfTI: every slice, or the middle one.")


def main(_: list[str]) -> None:
    """Prepares the data set and prints its summary."""
    if not FLAGS.dataset:
        raise app.UsageError(f"--dataset=NAME is missing; there are {', '.join(datasets.DATASETS)}")
    data_dir = Path(FLAGS.data_dir).expanduser()
    if FLAGS.cross and not FLAGS.source:
        print(cross(FLAGS.dataset, FLAGS.cross, data_dir))
        return
    options = datasets.PrepareOptions(
        seed=FLAGS.seed,
        source_pattern=FLAGS.source_pattern,
        group_pattern=FLAGS.group_pattern,
        classes=tuple(FLAGS.classes),
        modality=FLAGS.modality,
        hu_windows=tuple(cli.read_hu_window(text) for text in FLAGS.hu_window),
        plane=FLAGS.plane,
        position=FLAGS.position,
    )
    window = cli.read_window(FLAGS.window) if FLAGS.window else None
    source = Path(FLAGS.source).expanduser() if FLAGS.source else None
    how = {
        "window": window,
        "on_bad_image": FLAGS.on_bad_image,
        "on_no_lung": FLAGS.on_no_lung,
        "overwrite": FLAGS.overwrite,
    }
    result = datasets.write(FLAGS.dataset, source, data_dir, options, **how)

    print(summary.markdown(result))
    if FLAGS.cross:
        print(cross(FLAGS.dataset, FLAGS.cross, data_dir))
    print(f"Train on it with --set=data.dataset={result['name']} --data_dir={data_dir}")


def cross(name: str, other: str, data_dir: Path) -> str:
    """Returns, as markdown, which patients and images two prepared data sets share.

    Raises ValueError if one of them is not prepared.
    """
    from lungjax.datasets.build import near_duplicates  # here: with it come scikit-image and TFDS

    return near_duplicates.cross(*(datasets.open_dataset(text, data_dir) for text in (name, other)))


def help_page(arguments: list[str]) -> str | None:
    """Returns the page of the data set if `arguments` ask for help and name one.

    Raises ValueError for an unknown data set.
    """
    if not {"--help", "-h", "-help"} & set(arguments):
        return None
    named = [text.partition("=")[2] for text in arguments if text.startswith(("--dataset=", "-dataset="))]
    named += [b for a, b in itertools.pairwise(arguments) if a in ("--dataset", "-dataset")]
    return datasets.help_text(named[-1]) if named else None


def run() -> None:
    """Prints a data set's page where one is asked for, else reads the flags and prepares."""
    try:
        page = help_page(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"lungjax: {error}")
    if page:
        print(page)
    else:
        cli.run(main, define_flags)


if __name__ == "__main__":
    run()
