"""MobileNetV3: files from Keras (released and new names), timm and torchvision; one table per layout and size."""

from lungjax.weights.convert import Rules, numbered_blocks
from lungjax.weights.name_rules import efficientnet
from lungjax.weights.name_rules.mobilenetv2 import CONVS, NORMS

KERAS_RELEASED = {"/squeeze_excite/Conv": "se/reduce", "/squeeze_excite/Conv_1": "se/expand"}
KERAS_RELEASED |= {f"/{layer}": path for layer, path in CONVS.items()}
KERAS_RELEASED |= {f"/{layer}/BatchNorm": path for layer, path in NORMS.items()}
KERAS_NEW = {name.replace("BatchNorm", "bn").replace("/", "_").lower(): path for name, path in KERAS_RELEASED.items()}
# torchvision's blocks are sequences that may lack the squeeze-excitation.
FIRST = efficientnet.TORCHVISION_FIRST | {"1.0": "project_conv", "1.1": "project_bn"}
BLOCK = efficientnet.TORCHVISION_LAYERS | {"2.0": "project_conv", "2.1": "project_bn"}
RULES: dict[str, Rules] = {}
for _name, _repeats in {"mobilenetv3_small": (1, 2, 3, 2, 3), "mobilenetv3_large": (1, 2, 3, 4, 2, 3)}.items():
    _keras = (
        ("(?i)conv", "stem_conv"), ("(?i)conv[/_](batchnorm|bn)", "stem_bn"),
        numbered_blocks(r"expanded_conv(?:_(\d+))?", KERAS_RELEASED | KERAS_NEW, _repeats),
        ("(?i)conv_1", "top_conv"), ("(?i)conv_1[/_](batchnorm|bn)", "top_bn"),
        ("(?i)conv_2", "head/hidden1"), ("(?i)logits", "head/dense"),
    )  # fmt: skip
    _last = rf"blocks\.{len(_repeats)}\.0\."  # the last 1x1 convolution counts as a stage
    _timm = (
        (_last + "conv", "top_conv"), (_last + "bn1", "top_bn"), ("conv_head", "head/hidden1"),
        *efficientnet.TIMM_TOP, efficientnet.TIMM_FIRST, efficientnet.TIMM_BLOCK,
    )  # fmt: skip
    _torchvision = (
        numbered_blocks(r"features\.(1)\.block\.", FIRST, _repeats, first=1),
        numbered_blocks(r"features\.(\d+)\.block\.", BLOCK, _repeats, first=1),
        (r"features\.0\.0", "stem_conv"), (r"features\.0\.1", "stem_bn"), (r"features\.\d+\.0", "top_conv"),
        (r"features\.\d+\.1", "top_bn"), (r"classifier\.0", "head/hidden1"), (r"classifier\.3", "head/dense"),
    )  # fmt: skip
    RULES |= {
        f"keras_{_name}": Rules(_keras),
        f"timm_{_name}": Rules(_timm, torch=True),
        f"torchvision_{_name}": Rules(_torchvision, torch=True),
    }
