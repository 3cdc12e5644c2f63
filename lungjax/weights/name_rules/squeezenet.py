"""SqueezeNet 1.1: torchvision's file. The numbering of its modules includes the pools between the stages."""

from lungjax.weights.convert import Rules

_UNITS = {3: "stage1_block1", 4: "stage1_block2", 6: "stage2_block1", 7: "stage2_block2"}
_UNITS |= {number: f"stage3_block{number - 8}" for number in range(9, 13)}
_FIRE = tuple((rf"features\.{number}\.(squeeze|expand.x.)", rf"{unit}/\1") for number, unit in _UNITS.items())
LAYERS = ((r"features\.0", "stem_conv"), (r"classifier\.1", "head/dense"), *_FIRE)
RULES = {"torchvision": Rules(LAYERS, torch=True)}
