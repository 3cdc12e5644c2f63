"""Differences of exports from the network.

    python tests/benchmarks/export_equality.py [NETWORK:SIDE ...] [--formats=jax,onnx,savedmodel]

Formats whose packages are missing are skipped.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lungjax import models
from lungjax.config import InputSpec, ModelConfig
from lungjax.config.metadata import Metadata
from lungjax.export import onnx, savedmodel, stablehlo
from lungjax.export.functions import Functions
from lungjax.inference import artifacts
from tests.benchmarks import harness
from tests.random_weights import random_variables

NETWORKS = (
    "cbr_small:224", "xray_cnn:256", "efficientnet_b0:224", "efficientnetv2_s:128", "convnext_tiny:128",
    "resnet50v2:128", "bit_r50x1:128", "densenet121:128", "vgg16:64", "mobilenetv2:224", "mobilenetv3_small:224",
)  # fmt: skip
WRITERS = {"jax": stablehlo, "onnx": onnx, "savedmodel": savedmodel}
BATCHES = (1, 3, 8)


def make(name: str, side: int) -> Functions:
    """Returns a network of three classes for grayscale images of side x side, with random weights."""
    spec = InputSpec(size=(side, side), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    module = models.build(ModelConfig(name=name, dtype="float32"), 3)
    variables = jax.tree.map(jnp.asarray, random_variables(module, (side, side, 3)))
    metadata = Metadata(name, ("a", "b", "c"), spec, "folder", temperature=1.3)
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return Functions(metadata, module, variables)


def runner(form: str, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    if form == "savedmodel":
        import tensorflow as tf

        loaded = tf.saved_model.load(str(path))
        return lambda pixels: loaded.predict(tf.constant(pixels))["logits"].numpy()
    exported = artifacts.read_pyz(path) if form == "jax" else artifacts.read_onnx(path)
    return lambda pixels: np.asarray(exported.outputs(pixels)["logits"])


def main() -> None:
    flags = harness.parse(__doc__, positional="networks", formats=list(WRITERS))
    heads = ("network, pixels", "format", *(f"batch {batch}" for batch in BATCHES), "MiB", "s")
    print(harness.header(*heads), flush=True)
    for network in flags.networks or NETWORKS:
        name, _, side = network.partition(":")
        functions = make(name, int(side))
        pixels = {batch: functions.sample(batch) for batch in BATCHES}
        expected = {batch: functions.reference(images)["logits"] for batch, images in pixels.items()}
        span = np.ptp(np.concatenate(list(expected.values())))
        for form in flags.formats:
            with tempfile.TemporaryDirectory() as folder:
                start = time.monotonic()
                path, _ = WRITERS[form].write(functions, Path(folder))
                seconds, run = time.monotonic() - start, runner(form, path)
                differences = [np.abs(run(pixels[batch]) - expected[batch]).max() / span for batch in BATCHES]
                size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()) / 2**20
                cells = [f"{name}, {side}", form, *(f"{value:.1e}" for value in differences)]
                print(harness.row(*cells, f"{size:.1f}", f"{seconds:.0f}"), flush=True)


if __name__ == "__main__":
    main()
