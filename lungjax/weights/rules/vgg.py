"""VGG-16 and VGG-19: Keras's Oxford weights (BGR) and torchvision's own, the latter also as timm writes them."""

import re
from collections.abc import Callable

import numpy as np

from lungjax.weights.convert import Replacement, Rules

REPEATS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


def _feature(name: str) -> Callable[[re.Match[str]], str]:
    """Torch numbers convolutions, activations and pools alike, so a number is not the same layer at both depths."""
    places, index = {}, 0
    for stage, repeats in enumerate(REPEATS[name], 1):
        for i in range(1, repeats + 1):
            places[index] = f"stage{stage}_block{i}/conv"
            index += 2  # its activation follows
        index += 1  # the pool
    return lambda match: places.get(int(match[1]), match[0])


def flat(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Turns the first dense kernel [O, 512 * 7 * 7] or [O, 512, 7, 7] into ours, whose map is flattened as h, w, c."""
    return array.reshape(len(array), 512, 7, 7).transpose(2, 3, 1, 0).reshape(-1, len(array))


def _torch(name: str, head: tuple[tuple[str, str], ...]) -> Rules:
    layers: tuple[tuple[str, Replacement], ...] = ((r"features\.(\d+)", _feature(name)), *head)
    return Rules(layers, special=((r"^head/hidden1/kernel$", flat),), torch=True)


TORCHVISION = ((r"classifier\.0", "head/hidden1"), (r"classifier\.3", "head/hidden2"), (r"classifier\.6", "head/dense"))
TIMM = ((r"pre_logits\.fc([12])", r"head/hidden\1"), (r"head\.fc", "head/dense"))
RULES = {
    "keras": Rules(
        layers=(
            (r"block(\d)_conv(\d)", r"stage\1_block\2/conv"),
            (r"fc([12])", r"head/hidden\1"),
            ("predictions", "head/dense"),
        ),
        # The file's network takes BGR, ours RGB.
        special=((r"^stage1_block1/conv/kernel$", lambda array, shape: array[:, :, ::-1]),),
    ),
    "torchvision_vgg16": _torch("vgg16", TORCHVISION),
    "torchvision_vgg19": _torch("vgg19", TORCHVISION),
    "timm_vgg16": _torch("vgg16", TIMM),
    "timm_vgg19": _torch("vgg19", TIMM),
}
