"""DenseNet: files from Keras and torchvision; timm and torchxrayvision have torchvision's tensor names."""

from lungjax.weights.convert import Rules, blocks

KERAS_UNITS = {"0_bn": "bn1", "1_conv": "conv1", "1_bn": "bn2", "2_conv": "conv2"}
TORCH_UNITS = {
    "norm1": "bn1", "norm2": "bn2", "conv1": "conv1", "conv2": "conv2",
    "norm.1": "bn1", "norm.2": "bn2", "conv.1": "conv1", "conv.2": "conv2",  # files from before 2019
}  # fmt: skip
KERAS_LAYERS = (
    (r"conv1[/_](conv|bn)", r"stem_\1"),  # with a slash in the released files
    blocks(r"conv(\d)_block(\d+)_", KERAS_UNITS, stage=-1),  # Keras counts the stem as stage 1
    # Named after the stage that follows.
    (r"pool(\d)_(bn|conv)", lambda match: f"stage{int(match[1]) - 1}_transition/{match[2]}"),
    ("bn", "top_bn"),
    ("fc1000|predictions", "head/dense"),  # fc1000 in the released files
)
TORCH_LAYERS = (
    (r"features\.conv0", "stem_conv"), (r"features\.norm0", "stem_bn"), (r"features\.norm5", "top_bn"),
    blocks(r"features\.denseblock(\d)\.denselayer(\d+)\.", TORCH_UNITS),
    (r"features\.transition(\d)\.norm", r"stage\1_transition/bn"),
    (r"features\.transition(\d)\.conv", r"stage\1_transition/conv"), ("classifier", "head/dense"),
)  # fmt: skip
RULES = {
    "keras": Rules(KERAS_LAYERS),
    # The first kernel in the file is for BGR images.
    "keras_bgr": Rules(KERAS_LAYERS, special=((r"^stem_conv/kernel$", lambda array, shape: array[:, :, ::-1]),)),
    "torchvision": Rules(TORCH_LAYERS, torch=True),
    "radimagenet": Rules(
        tuple((pattern.replace("features", r"backbone\.0"), path) for pattern, path in TORCH_LAYERS), torch=True
    ),
}
