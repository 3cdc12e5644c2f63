"""Saliency maps against the formulas of the papers in torch, with the same weights.

python -m pytest tests/parity/test_saliency.py (needs the extra `parity` with torch)
"""

from typing import Any

import numpy as np
import pytest

from tests.parity import references as ref
from tests.parity.cases import CASES

SIDE, TARGETS, STEPS = 96, (3, 977), 8
LAYERS = {"resnet18 torchvision:resnet18": "layer4", "mobilenetv2 torchvision:mobilenet_v2": "features"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOLERANCE = 5e-4  # maps range from 0 to 1; float32 through complete networks


def pixels() -> np.ndarray:
    """Returns two smooth random color images, uint8."""
    from PIL import Image

    small = np.random.default_rng(5).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for one in small])


def torch_maps(model: Any, layer: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns maps [B, H, W] by method, each image for its class of TARGETS."""
    import torch
    from torch.nn import functional

    outputs: list[Any] = []
    hook = getattr(model, layer).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    x = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))

    def scores(x: Any) -> Any:
        return model((x / 255 - mean) / std)[torch.arange(len(x)), torch.tensor(TARGETS[: len(x)])]

    score = scores(x)
    hook.remove()
    last = outputs[0]
    g = torch.autograd.grad(score.sum(), last)[0]
    last = last.detach()
    plus = g**2 / torch.clamp(2 * g**2 + last.sum((2, 3), keepdim=True) * g**3, min=1e-30)
    plus = torch.where(g > 0, plus, 0.0)
    weights = {
        "gradcam": g.mean((2, 3)),
        "gradcam_positive": (g * (g > 0) * (last > 0)).mean((2, 3)),
        "gradcam++": (plus * torch.relu(g)).sum((2, 3)),
    }
    results = {}
    for name, w in weights.items():
        raw = (w[:, :, None, None] * last).sum(1, keepdim=True)
        raw = raw if name == "gradcam_positive" else torch.relu(raw)
        full = functional.interpolate(raw, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
        low = full.amin((1, 2), keepdim=True) if name == "gradcam_positive" else 0.0
        results[name] = ((full - low) / (full.amax((1, 2), keepdim=True) - low)).numpy()

    total = torch.zeros_like(x)
    for i in range(STEPS):
        at = (x * ((i + 0.5) / STEPS)).requires_grad_()
        total += torch.autograd.grad(scores(at).sum(), at)[0]
    raw = torch.relu((x * total / STEPS).sum(1))
    results["integrated_gradients"] = (raw / raw.amax((1, 2), keepdim=True)).numpy()
    return results


@pytest.mark.parametrize("key", LAYERS)
def test_maps_equal_torch(key: str, tmp_path: Any) -> None:
    import lungjax
    from lungjax.config import InputSpec
    from lungjax.explain.saliency import Explainer

    case = CASES[key]
    reference = ref.make(case, SIDE)
    path = ref.write(reference, tmp_path)
    images = pixels()
    expected = torch_maps(reference.model, LAYERS[key], images)
    net, variables, _ = lungjax.create(case.model, f"file:{path}", size=SIDE)
    spec = InputSpec(size=(SIDE, SIDE), channels=3, mean=MEAN, std=STD)
    explainer = Explainer(net, variables, spec, steps=STEPS, align=False)
    results = {}
    for method in expected:
        maps, _ = explainer.maps(images, np.asarray(TARGETS), method)
        difference = np.abs(maps - np.nan_to_num(expected[method]))  # torch divides a map without evidence by 0
        # On the path of integrated gradients a unit near zero may be positive in only one library, so single pixels
        # differ by up to 0.015, and the mean is compared.
        worst = difference.mean() if method == "integrated_gradients" else difference.max()
        results[method] = float(maps.std()), float(worst)
        print(f"{key}, {method}: {results[method][1]:.1e}, standard deviation {results[method][0]:.3f}")
    assert all(deviation > 0.02 for deviation, _ in results.values()), results  # not constant
    assert all(difference < TOLERANCE for _, difference in results.values()), results
