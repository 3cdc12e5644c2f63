"""Times predictions of single images and batches of eight against onnxruntime.

    python -m tests.benchmarks.latency [--models=efficientnet_b0,...] [--rounds=9] [--peer_python=PYTHON]

The models can be any that tests.parity compares with timm. The interpreter `--peer_python` (default: this one) needs
torch, timm, onnx, onnxscript and onnxruntime.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import harness

SIDE = 224
BATCHES = (1, 8)
CHECKED = 2  # images whose logits are compared
LIMIT = 1e-4  # of the range of an image's logits
TURN_SECONDS = 1.0

Turn = Callable[..., dict[str, Any]]


def pixels(batch: int) -> np.ndarray:
    """Returns images uint8 [batch, SIDE, SIDE, 3]."""
    return np.random.default_rng(0).integers(0, 256, (batch, SIDE, SIDE, 3), np.uint8)


def for_onnx(images: np.ndarray) -> np.ndarray:
    """Returns the input of the ONNX file, float32 [B, 3, H, W] in -1..1."""
    return np.ascontiguousarray((images.astype(np.float32) / 255 - 0.5).transpose(0, 3, 1, 2) / 0.5)


def make(network: str, folder: str) -> tuple[dict[str, Any], None]:
    """Writes a timm network with random weights as a weight file and as NETWORK.onnx with a dynamic batch size.

    torch.onnx folds the norms into the convolutions.
    """
    import torch

    from tests.parity import references
    from tests.parity.cases import CASES

    case = next(case for key, case in CASES.items() if key.startswith(f"{network} timm:"))
    reference = references.make(case, SIDE)
    path = references.write(reference, Path(folder))
    options = {"dynamo": True, "external_data": False, "optimize": True}
    options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    image = torch.zeros((CHECKED, 3, SIDE, SIDE))
    torch.onnx.export(reference.model.eval(), (image,), Path(folder, f"{network}.onnx"), **options)
    logits = reference.logits(for_onnx(pixels(CHECKED)).transpose(0, 2, 3, 1))
    return {"weights": str(path), "logits": logits.tolist()}, None


def ours(network: str, weights: str) -> tuple[dict[str, Any], Turn]:
    """Returns facts, and a function that times one turn of calls, from uint8 pixels to probabilities."""
    harness.keep_freed_memory()
    import jax
    import jax.numpy as jnp

    import lungjax
    from lungjax.config import InputSpec
    from lungjax.config.metadata import Metadata
    from lungjax.inference.model import named_outputs
    from lungjax.models.batch_norm_folding import FoldedModel
    from lungjax.models.inputs import normalize
    from lungjax.models.ops import conv

    spec = InputSpec(size=(SIDE, SIDE), channels=3, mean=(0.5,), std=(0.5,))
    module, variables, _ = lungjax.create(network, weights=f"file:{weights}")
    metadata = Metadata(network, tuple(map(str, range(module.outputs))), spec, "")
    variables = jax.tree.map(jnp.asarray, variables)
    built = FoldedModel(module, variables, (SIDE, SIDE, 3))
    folded = built.fold(variables)

    def forward(folded: dict[str, Any], pixels: jax.Array) -> dict[str, jax.Array]:
        logits, features = built(folded, normalize(pixels, spec))
        return named_outputs(logits, features["last"], metadata)

    compiled = conv.jit(forward, train=False)
    images = {batch: pixels(batch) for batch in BATCHES}
    logits = np.asarray(compiled(folded, pixels(CHECKED))["logits"])
    facts = {"versions": f"jax {jax.__version__}", "logits": logits.tolist()}
    return facts, turns(lambda batch: np.asarray(compiled(folded, images[batch])["probabilities"]))


def onnx(path: str) -> tuple[dict[str, Any], Turn]:
    """Returns facts, and a function that times one turn of calls, from normalized float32 pixels to logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    images = {batch: for_onnx(pixels(batch)) for batch in (*BATCHES, CHECKED)}

    def call(batch: int) -> np.ndarray:
        return session.run(None, {name: images[batch]})[0]

    return {"versions": f"onnxruntime {onnxruntime.__version__}", "logits": call(CHECKED).tolist()}, turns(call)


def turns(call: Callable[[int], Any]) -> Turn:
    """Returns a function that times repeated calls at a given batch size during one turn."""

    def turn(batch: int) -> dict[str, Any]:
        call(batch)
        call(batch)
        times: list[float] = []
        watch, end = harness.Watch(), time.perf_counter() + TURN_SECONDS
        while time.perf_counter() < end or len(times) < 5:
            times.append(1e3 * harness.timed(lambda: call(batch)))
        return {"ms": times, "others": watch.read()[2]}

    return turn


def distance(a: Any, b: Any) -> float:
    """Returns the largest difference between logits [B, C], relative to the range of each image's logits."""
    a, b = np.asarray(a), np.asarray(b)
    return float((np.abs(a - b).max(1) / np.ptp(b, axis=1)).max())


def measure(network: str, rounds: int, python: str) -> list[list[str]]:
    """Returns the table rows of a network, one per batch size."""

    def start(python: str, function: str, **arguments: Any) -> tuple[harness.Process, Any]:
        process = harness.Process(python, "latency", function, **arguments)
        return process, process.answer()

    with tempfile.TemporaryDirectory() as folder:
        process, expected = start(python, "make", network=network, folder=folder)
        process.close()
        contenders = {
            "ours": start("", "ours", network=network, weights=expected["weights"]),
            "onnx": start(python, "onnx", path=f"{folder}/{network}.onnx"),
        }
    for name, (_, facts) in contenders.items():
        print(f"{network}: {facts['versions']}", file=sys.stderr)
        if (far := distance(facts["logits"], expected["logits"])) > LIMIT:
            sys.exit(f"{network}: logits of {name} differ from torch's by {far:.1e} of their range")
    rows = []
    for batch in BATCHES:
        calls = {name: partial(process.ask, batch=batch) for name, (process, _) in contenders.items()}
        results = harness.take_turns(calls, rounds)
        medians = {name: [statistics.median(turn["ms"]) for turn in own] for name, own in results.items()}
        cells = [f"{network}, {batch} x {SIDE} px"]
        for own in results.values():
            times = np.concatenate([turn["ms"] for turn in own])
            cells.append(f"{np.median(times):.1f} / {np.quantile(times, 0.95):.1f}")
        others = max(turn["others"] for own in results.values() for turn in own)
        rows.append([*cells, harness.ratio(medians["ours"], medians["onnx"]), f"{others:.0%}"])
    for process, _ in contenders.values():
        process.close()
    return rows


def main() -> None:
    args = harness.parse(__doc__, models=["efficientnet_b0"], rounds=9, peer_python="")
    heads = ("cpu, float32", "ours, ms: median / p95", "onnxruntime", "ours / onnxruntime", "others")
    rows = [row for network in args.models for row in measure(network, args.rounds, args.peer_python)]
    print(harness.table(heads, rows))


if __name__ == "__main__":
    main()
