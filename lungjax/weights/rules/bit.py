"""BiT: the released npz files, and timm's names."""

import re

from lungjax.weights.convert import Rules

# The norm that stands beside a convolution in a file is the one before it.
NORMS = {"a": "preact_norm", "b": "norm1", "c": "norm2", "1": "preact_norm", "2": "norm1", "3": "norm2"}
CONVS = {"a": "conv1", "b": "conv2", "c": "conv3"}
SCOPE = r"(?:_\d+)?"  # some files number their scopes: standardized_conv2d_17


def _unit(match: re.Match[str]) -> str:
    stage, unit, letter, kind = match.groups()
    return f"stage{stage}_block{int(unit)}/{NORMS[letter] if kind == 'group_norm' else CONVS[letter]}"


def _projection(match: re.Match[str]) -> str:
    return f"stage{match[1]}_block{int(match[2])}/shortcut_conv"


def _timm(match: re.Match[str]) -> str:
    stage, block, name = match.groups()
    if name == "downsample.conv":
        name = "shortcut_conv"
    elif name.startswith("norm"):
        name = NORMS[name[-1]]
    return f"stage{int(stage) + 1}_block{int(block) + 1}/{name}"


RULES = {
    "bit": Rules(
        layers=(
            (rf"resnet/root_block/standardized_conv2d{SCOPE}", "stem_conv"),
            (rf"resnet/block([1-4])/unit(\d+)/([abc])/(group_norm|standardized_conv2d){SCOPE}", _unit),
            (rf"resnet/block([1-4])/unit(\d+)/a/proj/standardized_conv2d{SCOPE}", _projection),
            (rf"resnet/group_norm{SCOPE}", "top_norm"),
            (rf"resnet/head/conv2d{SCOPE}", "head/dense"),
        ),
    ),
    "timm": Rules(
        layers=(
            (r"stem\.conv", "stem_conv"),
            (r"stages\.([0-3])\.blocks\.(\d+)\.(norm[1-3]|conv[1-3]|downsample\.conv)", _timm),
            ("norm", "top_norm"),
            (r"head\.fc", "head/dense"),
        ),
        torch=True,
    ),
}
