"""MobileNet V1: files of Keras and timm."""

import numpy as np

from lungjax.weights.convert import Rules
from lungjax.weights.rules.efficientnet import B, at

REPEATS = (1, 2, 2, 6, 2)


def unit(number: int, repeats: tuple[int, ...]) -> str:
    """Returns the name of block `number`, counted from 0 through all stages; past the last one, a name of none."""
    for stage, count in enumerate(repeats, 1):
        if number < count:
            return f"stage{stage}_block{number + 1}"
        number -= count
    return "past_the_last"


def depthwise(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Turns Keras's depthwise kernel [k, k, C, 1] into ours; Keras 3 calls the leaf just `kernel`."""
    return array.swapaxes(2, 3)


RULES = {
    "keras": Rules(
        layers=(
            ("conv1", "stem_conv"),
            ("conv1_bn", "stem_bn"),
            (r"conv_dw_(\d+)", lambda match: f"{unit(int(match[1]) - 1, REPEATS)}/dwconv"),
            (r"conv_dw_(\d+)_bn", lambda match: f"{unit(int(match[1]) - 1, REPEATS)}/dwconv_bn"),
            (r"conv_pw_(\d+)", lambda match: f"{unit(int(match[1]) - 1, REPEATS)}/conv"),
            (r"conv_pw_(\d+)_bn", lambda match: f"{unit(int(match[1]) - 1, REPEATS)}/bn"),
            ("conv_preds", "head/dense"),
        ),
        special=((r"/dwconv/kernel$", depthwise),),
    ),
    "timm": Rules(
        layers=(
            ("conv_stem", "stem_conv"),
            ("bn1", "stem_bn"),
            (B + "conv_dw", at("dwconv")),
            (B + "bn1", at("dwconv_bn")),
            (B + "conv_pw", at("conv")),
            (B + "bn2", at("bn")),
            ("classifier", "head/dense"),
        ),
        torch=True,
    ),
}
