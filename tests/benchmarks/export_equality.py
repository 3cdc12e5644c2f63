"""How near exports are to the network: python tests/benchmarks/export_equality.py [NETWORK:SIDE ...] [--formats=...]

For each network and format the largest difference of logits by their range, at batches of 1, 3 and 8 images, from
`module.apply` in float32 with this platform's own forms, unfolded. Weights and running statistics are random, drawn
from each tensor's name. Also the size of the file and the seconds that the export took with its own check. A format
whose package is missing is left out, by name. With --exact a last column is the network's own rounding: its distance
from float64.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from random_weights import random_variables

from lungjax import models
from lungjax.config import InputSpec, ModelConfig
from lungjax.config.metadata import Metadata
from lungjax.export import onnx, savedmodel, stablehlo
from lungjax.export.functions import Programs
from lungjax.inference import artifacts
from lungjax.models import outputs

NETWORKS = (
    "cbr_small:224", "xray_cnn:256", "efficientnet_b0:224", "efficientnetv2_s:128", "convnext_tiny:128",
    "resnet50v2:128", "bit_r50x1:128", "densenet121:128", "vgg16:64", "mobilenetv2:224", "mobilenetv3_small:224",
)  # fmt: skip
BATCHES = (1, 3, 8)


def make(name: str, side: int) -> Programs:
    """Returns a network of three classes for gray images of side x side, with random weights."""
    spec = InputSpec(size=(side, side), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    module = models.build(ModelConfig(name=name, dtype="float32"), 3)
    variables = jax.tree.map(jnp.asarray, random_variables(module, (side, side, 3)))
    told = Metadata(name, ("a", "b", "c"), spec, "folder", temperature=1.3)
    return Programs(told, module, {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})})


def exact(programs: Programs, pixels: np.ndarray) -> np.ndarray:
    """Returns the logits in float64."""
    spec = programs.metadata.input
    with jax.enable_x64(True):
        module = programs.module.clone(dtype=jnp.float64)
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), programs.variables)
        normal = (pixels / 255.0 - np.asarray(spec.mean)) / np.asarray(spec.std)
        each = [np.asarray(module.apply(variables, normal[i : i + 1], train=False)[0]) for i in range(len(pixels))]
    return np.asarray(outputs.class_logits(np.concatenate(each), None))


def runner(form: str, path: Path):
    """Returns the function from pixels to logits of a written export."""
    if form == "jax":
        exported = artifacts.read_pyz(path)
        return lambda pixels: np.asarray(exported.outputs(pixels)["logits"])
    if form == "onnx":
        session = artifacts.read_onnx(path)
        return lambda pixels: session.outputs(pixels)["logits"]
    tf = savedmodel.load_packages()
    loaded = tf.saved_model.load(str(path))
    return lambda pixels: loaded.predict(tf.constant(pixels))["logits"].numpy()


def size(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--formats", default="jax,onnx,savedmodel")
    parser.add_argument("--exact", action="store_true")
    flags = parser.parse_args()
    writers = {"jax": stablehlo, "onnx": onnx, "savedmodel": savedmodel}
    forms = []
    for form in flags.formats.split(","):
        try:
            writers[form].load_packages()
            forms.append(form)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
    end = " float32 |" if flags.exact else ""
    print(f"| network, pixels | format | batch 1 | batch 3 | batch 8 | MiB | s |{end}")
    print(f"| --- | --- | ---: | ---: | ---: | ---: | ---: |{' ---: |' if end else ''}", flush=True)
    for given in flags.networks:
        name, _, side = given.partition(":")
        programs = make(name, int(side))
        pixels = {batch: programs.sample(batch) for batch in BATCHES}
        wanted = {batch: programs.reference(some)["logits"] for batch, some in pixels.items()}
        span = max(w.max() for w in wanted.values()) - min(w.min() for w in wanted.values())
        if flags.exact:
            end = f" {np.abs(wanted[3] - exact(programs, pixels[3])).max() / span:.1e} |"
        for form in forms:
            with tempfile.TemporaryDirectory() as folder:
                start = time.monotonic()
                path, _ = writers[form].write(programs, Path(folder))
                seconds, run = time.monotonic() - start, runner(form, path)
                found = [np.abs(run(pixels[batch]) - wanted[batch]).max() / span for batch in BATCHES]
                cells = [f"{name}, {side}", form, *(f"{value:.1e}" for value in found)]
                print(f"| {' | '.join(cells)} | {size(path):.1f} | {seconds:.0f} |{end}", flush=True)


if __name__ == "__main__":
    main()
