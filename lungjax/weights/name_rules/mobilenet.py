"""MobileNet V1: files from Keras and timm."""

from lungjax.weights.convert import Rules, blocks, numbered_blocks

REPEATS = (1, 2, 2, 6, 2)
TIMM_UNITS = {"conv_dw": "dwconv", "bn1": "dwconv_bn", "conv_pw": "conv", "bn2": "bn"}
KERAS = (
    ("conv1", "stem_conv"), ("conv1_bn", "stem_bn"), ("conv_preds", "head/dense"),
    numbered_blocks(r"conv_dw_(\d+)", {"": "dwconv", "_bn": "dwconv_bn"}, REPEATS, first=1),
    numbered_blocks(r"conv_pw_(\d+)", {"": "conv", "_bn": "bn"}, REPEATS, first=1),
)  # fmt: skip
TIMM = (
    ("conv_stem", "stem_conv"), ("bn1", "stem_bn"), ("classifier", "head/dense"),
    blocks(r"blocks\.(\d+)\.(\d+)\.", TIMM_UNITS, stage=1, block=1),
)  # fmt: skip
RULES = {"keras": Rules(KERAS), "timm": Rules(TIMM, torch=True)}
