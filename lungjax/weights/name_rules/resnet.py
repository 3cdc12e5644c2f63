"""ResNet: Keras v1 files, Keras V2 files, the names that torchvision, timm and torchxrayvision share, RadImageNet."""

from lungjax.weights.convert import Rules, blocks

LAYERS = {f"{kind}{number}": f"{kind}{number}" for kind in ("conv", "bn") for number in (1, 2, 3)}
KERAS_LAYERS = {f"{path[-1]}_{path[:-1]}": path for path in LAYERS}
KERAS_LAYERS |= {"0_conv": "shortcut_conv", "0_bn": "shortcut_bn", "preact_bn": "preact_bn"}
TORCH_LAYERS = LAYERS | {"downsample.0": "shortcut_conv", "downsample.1": "shortcut_bn"}
KERAS = (
    ("conv1_conv", "stem_conv"), ("conv1_bn", "stem_bn"), blocks(r"conv([2-5])_block(\d+)_", KERAS_LAYERS, stage=-1),
    ("post_bn", "top_bn"),  # of V2
    ("probs|predictions|fc1000", "head/dense"),  # renamed between releases
)  # fmt: skip
TORCH = Rules(
    (
        ("conv1", "stem_conv"), ("bn1", "stem_bn"), blocks(r"layer([1-4])\.(\d+)\.", TORCH_LAYERS, block=1),
        ("fc", "head/dense"),
    ),
    torch=True,
)  # fmt: skip
RADIMAGENET = Rules(  # the children of torchvision's network by number
    (
        (r"backbone\.0", "stem_conv"), (r"backbone\.1", "stem_bn"),
        blocks(r"backbone\.([4-7])\.(\d+)\.", TORCH_LAYERS, stage=-3, block=1),
    ),
    torch=True,
)  # fmt: skip
RULES = {
    # The first kernel in the file is for BGR images.
    "keras": Rules(KERAS, special=((r"^stem_conv/kernel$", lambda array, shape: array[:, :, ::-1]),)),
    "keras_v2": Rules(KERAS),
    "torchvision": TORCH,
    "timm": TORCH,
    "radimagenet": RADIMAGENET,
}
