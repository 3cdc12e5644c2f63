"""The frameworks of `train.py`: each process trains one network, and is idle between requests.

Started by `train.py`, by path, in an interpreter that needs only its own library: lungjax with jax, flax and optax
(grain, TFDS, orbax, h5py and scikit-image are hidden, so that a machine without them measures the same), Keras with
jax, or torch with timm. The process builds and compiles, prints one line of JSON, and then answers each line
{"steps": n} with the seconds per step, and {"end": true} with its peak memory.

All train the same layers (`train_networks.py`) with Adam in float32.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.train_networks import CLASSES, TIMM, channels, keras_network, torch_network

LR = 1e-3
ABSENT = ("grain", "tensorflow_datasets", "orbax", "h5py", "skimage", "matplotlib", "PIL", "tqdm")


@dataclass
class Contender:
    """A compiled training step and its facts."""

    advance: Callable[[int], float]  # runs that many steps and waits; returns the last loss
    versions: str
    parameters: int
    compile_seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    peak_bytes: Callable[[], int] | None = None  # on the device; None: the peak of the process


def normalized(network: str, batch: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 images [batch, side, side, channels] and int32 labels, for the peers."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, side, side, channels(network))).astype(np.float32)
    return images, (np.arange(batch) % CLASSES).astype(np.int32)


def compiled(step: Any, *shapes: Any) -> tuple[Any, float, dict[str, Any]]:
    """Returns a jitted step compiled, the seconds for tracing and compiling, and XLA's count of its operations."""
    start = time.perf_counter()
    program = step.lower(*shapes).compile()
    seconds = time.perf_counter() - start
    return program, seconds, {"flops": (program.cost_analysis() or {}).get("flops")}


def jax_peak() -> Callable[[], int] | None:
    """Returns a function for the peak memory of the device, None if jax doesn't count it (CPU)."""
    import jax

    stats = jax.devices()[0].memory_stats()
    if not stats or "peak_bytes_in_use" not in stats:
        return None
    return lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def lungjax_contender(cell: dict[str, Any]) -> Contender:
    """lungjax, compiled as by `lungjax.training.train`."""
    for name in ABSENT:
        sys.modules[name] = None  # type: ignore[assignment]
    from lungjax.runtime import environment

    environment.keep_freed_memory()  # as lungjax.main does

    import flax
    import jax
    import optax

    from lungjax.config import Config, InputSpec, ModelConfig, OptimConfig, TrainConfig
    from lungjax.models import trees
    from lungjax.runtime import mesh as meshes
    from lungjax.training import program

    network, side, batch = cell["network"], cell["size"], cell["batch"]
    config = Config(
        input=InputSpec(size=(side, side), channels=channels(network), mean=(0.5,), std=(0.25,)),
        # Keras's and timm's ConvNeXt drop no paths by default.
        model=ModelConfig(name=network, dtype=cell["dtype"], drop_path=0.0 if "convnext" in network else None),
        optim=OptimConfig(name="adam", lr=LR),
        train=TrainConfig(batch_size=batch, steps=10**6),
    )
    mesh = meshes.make_mesh(1)
    labels = (np.arange(batch) % CLASSES).astype(np.int32)
    built = program.build(config, tuple("abc"), labels, mesh)
    images = np.random.default_rng(0).integers(0, 256, (batch, side, side, channels(network)), np.uint8)
    examples = {"image": images, "label": labels, "place": np.arange(batch, dtype=np.uint32)}
    on_device = meshes.to_devices(examples, mesh)
    step, seconds, facts = compiled(built.train_step, built.abstract_state, on_device)
    current = built.new_state({})

    def advance(steps: int) -> float:
        nonlocal current
        for _ in range(steps):
            current, metrics = step(current, on_device)
        jax.block_until_ready(current)
        return float(metrics["loss"])

    count = sum(int(np.prod(leaf.shape)) for leaf in trees.flatten(built.abstract_state.params).values())
    versions = f"lungjax, jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}"
    return Contender(advance, f"{versions}, {jax.devices()[0].device_kind}", count, seconds, facts, jax_peak())


