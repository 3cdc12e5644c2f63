"""The references that each network is compared with, and the image sizes used."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """A variant of a network and its reference implementation."""

    model: str  # ours
    library: str  # "keras", "timm", "torchvision" or "xrv" (torchxrayvision)
    name: str  # in the library
    layout: str  # of the written file
    size: int  # default input, pixels
    odd: int = 0  # second size, or 0 for networks with more than 60 million parameters
    gain: float = 1.0  # variance of random kernels times the number of their inputs
    double: bool = False  # also compared in float64
    train: bool = False  # also compared in training mode, with gradients
    tag: str = ""  # of the record, if the layout and library do not determine it
    channels: int = 3  # of the input

    @property
    def key(self) -> str:
        """The key of a row of the table."""
        return f"{self.model} {self.tag or self.library}:{self.name}"

    @property
    def headless(self) -> bool:
        """Whether the file has no classifier, so that pooled features are compared in place of logits."""
        return self.tag.startswith("radimagenet")


def _cases() -> list[Case]:
    b = enumerate((224, 240, 260, 300, 380, 456, 528, 600))
    lite = enumerate((224, 240, 260, 280, 300))
    v2 = {"b0": 224, "b1": 240, "b2": 260, "b3": 300, "s": 384, "m": 480, "l": 480, "xl": 512}
    v1_convnext, v2_convnext = ("tiny", "small", "base", "large", "xlarge"), ("atto", "femto", "pico", "nano", "tiny")
    return [
        *(Case(f"efficientnet_b{i}", "timm", f"tf_efficientnet_b{i}", "timm", n, 0 if i == 7 else 107) for i, n in b),
        *(Case(f"efficientnet_lite{i}", "timm", f"tf_efficientnet_lite{i}", "timm", n, 107) for i, n in lite),
        *(Case(f"efficientnetv2_{v}", "timm", f"tf_efficientnetv2_{v}", "timm", n, 0 if v in ("l", "xl") else 107)
          for v, n in v2.items()),
        # Trained in torch: symmetric padding, another epsilon.
        Case("efficientnet_b0", "torchvision", "efficientnet_b0", "torchvision", 224, 107),
        *(Case(f"resnet{d}", "torchvision", f"resnet{d}", "torchvision", 224, 107) for d in (18, 34)),
        *(Case(f"resnet{d}", "keras", f"ResNet{d}", "keras", 224, 0 if d == 152 else 107) for d in (50, 101, 152)),
        *(Case(f"resnet{d}_v15", "timm", f"resnet{d}", "timm", 224, 107) for d in (50, 101, 152)),
        *(Case(f"resnet{d}v2", "keras", f"ResNet{d}V2", "keras_v2", 224, 0 if d == 152 else 107)
          for d in (50, 101, 152)),
        *(Case(f"bit_r{unit}", "timm", f"resnetv2_{unit}_bit", "bit", 224, 107 if unit.endswith("x1") else 0)
          for unit in ("50x1", "101x1", "50x3", "101x3", "152x2", "152x4")),
        *(Case(f"convnext_{v}", "timm", f"convnext_{v}", "timm", 224, 107 if v in ("tiny", "small") else 0)
          for v in v1_convnext),
        *(Case(f"convnextv2_{v}", "timm", f"convnextv2_{v}", "timm", 224, 107 if v in v2_convnext else 0)
          for v in (*v2_convnext, "base", "large", "huge")),
        *(Case(f"densenet{d}", "torchvision", f"densenet{d}", "torchvision", 224, 107) for d in (121, 161, 169, 201)),
        *(Case(f"vgg{d}", "torchvision", f"vgg{d}", "torchvision", 224, gain=2.0) for d in (16, 19)),
        Case("squeezenet1_1", "torchvision", "squeezenet1_1", "torchvision", 224, 107, gain=2.0),
        Case("mobilenet", "keras", "MobileNet", "keras", 224, 107),
        Case("mobilenetv2", "keras", "MobileNetV2", "keras", 224, 107),
        *(Case(f"mobilenetv3_{v}", "timm", f"tf_mobilenetv3_{v}_100", "timm", 224, 107) for v in ("small", "large")),
        *(Case(name, "keras", name, "ours", 256, 129 if name != "cbr_larget" else 229)
          for name in ("cbr_larget", "cbr_largew", "cbr_small", "cbr_tiny", "cbr_larget_study")),
        Case("simple", "keras", "simple", "ours", 256, 107, gain=2.0),
        Case("xray_cnn", "keras", "xray_cnn", "ours", 256, gain=2.0),
        # The same networks from another library's files: one per family.
        Case("efficientnet_b0", "keras", "EfficientNetB0", "keras", 224, 107),
        Case("efficientnetv2_b0", "keras", "EfficientNetV2B0", "keras", 224, 107),
        Case("convnext_tiny", "keras", "ConvNeXtTiny", "keras", 224, 107),
        Case("densenet121", "keras", "DenseNet121", "keras", 224, 107),
        Case("vgg16", "keras", "VGG16", "keras", 224, gain=2.0),
        Case("mobilenetv3_small", "keras", "MobileNetV3Small", "keras", 224, 107),
        Case("mobilenet", "timm", "mobilenetv1_100", "timm", 224, 107),
        Case("mobilenetv2", "torchvision", "mobilenet_v2", "torchvision", 224, 107),
        # Radiology: a pickled module, a state dict, state dicts and Keras files without a classifier.
        Case("densenet121", "xrv", "DenseNet", "torchvision", 224, 107, tag="xrv", channels=1),
        Case("resnet50_v15", "xrv", "ResNet", "torchvision", 512, 107, tag="xrv", channels=1),
        Case("densenet121", "torchvision", "densenet121", "radimagenet", 224, 107, tag="radimagenet"),
        Case("resnet50_v15", "torchvision", "resnet50", "radimagenet", 224, 107, tag="radimagenet"),
        Case("densenet121", "keras", "DenseNet121", "keras_bgr", 224, 107, tag="radimagenet_keras"),
        Case("resnet50", "keras", "ResNet50", "keras", 224, 107, tag="radimagenet"),
    ]  # fmt: skip


# Networks that are small enough for float64; not those of Keras, parts of which always compute in float32.
DOUBLE = (
    "efficientnet_b0 timm", "efficientnet_lite0 timm", "efficientnetv2_b0 timm", "resnet18 ", "bit_r50x1 ",
    "convnext_tiny timm", "convnextv2_atto ", "densenet121 torchvision", "mobilenet timm", "mobilenetv2 torchvision",
    "mobilenetv3_small timm", "squeezenet1_1 ", "xray_cnn ", "simple ",
)  # fmt: skip
# One per family, except VGG, which has no norm, no branch, and 143 million float64 gradients.
TRAIN = (
    "efficientnet_b0 timm", "efficientnetv2_b0 timm", "resnet18 ", "resnet50v2 ", "bit_r50x1 ", "convnextv2_atto ",
    "densenet121 torchvision", "mobilenet timm", "mobilenetv2 torchvision", "mobilenetv3_small timm",
    "squeezenet1_1 ", "xray_cnn ", "cbr_small ", "simple ",
)  # fmt: skip


CASES = {c.key: replace(c, double=c.key.startswith(DOUBLE), train=c.key.startswith(TRAIN)) for c in _cases()}
# One small case per family, for the goldens of the ordinary tests.
GOLDEN = (
    "efficientnet_lite0 ", "efficientnet_b0 timm", "efficientnetv2_b0 timm", "resnet18 ", "resnet50v2 ", "bit_r50x1 ",
    "convnextv2_atto ", "densenet121 torchvision", "vgg16 keras", "mobilenet keras", "mobilenetv2 torchvision",
    "mobilenetv3_small timm", "squeezenet1_1 ",
)  # fmt: skip
# Networks and further layouts whose tensor names are used in the tests of the rules.
NAMED = (
    r"efficientnet_(b0|lite0)|efficientnetv2_(b0|s)|resnet(18|50|50_v15|50v2)|bit_r50x1|convnext_tiny|convnextv2_atto"
    r"|densenet121|vgg1[69]|squeezenet1_1|mobilenet(v2|v3_small|v3_large)?"
)
LAYOUTS = (
    Case("bit_r50x1", "timm", "resnetv2_50x1_bit", "timm", 224),
    Case("convnext_tiny", "torchvision", "convnext_tiny", "torchvision", 224),
    Case("efficientnetv2_s", "torchvision", "efficientnet_v2_s", "torchvision", 224),
    Case("mobilenetv2", "timm", "mobilenetv2_100", "timm", 224),
    Case("mobilenetv3_large", "keras", "MobileNetV3Large", "keras", 224),
    *(Case(f"mobilenetv3_{v}", "torchvision", f"mobilenet_v3_{v}", "torchvision", 224) for v in ("small", "large")),
    *(Case(f"vgg{d}", "timm", f"vgg{d}", "timm", 224) for d in (16, 19)),
)
