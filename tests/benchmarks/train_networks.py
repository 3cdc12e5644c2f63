"""The networks of `train.py` in Keras and in torch, without weights.

Layers, classes, dropout and stochastic depth are those of lungjax's networks. Networks that a library lacks (Keras's
ResNet50V2 in torch, CBR in both) are defined here. Each library is imported on use.
"""

from functools import partial
from typing import Any

from tests.parity.studies import CBR, build

CLASSES = 3
KERAS = {
    "efficientnet_b0": "EfficientNetB0",
    "mobilenetv2": "MobileNetV2",
    "efficientnetv2_s": "EfficientNetV2S",
    "convnext_tiny": "ConvNeXtTiny",
    "resnet50v2": "ResNet50V2",
    "densenet121": "DenseNet121",
}
TIMM: dict[str, tuple[str, dict[str, float]]] = {
    "efficientnet_b0": ("tf_efficientnet_b0", {"drop_rate": 0.2, "drop_path_rate": 0.2}),
    "mobilenetv2": ("mobilenetv2_100", {}),
    "efficientnetv2_s": ("tf_efficientnetv2_s", {"drop_rate": 0.2, "drop_path_rate": 0.2}),
    "convnext_tiny": ("convnext_tiny", {}),
    "densenet121": ("densenet121", {}),
}


def channels(network: str) -> int:
    """Returns the number of image channels: the CBR networks are for gray images."""
    return 1 if network in CBR else 3


def keras_network(network: str, side: int) -> Any:
    """Returns the Keras model with three logits, from keras.applications if it is there."""
    import keras

    if network in KERAS:
        plain = {"include_preprocessing": False} if network in ("efficientnetv2_s", "convnext_tiny") else {}
        make = getattr(keras.applications, KERAS[network])
        return make(weights=None, input_shape=(side, side, 3), classes=CLASSES, classifier_activation=None, **plain)
    return build(network, side, channels=1, outputs=CLASSES)


def torch_network(network: str) -> Any:
    """Returns the torch module with three logits, from timm if it has the same layers."""
    import torch

    if network in TIMM:
        if torch.version.cuda is None:  # timm imports torchvision, whose operators a CPU-only torch may lack
            from tests.parity.references import import_torchvision

            import_torchvision(torch)
        import timm

        name, options = TIMM[network]
        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
    if network == "resnet50v2":
        return resnet50v2()
    kernel, widths, last_pool = CBR[network]
    stack: list[Any] = []
    for number, width in enumerate(widths, 1):
        stack += [torch.nn.Conv2d(widths[number - 2] if number > 1 else 1, width, kernel)]
        stack += [torch.nn.BatchNorm2d(width, eps=1e-3, momentum=0.01), torch.nn.ReLU(inplace=True)]
        if number < len(widths) or last_pool:
            stack.append(torch.nn.MaxPool2d(3, 2))
    ends = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(widths[-1], CLASSES)]
    return torch.nn.Sequential(*stack, *ends)


def resnet50v2() -> Any:
    """Returns Keras's ResNet50V2: timm's has its strides elsewhere and a sixth more arithmetic."""
    import torch
    from torch import nn

    norm = partial(nn.BatchNorm2d, eps=1.001e-5, momentum=0.01)

    class Block(nn.Module):
        def __init__(self, into: int, width: int, stride: int):
            super().__init__()
            self.preact = nn.Sequential(norm(into), nn.ReLU(inplace=True))
            self.grows = into != 4 * width
            self.shortcut = nn.Conv2d(into, 4 * width, 1, stride) if self.grows else nn.MaxPool2d(1, stride)
            self.branch = nn.Sequential(
                nn.Conv2d(into, width, 1, bias=False), norm(width), nn.ReLU(inplace=True),
                nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width), nn.ReLU(inplace=True),
                nn.Conv2d(width, 4 * width, 1),
            )  # fmt: skip

        def forward(self, x: Any) -> Any:
            y = self.preact(x)
            return self.shortcut(y if self.grows else x) + self.branch(y)

    layers: list[Any] = [nn.Conv2d(3, 64, 7, 2, 3), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)]
    into = 64
    for stage, repeats in enumerate((3, 4, 6, 3)):
        for i in range(1, repeats + 1):
            layers.append(Block(into, 64 * 2**stage, 2 if i == repeats and stage < 3 else 1))
            into = 256 * 2**stage
    ends = [norm(into), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, CLASSES)]
    return torch.nn.Sequential(*layers, *ends)
