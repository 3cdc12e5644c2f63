"""Latency of single images and batches of eight: lungjax against onnxruntime, in turns.

    python -m tests.benchmarks.latency --out=FOLDER [--models=efficientnet_b0,cbr_small] [--rounds=9]
        [--peer_python=PYTHON]

Needs the extra `parity`, torch, onnxscript and onnxruntime; `--peer_python` names an interpreter that has these.
"""

import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import harness
from tests.benchmarks.train_peers import CBR, CLASSES, channels, torch_network

SIDE = 224
BATCHES = (1, 8)
CHECKED = 2  # images whose logits are compared
LIMIT = 1e-4  # of the range of an image's logits
TURN_SECONDS = 1.0

Turn = Callable[..., dict[str, Any]]


def pixels(network: str, batch: int) -> np.ndarray:
    """Returns images uint8 [batch, SIDE, SIDE, channels]."""
    shape = (batch, SIDE, SIDE, channels(network))
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def for_onnx(images: np.ndarray) -> np.ndarray:
    """Returns float32 [B, C, H, W] in -1..1, the input of the ONNX file."""
    return np.ascontiguousarray((images.astype(np.float32) / 255 - 0.5).transpose(0, 3, 1, 2) / 0.5)


def make(network: str, folder: str) -> tuple[dict[str, Any], None]:
    """Writes FOLDER/NETWORK.onnx with a dynamic batch size, FOLDER/logits.npy and the weights.

    CBR has the layers of `train_peers.py`, and no file of weights; other networks are timm's, with the random weights
    of tests.parity. torch.onnx folds the norms into the convolutions.
    """
    import torch

    path = Path(folder)
    if network in CBR:
        model = torch_network(network)
        load_cbr(model, network)
    else:
        from tests.parity import references
        from tests.parity.__main__ import filename
        from tests.parity.cases import CASES

        case = next(case for key, case in CASES.items() if key.startswith(f"{network} timm:"))
        model = references.make(case, SIDE)
        references.write(case, model, path / filename(case))
    shape = (CHECKED, channels(network), SIDE, SIDE)
    options = {"dynamo": True, "external_data": False, "optimize": True}
    options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model.eval(), (torch.zeros(shape),), path / f"{network}.onnx", **options)
    images = torch.from_numpy(for_onnx(pixels(network, CHECKED)))
    with torch.no_grad():
        np.save(path / "logits.npy", model(images).numpy())
    return {}, None


def random_network(network: str) -> tuple[Any, Any]:
    """Returns a network of lungjax and its random variables."""
    from lungjax import models
    from tests.random_weights import random_variables

    module = models.MODELS[network](outputs=CLASSES)
    return module, random_variables(module, (SIDE, SIDE, channels(network)))


def load_cbr(model: Any, network: str) -> None:
    """Loads the variables of `random_network` into a CBR network in torch."""
    import torch

    from lungjax.models import trees

    leaves = {path: torch.tensor(array) for path, array in trees.flatten(random_network(network)[1]).items()}
    convs, norms = ([x for x in model if isinstance(x, kind)] for kind in (torch.nn.Conv2d, torch.nn.BatchNorm2d))
    for name, conv, norm in zip(("stem", "stage2", "stage3", "stage4", "stage5"), convs, norms, strict=False):
        conv.weight.data = leaves[f"params/{name}_conv/kernel"].permute(3, 2, 0, 1).contiguous()
        conv.bias.data = leaves[f"params/{name}_conv/bias"]
        norm.weight.data, norm.bias.data = (leaves[f"params/{name}_bn/{leaf}"] for leaf in ("scale", "bias"))
        norm.running_mean, norm.running_var = (leaves[f"batch_stats/{name}_bn/{leaf}"] for leaf in ("mean", "var"))
    model[-1].weight.data = leaves["params/head/dense/kernel"].T.contiguous()
    model[-1].bias.data = leaves["params/head/dense/bias"]


def ours(network: str, folder: str) -> tuple[dict[str, Any], Turn]:
    """Returns facts with the seconds of each step, and turns from uint8 pixels to probabilities on the host."""
    start = time.perf_counter()
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

    spec = InputSpec(size=(SIDE, SIDE), channels=channels(network), mean=(0.5,), std=(0.5,))
    files = [path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".pth")]
    imported = time.perf_counter()
    if files:
        module, variables, _ = lungjax.create(network, weights=f"file:{files[0]}")
    else:
        module, variables = random_network(network)
    variables = jax.tree.map(jnp.asarray, variables)
    built = FoldedModel(module, variables, (SIDE, SIDE, channels(network)))
    folded = built.fold(variables)

    def forward(folded: dict[str, Any], pixels: jax.Array) -> dict[str, jax.Array]:
        logits, features = built(folded, normalize(pixels, spec))
        return named_outputs(logits, features["last"], metadata)

    metadata = Metadata(network, tuple(map(str, range(module.outputs))), spec, "")
    compiled = jax.jit(forward, compiler_options=conv.compiler_options(train=False))
    ready = time.perf_counter()

    def call(batch: int) -> np.ndarray:
        return np.asarray(compiled(folded, images[batch])["probabilities"])

    images = {batch: pixels(network, batch) for batch in BATCHES}
    call(1)
    answered = time.perf_counter()
    seconds = [imported - start, ready - imported, answered - ready]
    logits = np.asarray(compiled(folded, pixels(network, CHECKED))["logits"])
    return {"seconds": seconds, "versions": f"jax {jax.__version__}", "logits": logits.tolist()}, turns(call)


