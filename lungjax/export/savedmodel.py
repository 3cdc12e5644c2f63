"""Writes `savedmodel/`, for TensorFlow and TensorFlow Serving: the StableHLO program with its weights as variables.

    signature serving_default: pixels uint8 [B, H, W, C] -> probabilities, logits [B, classes], features [B, F], float32

With jax2tf's native serialization, TensorFlow runs the same program as `model.pyz`, through XLA, on CPU, CUDA and TPU.
model.json is in assets.extra, which TensorFlow ignores. Clients crop and resize images as its `input` specifies,
after rotating them by 180 degrees if its `orientation` is "rotated".
"""

import os
from pathlib import Path
from typing import Any

from lungjax.config.metadata import FILE
from lungjax.export.functions import Check, Exportable, without_source_paths
from lungjax.inference import artifacts
from lungjax.runtime.files import atomic_folder

FOLDER = "savedmodel"


def write(functions: Exportable, folder: Path) -> tuple[Path, Check]:
    """Writes FOLDER into `folder` and reloads it; returns its path and the result of `Functions.check`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf
    from jax.experimental import jax2tf

    path = folder / FOLDER
    native = jax2tf.convert(
        functions.predict,
        polymorphic_shapes=[None, "(b, ...)"],
        native_serialization_platforms=artifacts.PLATFORMS,
        with_gradient=False,
    )
    module = tf.Module()
    # TensorFlow would read "/" in a name as a path.
    names = {path: path.replace("/", "|") for path in functions.weights}
    module.weights = {names[path]: tf.Variable(array, trainable=False) for path, array in functions.weights.items()}

    def predict(pixels: Any) -> Any:
        return native({path: module.weights[name] for path, name in names.items()}, pixels)

    signature = tf.TensorSpec((None, *artifacts.image_shape(functions.metadata)), tf.uint8, name="pixels")
    module.predict = tf.function(predict, input_signature=[signature], autograph=False)
    with atomic_folder(path, f"assets.extra/{FILE}") as partial_folder, without_source_paths():
        tf.saved_model.save(module, str(partial_folder), signatures=module.predict)
        extra = partial_folder / "assets.extra"
        extra.mkdir()
        (extra / FILE).write_text(functions.metadata.to_json(), "utf-8")
        loaded = tf.saved_model.load(str(partial_folder)).signatures["serving_default"]
        check = functions.check(lambda pixels: loaded(pixels=tf.constant(pixels)), FOLDER)
    return path, check
