"""BiT: the released npz files and timm's names."""

from lungjax.weights.convert import Rules, blocks

SCOPE = r"(?:_\d+)?"  # some files number their scopes: standardized_conv2d_17
# In the file a norm precedes the convolution of the same letter.
RELEASED = {
    "a/group_norm": "preact_norm", "b/group_norm": "norm1", "c/group_norm": "norm2",
    "a/standardized_conv2d": "conv1", "b/standardized_conv2d": "conv2", "c/standardized_conv2d": "conv3",
    "a/proj/standardized_conv2d": "shortcut_conv",
}  # fmt: skip
TIMM = {
    "norm1": "preact_norm", "norm2": "norm1", "norm3": "norm2", "conv1": "conv1", "conv2": "conv2", "conv3": "conv3",
    "downsample.conv": "shortcut_conv",
}  # fmt: skip
RELEASED_LAYERS = (
    (rf"resnet/root_block/standardized_conv2d{SCOPE}", "stem_conv"),
    blocks(r"resnet/block(\d)/unit(\d+)/", RELEASED, suffix=SCOPE),
    (rf"resnet/group_norm{SCOPE}", "top_norm"), (rf"resnet/head/conv2d{SCOPE}", "head/dense"),
)  # fmt: skip
TIMM_LAYERS = (
    (r"stem\.conv", "stem_conv"), blocks(r"stages\.(\d)\.blocks\.(\d+)\.", TIMM, stage=1, block=1),
    ("norm", "top_norm"), (r"head\.fc", "head/dense"),
)  # fmt: skip
RULES = {"bit": Rules(RELEASED_LAYERS), "timm": Rules(TIMM_LAYERS, torch=True)}
