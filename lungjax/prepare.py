"""Prepares images for training: python -m lungjax.prepare --dataset=folder/mine --source=DIR

With --dataset=NAME --help: where to get that data set, and the required structure of its folder. With --cross=OTHER:
patients and images that two prepared data sets share. This module only reads the flags; `lungjax.datasets.write` does
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
    flags.DEFINE_string("source", None, "Folder with the downloaded images.")
    flags.DEFINE_string("data_dir", "data", "Folder for prepared data sets.")
    flags.DEFINE_string("window", None, "low,high: 16-bit pixel values that become black and white.")
    flags.DEFINE_enum("on_bad_image", "fail", ["fail", "skip"], "Action for a damaged or missing image.")
    flags.DEFINE_enum(
        "on_no_lung",
        "keep",
        ["keep", "skip", "fail"],
        "Action for an image in which a stage finds no body or lung: keep stores the previous stage.",
    )
    flags.DEFINE_bool("overwrite", False, "Replaces a prepared data set.")
    flags.DEFINE_string("cross", None, "A prepared data set: lists the patients and images in both.")
    flags.DEFINE_integer("seed", 0, "Seed of new splits and synthetic data sets.")
    flags.DEFINE_string("group_pattern", "", "folder: regex; its (...) in the file name is the patient, unmodified.")
    flags.DEFINE_string("source_pattern", "", "folder: regex; its (...) in the file name is the source.")
    flags.DEFINE_list("classes", [], "folder: class names in label order; sorted by default.")
    flags.DEFINE_enum(
        "modality", "", ["", "ct", "xray"], "folder: ct stores a body mask of each slice, for augment.exterior."
    )
    flags.DEFINE_list(
        "hu_window", ["-600/1500"], "DICOM, NIfTI: center/width in HU; three, separated by commas, make three channels."
    )
    flags.DEFINE_enum("plane", "axial", ["axial", "coronal", "sagittal"], "DICOM, NIfTI: the plane to cut.")
    flags.DEFINE_enum("position", "all", ["all", "mid"], "DICOM, NIfTI: all slices, or the middle one.")


def main(_: list[str]) -> None:
    """Prepares the data set and prints its summary."""
    if not FLAGS.dataset:
        raise app.UsageError(f"--dataset=NAME is missing; known: {', '.join(datasets.DATASETS)}")
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
    result = datasets.write(
        FLAGS.dataset,
        Path(FLAGS.source).expanduser() if FLAGS.source else None,
        data_dir,
        options,
        window=cli.read_window(FLAGS.window) if FLAGS.window else None,
        on_bad_image=FLAGS.on_bad_image,
        on_no_lung=FLAGS.on_no_lung,
        overwrite=FLAGS.overwrite,
    )
    print(summary.markdown(result))
    if FLAGS.cross:
        print(cross(FLAGS.dataset, FLAGS.cross, data_dir))
    print(f"Train on it with --set=data.dataset={result['name']} --data_dir={data_dir}")


def cross(name: str, other: str, data_dir: Path) -> str:
    """Returns, as markdown, the patients and images that two prepared data sets share.

    Raises ValueError if one of them is not prepared.
    """
    from lungjax.datasets.build import near_duplicates  # late: it imports scikit-image and TFDS

    return near_duplicates.cross(*(datasets.open_dataset(text, data_dir) for text in (name, other)))


def help_page(arguments: list[str]) -> str | None:
    """Returns the page of a data set if `arguments` ask for help and name one.

    Raises ValueError for an unknown data set.
    """
    if not {"--help", "-h", "-help"} & set(arguments):
        return None
    names = [text.partition("=")[2] for text in arguments if text.startswith(("--dataset=", "-dataset="))]
    names += [b for a, b in itertools.pairwise(arguments) if a in ("--dataset", "-dataset")]
    return datasets.help_text(names[-1]) if names else None


def run() -> None:
    """Prints a data set's page if requested, else reads the flags and prepares."""
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
