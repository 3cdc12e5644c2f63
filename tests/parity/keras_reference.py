"""Keras networks as references."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported, which then needs no TensorFlow

import re
from pathlib import Path
from typing import Any

import h5py
import jax
import keras
import numpy as np

from tests.parity import studies
from tests.parity.cases import Case
from tests.parity.references import MEANS, VARIANCES, Reference
from tests.parity.released import released


class KerasReference(Reference):
    def __init__(self, case: Case, side: int, double: bool = False) -> None:
        kind = "float64" if double else "float32"
        jax.config.update("jax_enable_x64", double)
        keras.config.set_floatx(kind)
        keras.config.set_dtype_policy(kind)
        if double:
            # BatchNorm takes its dtype from this function, which never returns float64.
            keras.src.backend.result_type = lambda *types: "float64"
        if case.layout == "ours":
            self.model = studies.build(case.name, side)
        else:
            options = {"weights": None, "classifier_activation": None}
            if case.name.startswith(("EfficientNetV2", "ConvNeXt", "MobileNetV3")):
                options["include_preprocessing"] = False
            if case.headless:
                options = {"weights": None, "include_top": False, "pooling": "avg"}
            self.model = getattr(keras.applications, case.name)(input_shape=(side, side, 3), **options)
        self.case, self.kind = case, kind
        self.variables = [variable for variable in self.model.weights if "seed_generator" not in variable.path]
        self.names = [_path(variable) for variable in self.variables]

    def arrays(self) -> list[np.ndarray]:
        return [np.array(variable.value) for variable in self.variables]

    def assign(self, arrays: list[np.ndarray]) -> None:
        for variable, array in zip(self.variables, arrays, strict=True):
            variable.assign(array)

    def run(self, images: np.ndarray, training: bool) -> Any:
        """Returns the logits, and the values of the non-trainable variables after the pass."""
        x = self.feed(images)
        parts = (
            [v.value for v in self.model.trainable_variables],
            [v.value for v in self.model.non_trainable_variables],
        )
        return jax.jit(lambda t, n, x: self.model.stateless_call(t, n, x, training=training))(*parts, x)

    def with_batch_statistics(self, images: np.ndarray) -> list[np.ndarray]:
        """Returns the arrays, with the statistics of `images` as running statistics."""
        arrays = self.arrays()
        statistic = [bool(MEANS.search(name) or VARIANCES.search(name)) for name in self.names]
        self.assign([array * 0 if is_one else array for array, is_one in zip(arrays, statistic, strict=True)])
        after = map(np.asarray, self.run(images, training=True)[1])
        after = dict(zip(map(_path, self.model.non_trainable_variables), after, strict=True))
        decay = {layer.name: layer.momentum for layer in self.model.layers if hasattr(layer, "momentum")}
        return [
            after[name] / (1 - decay[name.split("/")[0]]) if is_one else array
            for name, array, is_one in zip(self.names, arrays, statistic, strict=True)
        ]

    def feed(self, images: np.ndarray) -> np.ndarray:
        """Converts normalized RGB images to the input of the network."""
        images = images.astype(self.kind)
        if self.case.name.startswith("EfficientNetB"):
            return images * 255  # the network divides by 255
        if re.fullmatch(r"ResNet\d+|VGG\d+", self.case.name) or self.case.layout == "keras_bgr":
            return images[..., ::-1].copy()  # BGR
        return images

    def logits(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.run(images, training=False)[0])

    def gradients(self, images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the logits in training mode, and the gradients of their mean square, keyed by the library's names."""
        fixed, x = [v.value for v in self.model.non_trainable_variables], self.feed(images)

        def loss(trained: Any) -> Any:
            out, _ = self.model.stateless_call(trained, fixed, x, training=True)
            return (out**2).mean(), out

        grads, out = jax.jit(jax.grad(loss, has_aux=True))([v.value for v in self.model.trainable_variables])
        names = map(_path, self.model.trainable_variables)
        return np.asarray(out), {name: np.asarray(g) for name, g in zip(names, grads, strict=True)}

    def parameters(self) -> int:
        return sum(int(np.prod(v.shape)) for v in self.model.trainable_variables)

    def file_array(self, array: np.ndarray) -> np.ndarray:
        return array

    def file_name(self, name: str, shape: tuple[int, ...]) -> str:
        layer, (weight,) = released(self.case.name, name.partition("/")[0], {name: shape})
        return f"{layer}/{weight.removesuffix(':0').removeprefix(layer + '/')}"

    def write(self, path: Path) -> None:
        if self.case.layout == "ours":
            np.savez(path, **studies.arrays(self.model))
            return
        with h5py.File(path, "w") as file:
            root = file.require_group("model_weights") if self.case.headless else file  # RadImageNet's have the model
            layers = []
            for layer in self.model.layers:
                arrays = {v.path: np.asarray(v.value) for v in layer.weights if "seed_generator" not in v.path}
                name, weights = released(self.case.name, layer.name, {key: a.shape for key, a in arrays.items()})
                layers.append(name.encode())
                group = root.require_group(name)
                group.attrs["weight_names"] = np.array([weight.encode() for weight in weights], dtype="S")
                for weight, array in zip(weights, arrays.values(), strict=True):
                    group[weight] = array
            for number, part in enumerate(np.array_split(np.array(layers), -(-len(layers) // 400))):
                root.attrs["layer_names" if len(layers) <= 400 else f"layer_names{number}"] = part


def _path(variable: Any) -> str:
    return re.sub(r"^sequential(_\d+)?/", "", variable.path)
