"""EfficientNetV2: files from Keras, timm and torchvision. Stages 1 to 3 have fused blocks in every variant."""

from lungjax.weights.convert import Rules, blocks
from lungjax.weights.name_rules.efficientnet import KERAS, TIMM_BLOCK, TIMM_TOP, TORCHVISION_BLOCK, TORCHVISION_TOP

TIMM_FUSED = {"conv_exp": "expand_conv", "bn1": "expand_bn", "conv_pwl": "project_conv", "bn2": "project_bn"}
TIMM = (
    *TIMM_TOP,
    blocks(r"blocks\.(0)\.(\d+)\.", {"conv": "project_conv", "bn1": "project_bn"}, stage=1, block=1),
    blocks(r"blocks\.([12])\.(\d+)\.", TIMM_FUSED, stage=1, block=1),
    TIMM_BLOCK,
)
TORCHVISION_FUSED = {"0.0": "expand_conv", "0.1": "expand_bn", "1.0": "project_conv", "1.1": "project_bn"}
TORCHVISION = (
    *TORCHVISION_TOP,
    blocks(r"features\.(1)\.(\d+)\.block\.", {"0.0": "project_conv", "0.1": "project_bn"}, block=1),
    blocks(r"features\.([23])\.(\d+)\.block\.", TORCHVISION_FUSED, block=1),
    TORCHVISION_BLOCK,
)
RULES = {"keras": KERAS, "timm": Rules(TIMM, torch=True), "torchvision": Rules(TORCHVISION, torch=True)}
