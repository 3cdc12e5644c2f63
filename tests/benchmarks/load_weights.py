"""Time and memory of loading ConvNeXt-Large from its file into the network.

    python tests/benchmarks/load_weights.py

Writes a temporary file of random values with the names and shapes of timm's convnext_large (0.79 GB) and loads it
three times by `lungjax.create`, each in its own process.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

DEPTHS, WIDTHS = (3, 3, 27, 3), (192, 384, 768, 1536)

CHILD = """
import os, sys, time
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, lungjax.inference.api, lungjax

def peak():
    text = open("/proc/self/status").read()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024

before, started = peak(), time.perf_counter()
net, variables, spec = lungjax.create("convnext_large", f"file:{sys.argv[1]}", classes=3)
jax.block_until_ready(variables)
seconds = time.perf_counter() - started
size = os.path.getsize(sys.argv[1]) / 2**20
times = (peak() - before) / size
print(f"{seconds:.1f} s; peak {peak():.0f} MiB, {before:.0f} before loading: {times:.2f} times the file")
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """Returns the shapes of timm's convnext_large by tensor name."""
    result: dict[str, tuple[int, ...]] = {}

    def layer(name: str, weight: tuple[int, ...]) -> None:
        result[f"{name}.weight"], result[f"{name}.bias"] = weight, weight[:1]

    layer("stem.0", (WIDTHS[0], 3, 4, 4))
    layer("stem.1", WIDTHS[:1])
    for stage, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True)):
        if stage:
            layer(f"stages.{stage}.downsample.0", (WIDTHS[stage - 1],))
            layer(f"stages.{stage}.downsample.1", (width, WIDTHS[stage - 1], 2, 2))
        for i in range(depth):
            block = f"stages.{stage}.blocks.{i}"
            result[f"{block}.gamma"] = (width,)
            layer(f"{block}.conv_dw", (width, 1, 7, 7))
            layer(f"{block}.norm", (width,))
            layer(f"{block}.mlp.fc1", (4 * width, width))
            layer(f"{block}.mlp.fc2", (width, 4 * width))
    layer("head.norm", WIDTHS[-1:])
    layer("head.fc", (1000, WIDTHS[-1]))
    return result


def main() -> None:
    """Writes the file and loads it three times; the processes print their measurements."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "convnext_large.fb_in1k.safetensors"
        save_file(tensors, path)
        del tensors
        for _ in range(3):
            subprocess.run([sys.executable, "-c", CHILD, str(path)], check=True)


if __name__ == "__main__":
    main()
