"""Writes a finished run as files that need no lungjax: python -m lungjax.export --workdir=runs/my_run --format=jax,onnx

    jax          model.pyz: StableHLO for CPU, CUDA and TPU; python model.pyz scan.png needs jax, numpy and pillow alone
    onnx         model.onnx, for onnxruntime and others (extra `export`)
    savedmodel   savedmodel/, for TensorFlow, which must be installed
    triton       triton/NAME, a model of a Triton Inference Server's repository, from the ONNX file (extra `export`)

Each has weights, normalisation, calibration and metadata in it, takes any number of images, and is compared with the
network before it is kept: logits equal to 1e-5 of their range. What lies there from before is replaced.
"""

import time
from pathlib import Path

from absl import app, flags

from lungjax import cli
from lungjax.config import nearest
from lungjax.config.metadata import NOTICE
from lungjax.runtime import environment

FORMATS = ("jax", "onnx", "savedmodel", "triton")

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("workdir", None, "A finished run.")
    flags.DEFINE_list("format", ["jax"], f"Of {', '.join(FORMATS)}; several with commas.")
    flags.DEFINE_string("out", None, "The folder to write to; default WORKDIR/export.")


def main(_: list[str]) -> None:
    """Checks what was asked for, then writes one format after the other and says how near each is to the network."""
    if not FLAGS.workdir:
        raise app.UsageError("--workdir=RUN is missing: the folder of a finished run")
    if not FLAGS.format:
        raise app.UsageError(f"--format is empty: give some of {', '.join(FORMATS)}")
    for name in FLAGS.format:
        if name not in FORMATS:
            raise ValueError(f"--format={name}: {nearest(name, FORMATS)}")
    environment.prepare_jax()
    from lungjax.export import functions, onnx, savedmodel, stablehlo, triton  # here, since they import jax

    modules = {"jax": stablehlo, "onnx": onnx, "savedmodel": savedmodel, "triton": triton}
    chosen = [name for name in FORMATS if name in FLAGS.format]
    for name in chosen:
        modules[name].load_packages()  # before a minute of work for the other formats
    workdir = Path(FLAGS.workdir).expanduser()
    made = functions.of_run(workdir)
    out = Path(FLAGS.out).expanduser() if FLAGS.out else workdir / "export"
    out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        start = time.monotonic()
        path, found = modules[name].write(made, out)
        seconds = time.monotonic() - start
        print(f"{path}: {_size(path)} in {seconds:.0f} s; logits within {found:.0e} of their range of the network's")
    print(NOTICE)


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"


if __name__ == "__main__":
    cli.run(main, define_flags)
