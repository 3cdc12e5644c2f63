"""Built-in images that are not lung images of the training modality, to measure what the novelty score detects.

Each call returns the same images, without a download: photographs that scikit-image installs, phantoms, blank images
and noise. They are easier to detect than the real images of another modality in tests/benchmarks/README.md.
"""

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from lungjax.data.imaging import images
from lungjax.datasets.phantom import slices as phantom

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
    "page.png", "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
PHANTOMS = 12  # of each modality; an X-ray takes about 0.15 s
SIDE = 256  # of the other images, in pixels


@functools.cache
def builtin(modality: str) -> Mapping[str, tuple[np.ndarray, ...]]:
    """Returns images, uint8 [H, W], by kind: phantoms of all modalities except `modality` ("ct", "xray" or "")."""
    rng = np.random.default_rng(0)
    patients = [phantom.new_patient(50_000 + i, phantom.CLASSES[i % 3]) for i in range(PHANTOMS)]
    kinds: dict[str, tuple[np.ndarray, ...]] = {}
    if modality != "xray":
        kinds["synthetic chest X-rays"] = tuple(map(phantom.draw_radiograph, patients))
    if modality != "ct":
        kinds["synthetic CT slices"] = tuple(phantom.gray(phantom.draw_slice(p, 0.5).hu, p.window) for p in patients)
    shape, deviations = (SIDE, SIDE), rng.uniform(10, 80, 10)
    kinds["photographs, grayscale"] = _photographs()
    kinds["blank images, black to white"] = tuple(np.full(shape, v, np.uint8) for v in np.linspace(0, 255, 20))
    kinds["noise"] = (
        *(rng.integers(0, 256, shape, np.uint8) for _ in deviations),
        *(np.clip(rng.normal(128, s, shape), 0, 255).astype(np.uint8) for s in deviations),
    )
    return {kind: pictures for kind, pictures in kinds.items() if pictures}


def _photographs() -> tuple[np.ndarray, ...]:
    """Returns the photographs of scikit-image; those that a version lacks are omitted."""
    spec = importlib.util.find_spec("skimage")
    folders = [Path(folder, "data") for folder in (spec and spec.submodule_search_locations) or ()]
    result = []
    for path in (folder / name for folder in folders for name in PHOTOGRAPHS):
        if path.is_file():
            with Image.open(path) as image:
                image.thumbnail((SIDE, SIDE))
                result.append(images.gray(np.asarray(image.convert("RGB"))))
    return tuple(result)
