"""The processes of `latency.py`, each with one network.

    --task=make   writes a network's weights and its ONNX file (torch, timm, onnxscript)
    --task=ours   runs lungjax, as `lungjax.inference.model` compiles it
    --task=onnx   runs onnxruntime

`ours` and `onnx` load, compile and warm up, write one line of JSON, and then answer each line
{"batch": n, "seconds": s} with the milliseconds of single calls during about s seconds.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 224
CHECKED = 2  # images whose logits are compared

Call = Callable[[int], Any]  # with a batch size


def channels(network: str) -> int:
    """Returns the channels of a network: CBR networks are for grayscale images."""
    return 1 if network.startswith("cbr") else 3


def pixels(network: str, batch: int) -> np.ndarray:
    """Returns images uint8 [batch, SIDE, SIDE, channels]."""
    shape = (batch, SIDE, SIDE, channels(network))
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def for_onnx(images: np.ndarray) -> np.ndarray:
    """Returns float32 [B, C, H, W] in -1..1, the input of the ONNX file."""
    return np.ascontiguousarray((images.astype(np.float32) / 255 - 0.5).transpose(0, 3, 1, 2) / 0.5)


def make(network: str, folder: Path) -> None:
    """Writes FOLDER/weights and FOLDER/NETWORK.onnx with a dynamic batch size.

    CBR has the layers of `train_networks.py`; other networks are timm's, with the random weights of tests.parity.
    torch.onnx folds the norms into the convolutions.
    """
    import torch

    from tests.benchmarks.train_networks import CBR, torch_network

    if network in CBR:
        torch.manual_seed(0)
        model = torch_network(network)
        norms = [layer for layer in model if isinstance(layer, torch.nn.BatchNorm2d)]
        for norm in norms:
            torch.nn.init.normal_(norm.bias)
            norm.momentum = None  # cumulative mean
        with torch.no_grad():
            model.train()(torch.from_numpy(for_onnx(pixels(network, 8))))
        arrays: dict[str, Any] = _cbr_leaves(model)
        np.savez(folder / "weights.npz", **arrays)
    else:
        from tests.parity import references
        from tests.parity.__main__ import filename
        from tests.parity.cases import CASES

        case = next(case for key, case in CASES.items() if key.startswith(f"{network} timm:"))
        model = references.make(case, SIDE)
        references.write(case, model, folder / filename(case))
    shape = (CHECKED, channels(network), SIDE, SIDE)
    torch.onnx.export(
        model.eval(),
        (torch.zeros(shape),),
        folder / f"{network}.onnx",
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        optimize=True,
    )
    images = torch.from_numpy(for_onnx(pixels(network, CHECKED)))
    with torch.no_grad():
        np.save(folder / "logits.npy", model(images).numpy())


def _cbr_leaves(model: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a CBR network in torch with our names and axes."""
    import torch

    leaves, number = {}, 0
    for layer in model:
        if isinstance(layer, torch.nn.Conv2d):
            number += 1
            name = "stem" if number == 1 else f"stage{number}"
            leaves[f"{name}_conv/kernel"] = layer.weight.detach().numpy().transpose(2, 3, 1, 0)
            leaves[f"{name}_conv/bias"] = layer.bias.detach().numpy()
        elif isinstance(layer, torch.nn.BatchNorm2d):
            names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
            leaves |= {f"{name}_bn/{ours}": getattr(layer, of).detach().numpy() for ours, of in names.items()}
        elif isinstance(layer, torch.nn.Linear):
            leaves["head/dense/kernel"] = layer.weight.detach().numpy().T
            leaves["head/dense/bias"] = layer.bias.detach().numpy()
    return leaves


