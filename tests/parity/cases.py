"""Which reference each variant is compared with, at which sizes."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """One variant and one reference implementation of it."""

    model: str  # ours
    library: str  # "keras", "timm" or "torchvision"
    name: str  # there
    layout: str  # of the file that is written
    size: int  # default input, pixels
    odd: int = 0  # second size; 0 for networks above 60 million parameters
    gain: float = 1.0  # variance of random kernels times their inputs
    double: bool = False  # compared in float64 as well
    train: bool = False  # training mode and gradients as well
    options: tuple[tuple[str, object], ...] = ()  # of the reference's constructor

    @property
    def key(self) -> str:
        """What a row of the table is known by."""
        return f"{self.model} {self.library}:{self.name}"


def _efficientnet() -> list[Case]:
    v1 = (224, 240, 260, 300, 380, 456, 528, 600)
    v2 = {"b0": 224, "b1": 240, "b2": 260, "b3": 300, "s": 384, "m": 480, "l": 480, "xl": 512}
    lite = (224, 240, 260, 280, 300)
    found = [
        *(Case(f"efficientnet_b{i}", "timm", f"tf_efficientnet_b{i}", "timm", n, 0 if i == 7 else 107)
          for i, n in enumerate(v1)),
        *(Case(f"efficientnet_lite{i}", "timm", f"tf_efficientnet_lite{i}", "timm", n, 107)
          for i, n in enumerate(lite)),
        *(Case(f"efficientnetv2_{v}", "timm", f"tf_efficientnetv2_{v}", "timm", n, 0 if v in ("l", "xl") else 107)
          for v, n in v2.items()),
        # Trained in torch: symmetric padding, another epsilon.
        Case("efficientnet_b0", "torchvision", "efficientnet_b0", "torchvision", 224, 107),
    ]  # fmt: skip
    return found


def _resnet() -> list[Case]:
    found = [Case(f"resnet{d}", "torchvision", f"resnet{d}", "torchvision", 224, 107) for d in (18, 34)]
    found += [Case(f"resnet{d}", "keras", f"ResNet{d}", "keras", 224, 0 if d == 152 else 107) for d in (50, 101, 152)]
    found += [Case(f"resnet{d}_v15", "timm", f"resnet{d}", "timm", 224, 107) for d in (50, 101, 152)]
    found += [Case(f"resnet{d}v2", "keras", f"ResNet{d}V2", "keras_v2", 224, 0 if d == 152 else 107)
              for d in (50, 101, 152)]  # fmt: skip
    for unit in ("50x1", "101x1", "50x3", "101x3", "152x2", "152x4"):
        odd = 107 if unit.endswith("x1") else 0
        found.append(Case(f"bit_r{unit}", "timm", f"resnetv2_{unit}_bit", "bit", 224, odd))
    return found


def _convnext() -> list[Case]:
    found = []
    for v in ("tiny", "small", "base", "large", "xlarge"):
        found.append(Case(f"convnext_{v}", "timm", f"convnext_{v}", "timm", 224, 107 if v in ("tiny", "small") else 0))
    for v in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"):
        odd = 0 if v in ("base", "large", "huge") else 107
        found.append(Case(f"convnextv2_{v}", "timm", f"convnextv2_{v}", "timm", 224, odd))
    return found


def _others() -> list[Case]:
    return [
        *(Case(f"densenet{d}", "torchvision", f"densenet{d}", "torchvision", 224, 107) for d in (121, 161, 169, 201)),
        *(Case(f"vgg{d}", "torchvision", f"vgg{d}", "torchvision", 224, gain=2.0) for d in (16, 19)),
        Case("mobilenet", "keras", "MobileNet", "keras", 224, 107),
        Case("mobilenetv2", "keras", "MobileNetV2", "keras", 224, 107),
        *(Case(f"mobilenetv3_{v}", "timm", f"tf_mobilenetv3_{v}_100", "timm", 224, 107) for v in ("small", "large")),
        *(
            Case(n, "keras", n, "ours", 256, 129 if n != "cbr_larget" else 229)
            for n in ("cbr_larget", "cbr_largew", "cbr_small", "cbr_tiny", "cbr_larget_study")
        ),
        Case("simple", "keras", "simple", "ours", 256, 107, gain=2.0),
        Case("xray_cnn", "keras", "xray_cnn", "ours", 256, gain=2.0),
    ]


def _keras_files() -> list[Case]:
    """The same networks once more, from Keras's own files: one a family."""
    plain = (("include_preprocessing", False),)
    return [
        Case("efficientnet_b0", "keras", "EfficientNetB0", "keras", 224, 107),
        Case("efficientnetv2_b0", "keras", "EfficientNetV2B0", "keras", 224, 107, options=plain),
        Case("convnext_tiny", "keras", "ConvNeXtTiny", "keras", 224, 107, options=plain),
        Case("densenet121", "keras", "DenseNet121", "keras", 224, 107),
        Case("vgg16", "keras", "VGG16", "keras", 224, gain=2.0),
        Case("mobilenetv3_small", "keras", "MobileNetV3Small", "keras", 224, 107, options=plain),
        Case("mobilenet", "timm", "mobilenetv1_100", "timm", 224, 107),
        Case("mobilenetv2", "torchvision", "mobilenet_v2", "torchvision", 224, 107),
    ]


# Small enough for float64 on both sides; not of Keras, parts of which compute in float32 whatever they are told.
DOUBLE = (
    "efficientnet_b0 timm", "efficientnet_lite0 timm", "efficientnetv2_b0 timm", "resnet18 ", "bit_r50x1 ",
    "convnext_tiny timm", "convnextv2_atto ", "densenet121 torchvision", "mobilenet timm", "mobilenetv2 torchvision",
    "mobilenetv3_small timm", "xray_cnn ", "simple ",
)  # fmt: skip
# One a family for training mode and gradients. VGG is left out: no norm, no branch, and 143 million float64 gradients.
TRAIN = (
    "efficientnet_b0 timm", "efficientnetv2_b0 timm", "resnet18 ", "resnet50v2 ", "bit_r50x1 ", "convnextv2_atto ",
    "densenet121 torchvision", "mobilenet timm", "mobilenetv2 torchvision", "mobilenetv3_small timm", "xray_cnn ",
    "cbr_small ", "simple ",
)  # fmt: skip


def _all() -> dict[str, Case]:
    found = {}
    for case in _efficientnet() + _resnet() + _convnext() + _others() + _keras_files():
        key = case.key
        found[key] = replace(case, double=key.startswith(DOUBLE), train=key.startswith(TRAIN))
    return found


CASES = _all()
