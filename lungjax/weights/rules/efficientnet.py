"""EfficientNet and its Lite versions: files of Keras, timm, torchvision and EfficientNet-PyTorch (lukemelas)."""

import re
from collections.abc import Callable
from itertools import accumulate

from lungjax.weights.convert import Rules


def letters(match: re.Match[str]) -> str:
    """Keras's "block3b_expand_conv" is stage3_block2/expand_conv."""
    stage, block, layer = match.groups()
    return f"stage{stage}_block{ord(block) - ord('a') + 1}/{layer.replace('se_', 'se/').replace('dwconv2', 'dwconv')}"


def at(layer: str, first: int = 0) -> Callable[[re.Match[str]], str]:
    """Returns the replacement for a name whose groups are the stage, counted from `first`, and the block, from 0."""
    return lambda match: f"stage{int(match[1]) - first + 1}_block{int(match[2]) + 1}/{layer}"


def lukemelas(repeats: tuple[int, ...]) -> Rules:
    """Blocks are counted through, so how many a stage has must be known."""
    ends = list(accumulate(repeats))
    layers = {
        "_expand_conv": "expand_conv", "_bn0": "expand_bn", "_depthwise_conv": "dwconv", "_bn1": "bn",
        "_project_conv": "project_conv", "_bn2": "project_bn",
    }  # fmt: skip

    def place(match: re.Match[str]) -> str:
        number, layer = int(match[1]), match[2]
        stage = next(i for i, end in enumerate(ends) if number < end)
        return f"stage{stage + 1}_block{number - ends[stage] + repeats[stage] + 1}/{layers[layer]}"

    top = (("_conv_stem", "stem_conv"), ("_bn0", "stem_bn"), ("_conv_head", "top_conv"), ("_bn1", "top_bn"))
    return Rules(((rf"_blocks\.(\d+)\.({'|'.join(layers)})", place), *top, ("_fc", "head/dense")), torch=True)


KERAS = Rules(
    ((r"(stem|top)_(conv|bn)", r"\1_\2"), (r"block(\d)([a-z])_(.+)", letters), (r"probs|predictions", "head/dense")),
    ignore=(r"normalization(_\d+)?/.*",),  # mean and variance of ImageNet: our InputSpec has them
)
# In the first stage of V1 nothing expands, so "bn1" follows the depthwise convolution there.
B = r"blocks\.(\d+)\.(\d+)\."
FIRST = r"blocks\.(0)\.(\d+)\."
TIMM_TOP = (
    ("conv_stem", "stem_conv"), ("bn1", "stem_bn"), ("conv_head", "top_conv"), ("bn2", "top_bn"),
    ("classifier", "head/dense"),
)  # fmt: skip
TIMM_BLOCK = (
    (B + "conv_pw", at("expand_conv")), (B + "bn1", at("expand_bn")), (B + "conv_dw", at("dwconv")),
    (B + "bn2", at("bn")), (B + r"se\.conv_reduce", at("se/reduce")), (B + r"se\.conv_expand", at("se/expand")),
    (B + "conv_pwl", at("project_conv")), (B + "bn3", at("project_bn")),
)  # fmt: skip
TIMM_FIRST = (
    (FIRST + "bn1", at("bn")), (FIRST + "conv_pw", at("project_conv")), (FIRST + "bn2", at("project_bn")),
)  # fmt: skip
F = r"features\.(\d)\.(\d+)\.block\."
ONE = r"features\.(1)\.(\d+)\.block\."
TORCHVISION_TOP = (
    (r"features\.0\.0", "stem_conv"), (r"features\.0\.1", "stem_bn"), (r"features\.[78]\.0", "top_conv"),
    (r"features\.[78]\.1", "top_bn"), (r"classifier\.1", "head/dense"),
)  # fmt: skip
TORCHVISION_BLOCK = (
    (F + r"0\.0", at("expand_conv", 1)), (F + r"0\.1", at("expand_bn", 1)), (F + r"1\.0", at("dwconv", 1)),
    (F + r"1\.1", at("bn", 1)), (F + r"2\.fc1", at("se/reduce", 1)), (F + r"2\.fc2", at("se/expand", 1)),
    (F + r"3\.0", at("project_conv", 1)), (F + r"3\.1", at("project_bn", 1)),
)  # fmt: skip
TORCHVISION_FIRST = (
    (ONE + r"0\.0", at("dwconv", 1)), (ONE + r"0\.1", at("bn", 1)), (ONE + r"1\.fc1", at("se/reduce", 1)),
    (ONE + r"1\.fc2", at("se/expand", 1)), (ONE + r"2\.0", at("project_conv", 1)), (ONE + r"2\.1", at("project_bn", 1)),
)  # fmt: skip
RULES = {
    "keras": KERAS,
    "timm": Rules((*TIMM_TOP, *TIMM_FIRST, *TIMM_BLOCK), torch=True),
    "torchvision": Rules((*TORCHVISION_TOP, *TORCHVISION_FIRST, *TORCHVISION_BLOCK), torch=True),
    "lukemelas_lite0": lukemelas((1, 2, 2, 3, 3, 4, 1)),
    "lukemelas_lite1": lukemelas((1, 3, 3, 4, 4, 5, 1)),
    "lukemelas_lite2": lukemelas((1, 3, 3, 4, 4, 5, 1)),
}