def keras_contender(cell: dict[str, Any]) -> Contender:
    """Keras 3 on jax: exactly the function that `fit` compiles, `Model.train_step` under jit with its state donated.

    It is called without the loop, callbacks and iterator of `fit`, which could slow it, on a batch on the device.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras

    if cell["dtype"] == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras_network(cell["network"], cell["size"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(LR), loss=loss)
    model.optimizer.build(model.trainable_variables)
    groups = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables)
    current: Any = tuple([variable.value for variable in group] for group in (*groups, model.metrics_variables))
    data = tuple(jax.device_put(array) for array in normalized(cell["network"], cell["batch"], cell["size"]))
    built, seconds, facts = compiled(jax.jit(model.train_step, donate_argnums=0), current, data)
    logs: Any = {}

    def advance(steps: int) -> float:
        nonlocal current, logs
        for _ in range(steps):
            logs, current = built(current, data)
        jax.block_until_ready(current)
        return float(logs["loss"])

    count = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    versions = f"keras {keras.__version__}, jax {jax.__version__}"
    return Contender(advance, versions, count, seconds, facts, jax_peak())


def torch_contender(cell: dict[str, Any]) -> Contender:
    """torch and timm, channels_last, fused Adam: eager on the CPU; on a GPU torch.compile, and autocast to bfloat16."""
    import torch

    on_gpu = os.environ["BENCHMARK_DEVICE"] == "gpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.backends.cudnn.benchmark = True
    if not on_gpu:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.manual_seed(0)
    network = torch_network(cell["network"]).to(device, memory_format=torch.channels_last).train()
    run = network
    if cell["platform"] == "gpu":
        run = torch.compile(network, backend="inductor")
    images, labels = normalized(cell["network"], cell["batch"], cell["size"])
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device, memory_format=torch.channels_last)
    y = torch.from_numpy(labels.astype(np.int64)).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, fused=True)
    half = cell["dtype"] == "bfloat16"

    def advance(steps: int) -> float:
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = torch.nn.functional.cross_entropy(run(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        return loss.item()

    start = time.perf_counter()
    advance(1)
    seconds = time.perf_counter() - start
    count = sum(p.numel() for p in network.parameters())
    versions = f"torch {torch.__version__}"
    if cell["network"] in TIMM:
        import timm

        versions += f", timm {timm.__version__}"
    return Contender(advance, versions, count, seconds, {}, torch.cuda.max_memory_allocated if on_gpu else None)


def process_peak() -> int:
    """Returns the peak memory of this process in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def busy_seconds() -> float:
    """Returns the seconds that the cores of this process have worked for any process; 0 without /proc/stat."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    times = [line.split() for line in stat.read_text().splitlines() if line.split()[0] in names]
    return sum(int(t[i]) for t in times for i in (1, 2, 3, 6, 7)) / os.sysconf("SC_CLK_TCK")


def turn(advance: Callable[[int], float], steps: int) -> dict[str, float]:
    """Runs steps; returns seconds per step, the last loss, and the share of the cores that other processes used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy, used, start = busy_seconds(), time.process_time(), time.perf_counter()
    loss = advance(steps)
    wall = time.perf_counter() - start
    others = (busy_seconds() - busy - (time.process_time() - used)) / wall / cores
    return {"seconds": wall / steps, "loss": loss, "others": max(others, 0.0)}


def main() -> None:
    """Answers requests until {"end": true}; an error is the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", required=True, help="a cell of train.py as JSON")
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    cell = json.loads(args.cell)
    try:
        builders = {"ours": lungjax_contender, "keras": keras_contender, "torch": torch_contender}
        made = builders[cell["contender"]](cell)
        facts = {"versions": made.versions, "parameters": made.parameters, "compile_seconds": made.compile_seconds}
        print(json.dumps({**facts, **made.facts}), file=out, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            peak = made.peak_bytes or process_peak
            answer = {"peak_bytes": peak()} if "end" in request else turn(made.advance, request["steps"])
            print(json.dumps(answer), file=out, flush=True)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:600]}), file=out, flush=True)
    os._exit(0)  # without waiting for threads of libraries


if __name__ == "__main__":
    main()
