"""A model with known answers, without a network."""

from dataclasses import replace

import numpy as np

from lungjax.config import InputSpec
from lungjax.config.metadata import Metadata
from lungjax.inference.model import Model


def brightness(**fields):
    """Returns a model whose probability of "bright" is the mean gray level."""

    def forward(pixels):
        assert len(pixels) in (1, 2, 4)
        p = pixels.mean((1, 2, 3), dtype=np.float64) / 255
        probabilities = np.stack([1 - p, p], axis=1).astype(np.float32)
        return {"probabilities": probabilities, "logits": np.log(probabilities + 1e-9), "features": p[:, None]}

    description = Metadata("mine", ("dark", "bright"), InputSpec(size=(8, 8)), "folder/mine")
    return Model(replace(description, **fields), "onnx", 4, (), forward)
