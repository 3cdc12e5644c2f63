"""The small networks of the studies in Keras, following the studies' code, with our layer names."""

from typing import Any

import numpy as np

NAMES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}  # of Keras, and ours
CBR = {  # kernel, widths, max pool after the last block
    "cbr_larget": (7, (32, 64, 128, 256, 512), False),
    "cbr_largew": (7, (64, 128, 256, 512), True),
    "cbr_small": (7, (32, 64, 128, 256), True),
    "cbr_tiny": (5, (64, 128, 256, 512), True),
    "cbr_larget_study": (5, (64, 128, 256, 512), True),
}


def build(name: str, side: int, channels: int = 3, outputs: int = 1000) -> Any:
    """Returns a Keras model with `outputs` logits for images [side, side, channels]."""
    from keras import Input, Sequential, layers

    stack = [Input((side, side, channels))]
    if name == "xray_cnn":
        for at, width in (("stem", 64), ("stage2", 32)):
            stack += [layers.Conv2D(width, (3, 3), strides=3, activation="relu", name=f"{at}_conv"),
                      layers.MaxPooling2D(2, 2)]  # fmt: skip
        stack += [layers.Flatten(), layers.Dense(256, activation="relu", name="head.hidden1")]
    elif name == "simple":
        for number, width in enumerate((16, 32, 64), 1):
            at = "stem" if number == 1 else f"stage{number}"
            stack += [layers.Conv2D(width, 3, activation="relu", name=f"{at}_conv"), layers.MaxPooling2D()]
        stack += [layers.GlobalMaxPooling2D(), layers.Dense(32, activation="relu", name="head.hidden1")]
    else:
        kernel, widths, last_pool = CBR[name]
        for number, width in enumerate(widths, 1):
            at = "stem" if number == 1 else f"stage{number}"
            stack += [layers.Conv2D(width, kernel, name=f"{at}_conv"), layers.BatchNormalization(name=f"{at}_bn"),
                      layers.ReLU()]  # fmt: skip
            if number < len(widths) or last_pool:
                stack.append(layers.MaxPooling2D(3, 2))
        stack.append(layers.GlobalAveragePooling2D())
    return Sequential([*stack, layers.Dense(outputs, name="head.dense")])


def arrays(model: Any) -> dict[str, np.ndarray]:
    """Returns copies of the arrays of such a model by our paths: head.dense/kernel becomes head/dense/kernel."""
    paths = [variable.path.split("/")[-2:] for variable in model.weights]
    names = [f"{layer.replace('.', '/')}/{NAMES.get(leaf, leaf)}" for layer, leaf in paths]
    return {name: np.array(variable.value) for name, variable in zip(names, model.weights, strict=True)}
