"""Exports a run as files that need no lungjax: python -m lungjax.export --model=runs/my_run --format=jax,onnx

    jax          model.pyz: StableHLO for CPU, CUDA and TPU; `python model.pyz scan.png` needs only jax, numpy, pillow
    onnx         model.onnx, for onnxruntime and others (`export` extra)
    savedmodel   savedmodel/, for TensorFlow, which must be installed
    triton       triton/NAME, a model of a Triton Inference Server repository, from the ONNX file (`export` extra)

Each export contains weights, normalization, calibration and metadata, and takes any number of images. The command
fails if outputs differ from those of the network by more than 1e-5 of their range, or up to 1e-4 for networks whose own
float32 rounding error is larger. An existing export is replaced. Several runs are exported as one ensemble.

jax can read a model.pyz for only a few months. --refresh=model.pyz replaces it with one for the installed jax,
built from the weights and the configuration in the file; with --format=onnx it writes an ONNX file.
"""

import importlib.util
import time
from importlib.metadata import version
from pathlib import Path

from absl import app, flags

from lungjax import cli
from lungjax.config import nearest
from lungjax.config.metadata import NOTICE
from lungjax.runtime import environment

FORMATS = ("jax", "onnx", "savedmodel", "triton")
ONNX = {package: "-e '.[export]'" for package in ("jax2onnx", "onnx", "onnxruntime")}
PACKAGES = {"onnx": ONNX, "triton": ONNX, "savedmodel": {"tensorflow": "tensorflow-cpu (or tensorflow)"}}

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list("model", [], cli.MODEL_HELP.format("Folder of a finished run"))
    flags.DEFINE_string("refresh", None, "A model.pyz to export again for the installed jax; replaces --model.")
    flags.DEFINE_list("format", ["jax"], f"One or more of {', '.join(FORMATS)}.")
    flags.DEFINE_string("out", None, "Output folder; default RUN/export, or that of --refresh=model.pyz.")


def main(_: list[str]) -> None:
    """Checks the flags, writes each format and prints its difference from the network and its speed."""
    if bool(FLAGS.model) == bool(FLAGS.refresh):
        raise app.UsageError("give --model=RUN, the folder of a finished run, or --refresh=FILE, a model.pyz")
    if FLAGS.refresh and Path(FLAGS.refresh).name != "model.pyz" and not FLAGS.out:
        raise app.UsageError(f"--refresh={FLAGS.refresh} is not named model.pyz: give the output folder with --out=DIR")
    if not FLAGS.format:
        raise app.UsageError(f"--format is empty: give one or more of {', '.join(FORMATS)}")
    for name in FLAGS.format:
        if name not in FORMATS:
            raise ValueError(f"--format={name}: {nearest(name, FORMATS)}")
        for package, install in PACKAGES.get(name, {}).items():
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"--format={name} needs the package {package}: pip install {install}")
    environment.prepare_jax()
    from lungjax.export import functions, onnx, savedmodel, stablehlo, triton  # here, since they import jax
    from lungjax.inference import artifacts, ensembles

    modules = {"jax": stablehlo, "onnx": onnx, "savedmodel": savedmodel, "triton": triton}
    if FLAGS.refresh:
        file = Path(FLAGS.refresh).expanduser()
        exported, out = functions.from_pyz(file), Path(FLAGS.out or file.parent).expanduser()
    else:
        runs = ensembles.find(FLAGS.model)
        out = cli.out_folder(runs, "export")
        exported = functions.load(runs)
    others = [name for name in FLAGS.format if name != "jax"]
    if others and len(artifacts.image_shape(exported.metadata)) != 3:
        reason = "the members need different inputs, which model.pyz computes itself"
        raise ValueError(f"--format={','.join(others)}: {reason}; this ensemble can only be exported as jax")
    out.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(FLAGS.format):
        start = time.monotonic()
        path, check = modules[name].write(exported, out)
        seconds = time.monotonic() - start
        result = f"relative difference in the outputs {check.difference:.0e}; {check.milliseconds:.1f} ms per image"
        print(f"{path}: {_size(path)} in {seconds:.0f} s; {result}")
        if name == "jax":
            print(f"Guaranteed to run with {artifacts.compatibility(version('jax'))}")
    print(NOTICE)


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"


if __name__ == "__main__":
    cli.run(main, define_flags)
