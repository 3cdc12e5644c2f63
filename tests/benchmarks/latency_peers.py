"""The contenders of `latency.py`: one network each in a process of its own, which works only when it is told to.

    --task=make   writes a network's weights and its ONNX file (torch, timm, onnxscript)
    --task=ours   answers with lungjax, as `lungjax.inference.predictor` compiles it
    --task=onnx   answers with onnxruntime

Started by `latency.py`, by path. The answering ones load, compile and warm up, write one line of JSON, and then answer
each line {"batch": n, "seconds": s} with the milliseconds of single calls for about so long.
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
    """Returns how many colours a network is timed with: the CBR networks are for gray images."""
    return 1 if network.startswith("cbr") else 3


def pixels(network: str, batch: int) -> np.ndarray:
    """Returns images uint8 [batch, SIDE, SIDE, channels]."""
    shape = (batch, SIDE, SIDE, channels(network))
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def for_onnx(images: np.ndarray) -> np.ndarray:
    """Returns float32 [B, C, H, W] in -1..1 as the ONNX file takes them."""
    return np.ascontiguousarray((images.astype(np.float32) / 255 - 0.5).transpose(0, 3, 1, 2) / 0.5)


def make(network: str, folder: Path) -> None:
    """Writes FOLDER/weights (as timm publishes them, or by our own names) and FOLDER/NETWORK.onnx, batch size open.

    EfficientNet and others: timm's network, with the weights and running statistics that tests.parity draws. CBR: the
    layers of `train_networks.py`. torch.onnx folds the norms into the convolutions.
    """
    import torch

    from tests.benchmarks.train_networks import CBR, torch_network

    if network in CBR:
        torch.manual_seed(0)
        model = torch_network(network)
        norms = [layer for layer in model if isinstance(layer, torch.nn.BatchNorm2d)]
        for norm in norms:
            torch.nn.init.normal_(norm.bias)
            norm.momentum = None  # the mean over all that it is shown
        with torch.no_grad():
            model.train()(torch.from_numpy(for_onnx(pixels(network, 8))))
        arrays: dict[str, Any] = cbr_leaves(model)
        np.savez(folder / "weights.npz", **arrays)
    else:
        from tests.parity import references
        from tests.parity.__main__ import filename
        from tests.parity.cases import CASES

        found = [case for key, case in CASES.items() if key.startswith(f"{network} timm:")]
        if not found:
            raise ValueError(f"{network}: of timm's networks and {', '.join(CBR)} only")
        model = references.make(found[0], SIDE)
        references.write(found[0], model, folder / filename(found[0]))
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


def cbr_leaves(model: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a CBR network in torch by our own names and axes."""
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
    """Returns lungjax's call, from uint8 pixels to probabilities on the host, and the facts.

    The facts hold the seconds from the process's start to the first answer, and which of them went where.
    """
    del threads  # all cores that the process may use
    start = time.perf_counter()
    from lungjax.runtime import environment

    environment.keep_freed_memory()  # as every command does

    import jax
    import jax.numpy as jnp

    import lungjax
    from lungjax import models
    from lungjax.config import InputSpec
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

    def logits(folded: dict[str, Any], pixels: jax.Array) -> jax.Array:
        return built(folded, normalize(pixels, spec))[0]

    def forward(folded: dict[str, Any], pixels: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits(folded, pixels))

    options = conv.compiler_options(train=False)
    compiled = jax.jit(forward, compiler_options=options)
    ready = time.perf_counter()

    def call(batch: int) -> np.ndarray:
        return np.asarray(compiled(folded, images[batch]))

    images = {batch: pixels(network, batch) for batch in range(1, 65) if batch & (batch - 1) == 0}
    call(1)
    answered = time.perf_counter()
    facts = {
        "import_seconds": imported - start,
        "load_seconds": ready - imported,
        "first_seconds": answered - ready,
        "versions": f"jax {jax.__version__}",
    }
    found = jax.jit(logits, compiler_options=options)(folded, pixels(network, CHECKED))
    return call, facts | {"logits": np.asarray(found).tolist()}


def onnx(network: str, folder: Path, threads: int) -> tuple[Call, dict[str, Any]]:
    """Returns onnxruntime's call, from float32 pixels that are normalised and in its order already, to logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads  # 0: its default, one for each core
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
    """Returns the milliseconds of calls for about so many seconds, after two, and processor time for one."""
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
    """Makes the files, or serves turns until its input ends; an error is the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=("make", "ours", "onnx"))
    parser.add_argument("--network", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime; 0 is its default")
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
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
    os._exit(0)  # libraries' threads need not be waited for


if __name__ == "__main__":
    main()
