"""Augmentation presets of the studies for `--set=augment=NAME`, and helpers for the arguments of experiments."""

import math
import re
import zlib
from collections.abc import Iterable

from lungjax.config.schema import AugmentConfig, nearest


def _ct_cov19(rotation: float, zoom: float, shift: float) -> AugmentConfig:
    """Returns the CT-COV19 study's augmentation: Keras layers, whose single negative zoom means both directions."""
    return AugmentConfig(flip_horizontal=0.5, rotation=rotation, zoom=(-zoom, zoom), shift=(shift, shift))


def _covidnet_ct(degrees: float, shear: float, jitter: float, shift: float, scale: float) -> AugmentConfig:
    """Returns the augmentation of COVIDNet-CT (arXiv:2009.05383), each part with probability 0.5; needs input.crop=box.

    The original rotates and shears about the center of the box before the crop, and shifts gray levels by integers.
    """
    return AugmentConfig(
        probability=0.5, exterior=0.5, flip_horizontal=0.5, rotation=degrees / 360, shear=shear, box_jitter=jitter,
        intensity_shift=shift, intensity_scale=scale,
    )  # fmt: skip


SHEAR_02 = math.tan(math.radians(0.2))
PRESETS: dict[str, AugmentConfig] = {
    "none": AugmentConfig(),
    # For small sets of any images; no flips, since classes may depend on the side.
    "light": AugmentConfig(
        rotation=10 / 360, zoom=(-0.1, 0.1), shift=(0.05, 0.05), fill="edge", brightness=(0.9, 1.1), contrast=(0.9, 1.1)
    ),
    # Whole-lung NCCID study: imgaug's CoarseDropout and Invert, then Keras layers. The original inverts and rotates the
    # dropped patches with the image; here they are black and not rotated, and the fill of a rotation is inverted.
    "nccid": AugmentConfig(
        rotation=0.05, zoom=(-0.2, 0.0), contrast=(0.8, 1.2), invert=0.5, dropout=(0.0, 0.1), dropout_grid=(3, 8)
    ),
    # One per image stage of the CT-COV19 study.
    "ct_cov19_original": _ct_cov19(0.1, 0.2, 0.1),
    "ct_cov19_nobackg": _ct_cov19(0.1, 0.2, 0.1),
    "ct_cov19_crop": _ct_cov19(0.07, 0.1, 0.07),
    "ct_cov19_lungs_nocrop": _ct_cov19(0.1, 0.2, 0.15),
    "ct_cov19_lungs": _ct_cov19(0.05, 0.1, 0.05),
    # iCTCF study (non-informative slices): Keras's generator, offline, 15 degrees; its "nearest" is edge.
    "ictcf": AugmentConfig(rotation=15 / 360, shift=(0.1, 0.1), fill="edge"),
    # COVID X-ray study, Keras's generator: offline for the COVID class, and online. The shear of 0.2 is in degrees and
    # thus negligible; the generator draws the zoom of height and width independently.
    "xray_covid_offline": AugmentConfig(
        flip_horizontal=0.5, rotation=5 / 360, zoom=(-0.3, 0.3), zoom_apart=True, shear=SHEAR_02, fill="edge",
        brightness=(0.2, 1.0),
    ),
    "xray_covid_online": AugmentConfig(
        flip_horizontal=0.5, rotation=40 / 360, zoom=(-0.2, 0.2), zoom_apart=True, shear=SHEAR_02,
        shift=(0.2, 0.2), fill="edge", brightness=(0.2, 1.0),
    ),
    # COVIDx CT transfer-learning study, torchvision: flips, then a rotation by up to 30 degrees about the image center
    # with nearest-neighbor interpolation, before the center crop.
    "covidx_transfer": AugmentConfig(flip_horizontal=0.5, flip_vertical=0.5, rotation=30 / 360),
    # The defaults of COVIDNet-CT's training script, and those of its augmentation class.
    "covidnet_ct": _covidnet_ct(15, shear=0.2, jitter=0.075, shift=15, scale=0.15),
    "covidnet_ct_class": _covidnet_ct(10, shear=0.15, jitter=0.025, shift=10, scale=0.2),
}  # fmt: skip


def preset(name: str) -> AugmentConfig:
    """Returns the named augmentation. Raises ValueError, listing the nearest names, for an unknown one."""
    return PRESETS[one_of("augment", name, PRESETS)]


def one_of(argument: str, value: str, known: Iterable[str]) -> str:
    """Returns `value`. Raises ValueError, listing the nearest of `known`, if it is not one of them."""
    known = list(known)
    if value not in known:
        raise ValueError(f"{argument}={value}: expected {', '.join(known)}; {nearest(value, known)}")
    return value


def slug(*parts: str) -> str:
    """Returns the nonempty parts as the name of a run: a-z, 0-9, _ and -.

    A slash becomes "-". A part with other characters gets a checksum, so that different parts give different names.
    """
    names = []
    for part in filter(None, parts):
        text = part.replace("/", "-")
        plain = re.sub("[^a-z0-9_-]+", "-", text.lower())
        names.append(plain if plain == text else f"{plain}-{zlib.crc32(part.encode()):08x}")
    return "_".join(names)
