"""MobileNetV3: files of Keras (the released ones' names and today's), timm and torchvision.

Names number the blocks or the stages through, so each layout has a table for each size.
"""

import re

from lungjax.weights.convert import Rules
from lungjax.weights.rules.efficientnet import TIMM_BLOCK, TIMM_FIRST, TIMM_TOP
from lungjax.weights.rules.mobilenet import depthwise, unit
from lungjax.weights.rules.mobilenetv2 import CONVS, KINDS, NORMS

REPEATS = {"mobilenetv3_small": (1, 2, 3, 2, 3), "mobilenetv3_large": (1, 2, 3, 4, 2, 3)}


def _keras(name: str) -> Rules:
    block, norm = r"(?i)expanded_conv(?:_(\d+))?[/_]", "[/_](?:batchnorm|bn)"  # released: slashes and BatchNorm

    def at(match: re.Match[str]) -> str:
        return unit(int(match[1] or 0), REPEATS[name])

    tail = (("(?i)conv", "stem_conv"), (f"(?i)conv{norm}", "stem_bn"), ("(?i)conv_1", "top_conv"))
    head = ((f"(?i)conv_1{norm}", "top_bn"), ("(?i)conv_2", "head/hidden1"), ("(?i)logits", "head/dense"))
    blocks = (
        (block + KINDS, lambda match: f"{at(match)}/{CONVS[match[2]]}"),
        (block + KINDS + norm, lambda match: f"{at(match)}/{NORMS[match[2]]}"),
        (block + "squeeze_excite[/_]conv", lambda match: f"{at(match)}/se/reduce"),
        (block + "squeeze_excite[/_]conv_1", lambda match: f"{at(match)}/se/expand"),
    )
    return Rules((*tail, *head, *blocks), special=((r"/dwconv/kernel$", depthwise),))


def _torchvision(name: str) -> Rules:
    def place(match: re.Match[str]) -> str:
        """A block is a sequence: expand (not in the first), depthwise, squeeze-excite (not in all), project."""
        block, step = int(match[1]) - 1, match[2]
        kind = {"0": "expand", "1": "depthwise"} if block else {"0": "depthwise"}
        names = CONVS if match[3] == "0" else NORMS
        return f"{unit(block, REPEATS[name])}/{names[kind.get(step, 'project')]}"

    def squeeze(match: re.Match[str]) -> str:
        return f"{unit(int(match[1]) - 1, REPEATS[name])}/se/{'reduce' if match[2] == '1' else 'expand'}"

    blocks = ((r"features\.(\d+)\.block\.\d\.fc([12])", squeeze), (r"features\.(\d+)\.block\.(\d)\.([01])", place))
    stem = ((r"features\.0\.0", "stem_conv"), (r"features\.0\.1", "stem_bn"))
    top = ((r"features\.\d+\.0", "top_conv"), (r"features\.\d+\.1", "top_bn"))
    return Rules(
        (*blocks, *stem, *top, (r"classifier\.0", "head/hidden1"), (r"classifier\.3", "head/dense")), torch=True
    )


def _timm(name: str) -> Rules:
    last = rf"blocks\.{len(REPEATS[name])}\.0\."  # the last 1x1 convolution counts as a stage
    top = ((last + "conv", "top_conv"), (last + "bn1", "top_bn"), ("conv_head", "head/hidden1"))
    return Rules((*top, *TIMM_TOP, *TIMM_FIRST, *TIMM_BLOCK), torch=True)


MAKERS = {"keras": _keras, "torchvision": _torchvision, "timm": _timm}
RULES = {f"{layout}_{name}": make(name) for layout, make in MAKERS.items() for name in REPEATS}
