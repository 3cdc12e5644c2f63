"""DenseNet: the files of Keras, and those of torchvision, whose names timm keeps."""

import re

from lungjax.weights.convert import Rules

KERAS_UNITS = {"0_bn": "bn1", "1_conv": "conv1", "1_bn": "bn2", "2_conv": "conv2"}


def _keras_unit(match: re.Match[str]) -> str:  # the stem is Keras's first stage, "conv1"
    return f"stage{int(match[1]) - 1}_block{match[2]}/{KERAS_UNITS[match[3]]}"


def _keras_transition(match: re.Match[str]) -> str:  # named after the stage that follows
    return f"stage{int(match[1]) - 1}_transition/{match[2]}"


def _torch_unit(match: re.Match[str]) -> str:
    return f"stage{match[1]}_block{match[2]}/{'bn' if match[3] == 'norm' else 'conv'}{match[4]}"


RULES = {
    "keras": Rules(
        layers=(
            (r"conv1[/_](conv|bn)", r"stem_\1"),  # with a slash in the released files
            (r"conv(\d)_block(\d+)_([012]_(?:bn|conv))", _keras_unit),
            (r"pool(\d)_(bn|conv)", _keras_transition),
            (r"bn", "top_bn"),
            (r"fc1000|predictions", "head/dense"),  # the released files have the first
        )
    ),
    "torchvision": Rules(
        layers=(
            (r"features\.conv0", "stem_conv"),
            (r"features\.norm0", "stem_bn"),
            # Files from before 2019 write "norm.1".
            (r"features\.denseblock(\d)\.denselayer(\d+)\.(norm|conv)\.?([12])", _torch_unit),
            (r"features\.transition(\d)\.norm", r"stage\1_transition/bn"),
            (r"features\.transition(\d)\.conv", r"stage\1_transition/conv"),
            (r"features\.norm5", "top_bn"),
            (r"classifier", "head/dense"),
        ),
        torch=True,
    ),
}
