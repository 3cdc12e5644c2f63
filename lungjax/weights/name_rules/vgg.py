"""VGG-16 and VGG-19: Keras's Oxford weights (BGR), and torchvision's weights, under its own or timm's names."""

import numpy as np

from lungjax.weights.convert import Rule, Rules

KERAS = (
    (r"block(\d)_conv(\d)", r"stage\1_block\2/conv"), (r"fc([12])", r"head/hidden\1"), ("predictions", "head/dense")
)  # fmt: skip
TORCHVISION = ((r"classifier\.0", "head/hidden1"), (r"classifier\.3", "head/hidden2"), (r"classifier\.6", "head/dense"))
TIMM = ((r"pre_logits\.fc([12])", r"head/hidden\1"), (r"head\.fc", "head/dense"))


def _features(repeats: tuple[int, ...]) -> tuple[Rule, ...]:
    """Returns the rules for torchvision, which numbers convolutions, activations and pools consecutively."""
    rules, index = [], 0
    for stage, count in enumerate(repeats, 1):
        for block in range(1, count + 1):
            rules.append((rf"features\.{index}", f"stage{stage}_block{block}/conv"))
            index += 2  # an activation follows
        index += 1  # the pool
    return tuple(rules)


def _flatten_hwc(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the first dense kernel, [O, 512 * 7 * 7] or [O, 512, 7, 7], for a map that is flattened as h, w, c."""
    return array.reshape(len(array), 512, 7, 7).transpose(2, 3, 1, 0).reshape(-1, len(array))


# The first kernel in the file is for BGR images.
RULES = {"keras": Rules(KERAS, special=((r"^stage1_block1/conv/kernel$", lambda array, shape: array[:, :, ::-1]),))}
for _name, _repeats in {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}.items():
    for _layout, _head in {"torchvision": TORCHVISION, "timm": TIMM}.items():
        RULES[f"{_layout}_{_name}"] = Rules(
            (*_features(_repeats), *_head), special=((r"^head/hidden1/kernel$", _flatten_hwc),), torch=True
        )
