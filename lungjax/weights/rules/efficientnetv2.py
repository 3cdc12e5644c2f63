"""EfficientNetV2: files of Keras, timm and torchvision. Stages 1 to 3 are of fused blocks in every variant."""

from lungjax.weights.convert import Rules
from lungjax.weights.rules.efficientnet import KERAS, TIMM_BLOCK, TIMM_TOP, TORCHVISION_BLOCK, TORCHVISION_TOP, at

FIRST, FUSED = r"blocks\.(0)\.(\d+)\.", r"blocks\.([12])\.(\d+)\."
TIMM_FUSED = (
    (FIRST + "conv", at("project_conv")), (FIRST + "bn1", at("project_bn")),
    (FUSED + "conv_exp", at("expand_conv")), (FUSED + "bn1", at("expand_bn")),
    (FUSED + "conv_pwl", at("project_conv")), (FUSED + "bn2", at("project_bn")),
)  # fmt: skip
ONE, TWO = r"features\.(1)\.(\d+)\.block\.", r"features\.([23])\.(\d+)\.block\."
TORCHVISION_FUSED = (
    (ONE + r"0\.0", at("project_conv", 1)), (ONE + r"0\.1", at("project_bn", 1)),
    (TWO + r"0\.0", at("expand_conv", 1)), (TWO + r"0\.1", at("expand_bn", 1)),
    (TWO + r"1\.0", at("project_conv", 1)), (TWO + r"1\.1", at("project_bn", 1)),
)  # fmt: skip
RULES = {
    "keras": KERAS,
    "timm": Rules((*TIMM_TOP, *TIMM_FUSED, *TIMM_BLOCK), torch=True),
    "torchvision": Rules((*TORCHVISION_TOP, *TORCHVISION_FUSED, *TORCHVISION_BLOCK), torch=True),
}
