"""Tensor names in the released files from Keras (keras-applications, 2017 to 2021) and BiT."""

import re


def released(network: str, layer: str, weights: dict[str, tuple[int, ...]]) -> tuple[str, list[str]]:
    """Returns the names of a layer and its weights in the released file; `weights` are Keras 3 names with shapes."""
    new = _layer(network, layer)
    names = []
    for weight, shape in weights.items():
        *inner, leaf = weight.removesuffix(":0").split("/")
        if network.startswith("VGG"):
            names.append(f"{new}_{'W' if leaf == 'kernel' else 'b'}_1:0")
        elif leaf.startswith("variable"):
            names.append("Variable:0")
        elif len(inner) > 1:  # of a Sequential
            names.append(f"{inner[-1]}/{leaf}:0")
        elif leaf == "kernel" and len(shape) == 4 and shape[3] == 1:
            names.append(f"{new}/depthwise_kernel:0")
        else:
            names.append(f"{new}/{leaf}:0")
    return new, names


def _layer(network: str, layer: str) -> str:
    if network == "MobileNetV2":
        return _mobilenet_v2(layer)
    if network.startswith("MobileNetV3"):
        return _mobilenet_v3(layer)
    if network.startswith("DenseNet"):
        return {"conv1_conv": "conv1/conv", "conv1_bn": "conv1/bn", "predictions": "fc1000"}.get(layer, layer)
    if network.startswith(("ResNet", "EfficientNetB")):
        return {"predictions": "probs"}.get(layer, layer)
    if network.startswith("EfficientNetV2"):
        return re.sub("_dwconv$", "_dwconv2", layer)
    return layer


def _mobilenet_v2(layer: str) -> str:
    if layer == "predictions":
        return "Logits"
    match = re.fullmatch(r"(expanded_conv|block_(\d+))_(expand|depthwise|project)(_BN)?", layer)
    if not match:
        return layer
    number, part = int(match[2] or 0), match[3]
    if match[4]:
        return f"bn{number}_conv_{number}_bn_{part}"
    return f"mobl{number}_conv_{number}_{part}"


def _mobilenet_v3(layer: str) -> str:
    fixed = {"conv": "Conv", "conv_bn": "Conv/BatchNorm", "conv_1": "Conv_1", "conv_1_bn": "Conv_1/BatchNorm",
             "conv_2": "Conv_2", "logits": "Logits"}  # fmt: skip
    if layer in fixed:
        return fixed[layer]
    match = re.fullmatch(r"(expanded_conv(?:_\d+)?)_(.+)", layer)
    if not match:
        return layer
    part = match[2].replace("squeeze_excite_conv_1", "squeeze_excite/Conv_1")
    part = re.sub("squeeze_excite_conv$", "squeeze_excite/Conv", part)
    return f"{match[1]}/{re.sub('_bn$', '/BatchNorm', part)}"


def bit_name(name: str) -> str:
    """Returns the name in Google's BiT files of the tensor that timm calls `name`."""
    *place, leaf = name.split(".")
    match place:
        case ["stem", "conv"]:
            layer = "root_block/standardized_conv2d"
        case ["norm"]:
            layer = "group_norm"
        case ["head", "fc"]:
            layer = "head/conv2d"
        case ["stages", stage, "blocks", block, *part]:
            unit, branch = f"block{int(stage) + 1}/unit{int(block) + 1:02}", part[0]
            if branch == "downsample":
                layer = f"{unit}/a/proj/standardized_conv2d"
            else:
                kind = "group_norm" if branch.startswith("norm") else "standardized_conv2d"
                layer = f"{unit}/{'abc'[int(branch[-1]) - 1]}/{kind}"
    leaves = {"weight": "gamma", "bias": "beta"} if layer.endswith("group_norm") else {"weight": "kernel"}
    return f"resnet/{layer}/{leaves.get(leaf, leaf)}"
