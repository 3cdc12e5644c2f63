"""Writes `savedmodel/`, for TensorFlow and TensorFlow Serving: the StableHLO program with its weights as variables.

    signature serving_default: pixels uint8 [B, H, W, C] -> probabilities, logits float32 [B, classes]

By jax2tf with native serialisation: TensorFlow runs the same program as `model.pyz`, through XLA, on CPU, CUDA
and TPU. model.json lies in assets.extra, where TensorFlow leaves files alone.
"""

import os
from pathlib import Path
from typing import Any

from lungjax.config.metadata import FILE
from lungjax.export.functions import Programs, without_places
from lungjax.runtime.files import atomic_folder

FOLDER = "savedmodel"
PLATFORMS = ("cpu", "cuda", "tpu")


def write(programs: Programs, folder: Path) -> tuple[Path, float]:
    """Writes FOLDER into `folder`, loads it again and compares it with the network.

    Returns its path, and the largest difference of the logits by their range. Raises ValueError, and leaves no folder,
    if that is too large, or where TensorFlow is missing.
    """
    tf = load_packages()
    from jax.experimental import jax2tf  # here, since it imports TensorFlow

    path = folder / FOLDER
    native = jax2tf.convert(
        programs.predict,
        polymorphic_shapes=[None, "(b, ...)"],
        native_serialization_platforms=PLATFORMS,
        with_gradient=False,
    )
    module = tf.Module()
    module.weights = {name: tf.Variable(array, trainable=False) for name, array in _named(programs.weights).items()}

    def predict(pixels: Any) -> Any:
        return native({name.replace("|", "/"): value for name, value in module.weights.items()}, pixels)

    given = tf.TensorSpec((None, *programs.image_shape), tf.uint8, name="pixels")
    module.predict = tf.function(predict, input_signature=[given], autograph=False)
    with atomic_folder(path, f"assets.extra/{FILE}") as partial_folder, without_places():
        tf.saved_model.save(module, str(partial_folder), signatures=module.predict)
        extra = partial_folder / "assets.extra"
        extra.mkdir()
        (extra / FILE).write_text(programs.metadata.to_json(), "utf-8")
        loaded = tf.saved_model.load(str(partial_folder)).signatures["serving_default"]
        found = programs.check(lambda pixels: loaded(pixels=tf.constant(pixels)), FOLDER)
    return path, found


def load_packages() -> Any:
    """Returns TensorFlow. Raises ValueError where it is missing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow
    except ImportError as error:
        raise ValueError(
            f"{FOLDER} needs the package {error.name}: pip install tensorflow-cpu (or tensorflow); lungjax does without"
        ) from None
    return tensorflow


def _named(weights: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("/", "|"): array for name, array in weights.items()}  # TensorFlow's names are paths