def ours(network: str, folder: Path, threads: int) -> tuple[Call, dict[str, Any]]:
    """Returns a function from uint8 pixels to probabilities on the host, and facts with the seconds of each step."""
    del threads  # jax uses all cores
    start = time.perf_counter()
    from lungjax.runtime import environment

    environment.keep_freed_memory()  # as in every command

    import jax
    import jax.numpy as jnp

    import lungjax
    from lungjax import models
    from lungjax.config import InputSpec
    from lungjax.config.metadata import Metadata
    from lungjax.inference.model import named_outputs
    from lungjax.models import folding, trees
    from lungjax.models.inputs import normalize
    from lungjax.models.ops import conv

    spec = InputSpec(size=(SIDE, SIDE), channels=channels(network), mean=(0.5,), std=(0.5,))
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".npz", ".pth")]
    imported = time.perf_counter()
    if files[0].name == "weights.npz":
        leaves = dict(np.load(files[0]))
        made: Any = models.MODELS[network]
        module = made(outputs=len(leaves["head/dense/bias"]))
        parts = trees.split(leaves, {path for path in leaves if path.endswith(("/mean", "/var"))})
        variables = dict(zip(("params", "batch_stats"), map(trees.unflatten, parts), strict=True))
    else:
        module, variables, _ = lungjax.create(network, weights=f"file:{files[0]}")
    variables = jax.tree.map(jnp.asarray, variables)
    built = folding.FoldedModel(module, variables, (SIDE, SIDE, channels(network)))
    folded = built.fold(variables)

    def forward(folded: dict[str, Any], pixels: jax.Array) -> dict[str, jax.Array]:
        logits, features = built(folded, normalize(pixels, spec))
        return named_outputs(logits, features["last"], metadata)

    metadata = Metadata(network, tuple(map(str, range(module.outputs))), spec, "")
    compiled = jax.jit(forward, compiler_options=conv.compiler_options(train=False))
    ready = time.perf_counter()

    def call(batch: int) -> np.ndarray:
        return np.asarray(compiled(folded, images[batch])["probabilities"])

    images = {batch: pixels(network, batch) for batch in range(1, 65) if batch & (batch - 1) == 0}
    call(1)
    answered = time.perf_counter()
    facts = {
        "import_seconds": imported - start,
        "load_seconds": ready - imported,
        "first_seconds": answered - ready,
        "versions": f"jax {jax.__version__}",
    }
    logits = compiled(folded, pixels(network, CHECKED))["logits"]
    return call, facts | {"logits": np.asarray(logits).tolist()}


def onnx(network: str, folder: Path, threads: int) -> tuple[Call, dict[str, Any]]:
    """Returns a function from normalized float32 pixels [B, C, H, W] to logits, and facts."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads  # 0: one per core
    path = str(folder / f"{network}.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    images: dict[int, np.ndarray] = {}

    def call(batch: int) -> np.ndarray:
        if batch not in images:
            images[batch] = for_onnx(pixels(network, batch))
        return session.run(None, {name: images[batch]})[0]

    facts = {"versions": f"onnxruntime {onnxruntime.__version__}", "logits": call(CHECKED).tolist()}
    return call, facts


def turn(call: Call, batch: int, seconds: float) -> dict[str, Any]:
    """Returns the milliseconds of calls during about `seconds`, after two calls, and the processor time per call."""
    call(batch)
    call(batch)
    times: list[float] = []
    used, end = time.process_time(), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        call(batch)
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": times, "processor_ms": 1e3 * (time.process_time() - used) / len(times)}


def main() -> None:
    """Writes the files, or answers turns until the input ends; an error is the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=("make", "ours", "onnx"))
    parser.add_argument("--network", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime; 0 is its default")
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not come between
    try:
        if args.task == "make":
            make(args.network, args.folder)
            print("{}", file=out, flush=True)
            return
        call, facts = (ours if args.task == "ours" else onnx)(args.network, args.folder, args.threads)
        print(json.dumps(facts), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(turn(call, **json.loads(line))), file=out, flush=True)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:600]}), file=out, flush=True)
    os._exit(0)  # without waiting for threads of libraries


if __name__ == "__main__":
    main()
