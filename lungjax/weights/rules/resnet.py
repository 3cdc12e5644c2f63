"""ResNet: Keras v1 files, Keras V2 files, and the names that torchvision and timm share."""

import re

import numpy as np

from lungjax.weights.convert import Rules


def _keras_layer(match: re.Match[str]) -> str:
    """Turns conv2_block1_3_bn into stage1_block1/bn3; number 0 is the shortcut's."""
    stage, block, number, kind = match.groups()
    name = f"shortcut_{kind}" if number == "0" else f"{kind}{number}"
    return f"stage{int(stage) - 1}_block{block}/{name}"


def _keras_preact(match: re.Match[str]) -> str:
    return f"stage{int(match[1]) - 1}_block{match[2]}/preact_bn"


def _torch_layer(match: re.Match[str]) -> str:
    stage, block, name = match.groups()
    name = {"downsample.0": "shortcut_conv", "downsample.1": "shortcut_bn"}.get(name, name)
    return f"stage{stage}_block{int(block) + 1}/{name}"


def _rgb(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Turns a kernel for BGR images into one for RGB."""
    return array[:, :, ::-1]


BLOCKS = (r"conv([2-5])_block(\d+)_([0-3])_(conv|bn)", _keras_layer)
HEAD = (r"probs|predictions|fc1000", "head/dense")  # its name changed between releases

TORCH = Rules(
    layers=(
        ("conv1", "stem_conv"),
        ("bn1", "stem_bn"),
        (r"layer([1-4])\.(\d+)\.(conv[1-3]|bn[1-3]|downsample\.[01])", _torch_layer),
        ("fc", "head/dense"),
    ),
    torch=True,
)
RULES = {
    "keras": Rules(
        layers=(("conv1_conv", "stem_conv"), ("conv1_bn", "stem_bn"), BLOCKS, HEAD),
        special=((r"^stem_conv/kernel$", _rgb),),
    ),
    "keras_v2": Rules(
        layers=(
            ("conv1_conv", "stem_conv"),
            (r"conv([2-5])_block(\d+)_preact_bn", _keras_preact),
            BLOCKS,
            ("post_bn", "top_bn"),
            HEAD,
        ),
    ),
    "torchvision": TORCH,
    "timm": TORCH,
}
