"""How long, and in how much memory, ConvNeXt-Large comes from its file into the network.

    python tests/benchmarks/load_weights.py

Writes a file of random values with the names and shapes of timm's convnext_large (0.79 GB) into a temporary folder,
then loads it in a process of its own by `lungjax.create`.
"""

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

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
print(f"{seconds:.1f} s; peak {peak():.0f} MiB, of it {before:.0f} before: {times:.2f} times the file")
"""


def names() -> dict[str, tuple[int, ...]]:
    """Returns the tensors of timm's convnext_large with their shapes."""
    found: dict[str, tuple[int, ...]] = {}

    def pair(name: str, weight: tuple[int, ...]) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = weight, weight[:1]

    pair("stem.0", (WIDTHS[0], 3, 4, 4))
    pair("stem.1", WIDTHS[:1])
    for s, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True)):
        if s:
            pair(f"stages.{s}.downsample.0", (WIDTHS[s - 1],))
            pair(f"stages.{s}.downsample.1", (width, WIDTHS[s - 1], 2, 2))
        for i in range(depth):
            at = f"stages.{s}.blocks.{i}"
            found[f"{at}.gamma"] = (width,)
            pair(f"{at}.conv_dw", (width, 1, 7, 7))
            pair(f"{at}.norm", (width,))
            pair(f"{at}.mlp.fc1", (4 * width, width))
            pair(f"{at}.mlp.fc2", (width, 4 * width))
    pair("head.norm", WIDTHS[-1:])
    pair("head.fc", (1000, WIDTHS[-1]))
    return found


def main() -> None:
    """Writes the file, loads it three times, prints each."""
    shapes, header, at = names(), {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "convnext_large.fb_in1k.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for shape in shapes.values():
                file.write(rng.standard_normal(shape, np.float32).tobytes())
        for _ in range(3):
            subprocess.run([sys.executable, "-c", CHILD, str(path)], check=True)


if __name__ == "__main__":
    main()