def onnx(network: str, folder: str, threads: int) -> tuple[dict[str, Any], Turn]:
    """Returns facts, and turns from normalized float32 pixels [B, C, H, W] to logits; 0 threads: one per core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    path = Path(folder, f"{network}.onnx")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    images = {batch: for_onnx(pixels(network, batch)) for batch in (*BATCHES, CHECKED)}

    def call(batch: int) -> np.ndarray:
        return session.run(None, {name: images[batch]})[0]

    facts = {"versions": f"onnxruntime {onnxruntime.__version__}", "logits": call(CHECKED).tolist()}
    return facts, turns(call)


def turns(call: Callable[[int], Any]) -> Turn:
    """Returns a function for turns of calls with a batch size."""

    def turn(batch: int, duration: float) -> dict[str, Any]:
        call(batch)
        call(batch)
        times: list[float] = []
        watch, end = harness.Watch(), time.perf_counter() + duration
        while time.perf_counter() < end or len(times) < 5:
            times.append(1e3 * harness.timed(lambda: call(batch))[0])
        _, used, others = watch.read()
        return {"ms": times, "processor_ms": 1e3 * used / len(times), "others": others}

    return turn


def distance(a: Any, b: Any) -> float:
    """Returns the largest difference of logits [B, C], relative to the range of an image's logits."""
    a, b = np.asarray(a), np.asarray(b)
    return float((np.abs(a - b).max(1) / np.ptp(b, axis=1)).max())


def start(python: str, function: str, folder: Path, cache: Path, **arguments: Any) -> tuple[harness.Process, Any]:
    """Starts a contender; returns its process and its facts."""
    env = harness.CPU | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",  # as lungjax.cli sets it
    }
    process = harness.Process(python, "latency", function, env, network=folder.name, folder=str(folder), **arguments)
    return process, process.answer()


def measure(network: str, args: Namespace) -> tuple[list[list[str]], list[str]]:
    """Measures one network; returns its rows of the first table and its row of the second."""
    folder = args.out / network
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "logits.npy").exists():
        start(args.peer_python, "make", folder, folder)[0].close()
    expected = np.load(folder / "logits.npy")
    with tempfile.TemporaryDirectory() as cache:
        process, empty = start("", "ours", folder, Path(cache))
        process.close()
        contenders = {"ours": start("", "ours", folder, Path(cache))}
    contenders |= {f"onnx{n}": start(args.peer_python, "onnx", folder, folder, threads=n) for n in (0, 2)}
    for name, (_, facts) in contenders.items():
        if (far := distance(facts["logits"], expected)) > LIMIT:
            sys.exit(f"{network}: logits of {name} differ from torch's by {far:.1e} of their range")
    rows = []
    for batch in BATCHES:
        request = {"batch": batch, "duration": TURN_SECONDS}
        calls = {name: partial(process.ask, **request) for name, (process, _) in contenders.items()}
        turns = harness.take_turns(calls, args.rounds)
        medians = {name: [statistics.median(t["ms"]) for t in values] for name, values in turns.items()}
        every = {name: np.concatenate([t["ms"] for t in values]) for name, values in turns.items()}
        cells = [f"{network}, {batch} x {SIDE} px"]
        cells += [f"{np.median(times):.1f} / {np.quantile(times, 0.95):.1f}" for times in every.values()]
        cells += [harness.ratio(medians["ours"], medians[name]) for name in ("onnx0", "onnx2")]
        cells += [f"{min(every['ours']) / min(every['onnx0']):.2f}"]
        cells += [f"{np.median([t['processor_ms'] for t in turns['ours']]):.1f}"]
        rows.append([*cells, f"{max(t['others'] for values in turns.values() for t in values):.0%}"])
    for process, _ in contenders.values():
        process.close()
    mine, peer = contenders["ours"][1], contenders["onnx0"][1]
    cells = [network, f"{distance(mine['logits'], peer['logits']):.1e}"]
    for seconds in (empty["seconds"], mine["seconds"]):
        cells.append(f"{sum(seconds):.1f} ({', '.join(f'{part:.1f}' for part in seconds)})")
    return rows, [*cells, f"{mine['versions']}, {peer['versions']}"]


def main() -> None:
    models = ["efficientnet_b0", "cbr_small"]
    args = harness.parse(__doc__, ["out"], out=Path, models=models, rounds=9, peer_python="")
    results = [measure(network, args) for network in args.models]
    heads = (
        "cpu, float32", "ours, ms: median / p95", "onnxruntime", "with 2 threads", "ours / onnxruntime",
        "ours / 2 threads", "of the fastest calls", "ours, processor ms", "others",
    )  # fmt: skip
    print(harness.table(heads, [cells for rows, _ in results for cells in rows]))
    heads = ("", "logits differ by", "first answer, s (import, load, compile and run)", "from the cache", "versions")
    print("\n" + harness.table(heads, [cells for _, cells in results]))


if __name__ == "__main__":
    main()
