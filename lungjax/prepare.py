"""Prepares a data set for training: python -m lungjax.prepare --dataset=folder/mine --source=DIR

--dataset=NAME --help prints the source of a data set and the required folder structure. --cross=OTHER prints the
patients and images that two prepared data sets share. --lookup=series-5d8538175f2c/0003 --source=DIR prints the DICOM
file that has this name in reports. Rerun an interrupted command to resume. This module imports neither TensorFlow nor
JAX.
"""

import itertools
import shlex
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from lungjax import cli, datasets
from lungjax.data import summary
from lungjax.data.safe_text import printable
from lungjax.datasets import overlap
from lungjax.runtime.advice import in_user_form

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("dataset", None, f"NAME/CONFIGURATION-STAGE-SIZE; names: {', '.join(datasets.DATASETS)}.")
    flags.DEFINE_string("source", None, "Folder with the downloaded images.")
    flags.DEFINE_string("data_dir", "data", "Folder for prepared data sets.")
    flags.DEFINE_string("window", None, "16-bit pixel values that become black and white, as low,high.")
    flags.DEFINE_enum("on_bad_image", "fail", ["fail", "skip"], "Action for a damaged or missing image.")
    keep = "Action for an image without a detected body or lung: keep stores the previous stage."
    flags.DEFINE_enum("on_no_lung", "keep", ["keep", "skip", "fail"], keep)
    flags.DEFINE_bool("overwrite", False, "Replace a prepared data set.")
    flags.DEFINE_string("cross", None, "Another prepared data set; prints the patients and images that both share.")
    flags.DEFINE_string("lookup", None, "folder: print the files in --source that have this name in reports.")
    flags.DEFINE_integer("seed", 0, "Seed for new splits and synthetic data sets.")
    flags.DEFINE_string("group_pattern", "", "folder: regex whose group is the patient; 'none': each image is one.")
    flags.DEFINE_string("source_pattern", "", "folder: regex whose first group is the source in a file name.")
    flags.DEFINE_list("classes", [], "folder: class names in label order; sorted by default.")
    flags.DEFINE_enum("modality", "", ["", "ct", "xray"], "folder: of the images; ct also stores body masks.")
    window = "DICOM, NIfTI: window as center/width in HU; three windows give three channels."
    flags.DEFINE_list("hu_window", ["-600/1500"], window)
    flags.DEFINE_enum("plane", "axial", ["axial", "coronal", "sagittal"], "DICOM, NIfTI: orientation of the images.")
    flags.DEFINE_enum("position", "all", ["all", "mid"], "DICOM, NIfTI: all slices, or the middle one.")
    cli.define_limit_flags()


def main(_: list[str]) -> None:
    """Prepares the data set and prints its summary and, with --cross, the images shared with another data set."""
    if not FLAGS.dataset and not FLAGS.lookup:
        raise app.UsageError(f"--dataset=NAME is missing; available: {', '.join(datasets.DATASETS)}")
    data_dir = Path(FLAGS.data_dir).expanduser()
    source = Path(FLAGS.source).expanduser() if FLAGS.source else None
    names = ("seed", "source_pattern", "group_pattern", "modality", "plane", "position")
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    hu_windows = tuple(cli.read_hu_window(text) for text in FLAGS.hu_window)
    values |= {"classes": tuple(FLAGS.classes), "hu_windows": hu_windows, "limits": cli.limits()}
    options = datasets.PrepareOptions(**values)
    if FLAGS.lookup:
        print("\n".join(map(printable, datasets.lookup(FLAGS.lookup, source, data_dir, options))))
        return
    if source or not FLAGS.cross:
        result = datasets.write(
            FLAGS.dataset,
            source,
            data_dir,
            options,
            window=cli.read_window(FLAGS.window) if FLAGS.window else None,
            on_bad_image=FLAGS.on_bad_image,
            on_no_lung=FLAGS.on_no_lung,
            overwrite=FLAGS.overwrite,
        )
        print(summary.markdown(result))
        purpose, command = "train on it", f"--experiment=finetune:dataset={result['name']}"
        if "train" not in (given := result["protocols"]["clean"]):
            purpose, command = "test a run on it", f"--mode=evaluate --workdir=runs/NAME --dataset={result['name']}"
            command += "" if "test" in given else " --split=val"
        command += f" --data_dir={shlex.quote(str(data_dir))}"
        print(in_user_form(f"To {purpose}: python -m lungjax.main {command}"))
    if FLAGS.cross:
        print(overlap.report(*(datasets.open_dataset(name, data_dir) for name in (FLAGS.dataset, FLAGS.cross))))


def run() -> None:
    """Prints the help page of a data set, or parses the flags and prepares a data set."""
    arguments = sys.argv[1:]
    names = [text.partition("=")[2] for text in arguments if text.startswith(("--dataset=", "-dataset="))]
    names += [b for a, b in itertools.pairwise(arguments) if a in ("--dataset", "-dataset")]
    if not names or not {"--help", "-h", "-help"} & set(arguments):
        cli.run(main, define_flags, resumable=True)
        return
    try:
        print(in_user_form(datasets.help_text(names[-1])))
    except ValueError as error:
        sys.exit(in_user_form(f"lungjax: {error}"))


if __name__ == "__main__":
    run()
