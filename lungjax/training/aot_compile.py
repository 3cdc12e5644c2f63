"""Compiles the training step for a TPU topology without a TPU, and reports memory, cost and collectives."""

import importlib.util
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from lungjax import config as configs
from lungjax import datasets
from lungjax.config import Config
from lungjax.data import pipeline, prepared
from lungjax.models.outputs import resolve as with_output
from lungjax.report.templating import count
from lungjax.runtime import mesh as meshes
from lungjax.runtime import provenance
from lungjax.training import program
from lungjax.weights import load

GIB = 2**30
MANY = 10_000  # assumed training images per class of a data set that is not prepared
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


@dataclass(frozen=True)
class Generation:
    """Published figures of one chip of a TPU generation, and the shapes of its slices."""

    memory: int  # GiB of HBM
    bandwidth: float  # GB/s of HBM
    speed: float  # bfloat16 TFLOP/s
    shapes: tuple[str, ...]  # for 3-D topologies a selection


SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, "System architecture" and "Configurations".
GENERATIONS = {
    "v4": Generation(32, 1200, 275, SHAPES_3D),
    "v5e": Generation(16, 819, 197, SHAPES_2D),
    "v5p": Generation(95, 2765, 459, SHAPES_3D),
    "v6e": Generation(32, 1638, 918, SHAPES_2D),
}


def devices(topology: str) -> list[Any]:
    """Returns one device per chip of a topology such as "v5e:4x4". Raises ValueError if it or libtpu is unavailable."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", topology)
    name, shape = match.groups() if match else (re.split("[:-]", topology)[0], "")
    generation = GENERATIONS.get(name)
    if generation is None:
        known = ", ".join(GENERATIONS)
        raise ValueError(f"--compile_for={topology}: expected GENERATION:SHAPE, such as v5e:4x4; generations: {known}")
    flat = generation.shapes == SHAPES_2D
    if not (shape in SHAPES_2D if flat else shape.count("x") == 2):
        choices = ", ".join(f"{name}:{shape}" for shape in generation.shapes)
        others = "" if flat else " and other shapes built from 2x2 blocks of chips"
        raise ValueError(f"--compile_for={topology}: not a valid {name} slice; available: {choices}{others}")
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise ValueError("--compile_for needs the TPU compiler: pip install -e '.[tpu]' (or libtpu); no TPU is needed")
    # On Cloud TPU a v4 chip of two cores is one device.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name == "v4" else {}
    if shape == "1x1":
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--compile_for={topology}: TPU compiler error: {str(error).splitlines()[0]}") from error


def compile_for(config: Config, topology: str, data_dir: Path) -> str:
    """Compiles the training step of a run for a topology such as "v5e:4x4", and returns a report.

    The data set need not be prepared in `data_dir` if its classes are known. Raises ValueError for an unknown topology,
    a missing compiler, a bad configuration, or a step that does not fit.
    """
    chips = devices(topology)
    configs.check(config)
    classes, labels = _classes_and_labels(config, data_dir)
    config = with_output(load.resolve(config), labels)
    if config.train.devices:
        raise ValueError(f"train.devices={config.train.devices}: --compile_for={topology} sets it; leave it at 0")
    mesh = meshes.make_mesh(devices=chips)
    built = program.build(config, classes, labels, mesh)
    batch = batch_shapes(config, mesh, labels.shape[1:])
    sizes = {"state": _bytes_per_chip(built.abstract_state), "batch": _bytes_per_chip(batch)}
    lowered = built.train_step.lower(built.abstract_state, batch)  # type: ignore[attr-defined]
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(does_not_fit(str(error), config, topology, len(chips), sizes)) from error
    hosts = len({chip.process_index for chip in chips})
    parameters = sum(leaf.size for leaf in jax.tree.leaves(built.abstract_state.params))
    (height, width), images = config.input.size, config.train.batch_size
    micro = f", in {config.train.accumulate} micro-batches" if config.train.accumulate > 1 else ""
    compiler = provenance.version("libtpu") or "of TPU_LIBRARY_PATH"
    rows = [
        ("chips", f"{len(chips)} {topology.partition(':')[0]} on {count(hosts, 'host')}"),
        ("network", f"{config.model.name}, {parameters:,} parameters, computes in {np.dtype(built.module.dtype)}"),
        ("batch", f"{images} images of {height} x {width}, {images / len(chips):g} per chip{micro}"),
        *_describe_memory(compiled.memory_analysis(), config, topology, len(chips), sizes),
        *_describe_cost(compiled.cost_analysis(), config, topology),
        *count_collectives(compiled.as_text()),
        ("compiled", f"in {time.perf_counter() - started:.0f} s by libtpu {compiler}; nothing was run"),
    ]
    return "\n".join(f"{name:<20}{value}" for name, value in rows)


def _describe_memory(
    memory: Any, config: Config, topology: str, chips: int, sizes: dict[str, int]
) -> list[tuple[str, str]]:
    """Returns the rows about `Compiled.memory_analysis()`, whose numbers are bytes per chip."""
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs + memory.generated_code_size_in_bytes
    available = GENERATIONS[topology.partition(":")[0]].memory
    fits = total <= available * GIB
    verdict = "it fits" if fits else f"it does not fit. Try {_advice(config, topology, chips)}"
    placement = "sharded over the chips" if config.train.shard_params else "replicated on each chip"
    padding = max(memory.argument_size_in_bytes - sizes["state"] - sizes["batch"], 0)
    return [
        ("memory", f"{total / GIB:.2f} of {available} GiB per chip: {verdict}"),
        ("", f"{_size(sizes['state'])} parameters, statistics and optimizer state, {placement}"),
        ("", f"{_size(sizes['batch'])} batch"),
        ("", f"{_size(padding)} padding of both in the layout of the chip"),
        ("", f"{_size(memory.temp_size_in_bytes)} temporaries: activations, gradients"),
        ("", f"{_size(outputs)} results; the new state reuses the memory of the old one"),
        ("", f"{_size(memory.generated_code_size_in_bytes)} program"),
    ]


def _describe_cost(cost: dict[str, float], config: Config, topology: str) -> list[tuple[str, str]]:
    """Returns the rows about `Compiled.cost_analysis()`, whose numbers are for one chip."""
    chip = GENERATIONS[topology.partition(":")[0]]
    # XLA counts the body of a loop once; the only loop of the step is the one over micro-batches.
    flops = cost["flops"] * config.train.accumulate
    gigabytes = cost["bytes accessed"] * config.train.accumulate / 1e9
    seconds = flops / (chip.speed * 1e12)
    step, transfer = f"{1e3 * seconds:.3g} ms", f"{1e3 * gigabytes / chip.bandwidth:.3g} ms at {chip.bandwidth:g} GB/s"
    bound = f"a step takes at least {step} (arithmetic): at most {config.train.batch_size / seconds:,.0f} images/s"
    return [
        ("arithmetic", f"{flops / 1e9:,.1f} GFLOP per chip and step: {step} at {chip.speed:g} TFLOP/s"),
        ("memory traffic", f"at most {gigabytes:.3g} GB per chip and step: {transfer}, on-chip memory included"),
        ("bound", f"{bound}. Memory traffic, collectives and reading images may take longer"),
    ]


def count_collectives(text: str) -> list[tuple[str, str]]:
    """Returns (kind, description) of collectives in optimized HLO; one in several fusions or in a loop counts once."""
    channels: dict[tuple[str, str], str] = {}
    pattern = rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(.*?channel_id=(\d+)"
    for result, kind, channel in re.findall(pattern, text):
        channels.setdefault((kind, channel), result)
    rows = []
    for kind in COLLECTIVES:
        results = [result for (other, _), result in channels.items() if other == kind]
        sizes: dict[str, float] = {}
        for dtype, bits, shape in re.findall(r"\b((?:bf|f|s|u|pred)(\d*))\[([\d,]*)\]", " ".join(results)):
            size = math.prod(int(side) for side in shape.split(",") if side) * int(bits or 8) / 8
            sizes[dtype] = sizes.get(dtype, 0) + size
        if results:
            amounts = ", ".join(f"{size / 1e6:,.1f} MB of {dtype}" for dtype, size in sorted(sizes.items()))
            rows.append((kind, f"{len(results):,} in the program of each chip: {amounts}"))
    return rows or [("collectives", "none")]


def batch_shapes(
    config: Config, mesh: jax.sharding.Mesh, label_shape: tuple[int, ...] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and shardings of a global batch of `pipeline.train_batches`."""
    n, spec = config.train.batch_size, config.input
    height, width = (round(side * (1 + 2 * spec.box_margin)) for side in spec.size)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "label": ((n, *label_shape), np.int32),
        "place": ((n,), np.uint32),
    }
    shapes["image"] = ((n, height, width, spec.channels), np.uint8)
    if spec.box_margin:
        shapes["box"] = ((n, 4), np.float32)
    if config.augment.exterior:
        shapes["body"] = ((n, height, width), np.uint8)
    sharding = meshes.batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}


def does_not_fit(message: str, config: Config, topology: str, chips: int, sizes: dict[str, int]) -> str:
    """Returns the message for a RESOURCE_EXHAUSTED error of the compiler, with settings to try."""
    reason = message.splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")[:300]
    return (
        f"{config.model.name} with train.batch_size={config.train.batch_size} does not fit on {topology}. TPU compiler "
        f"error: {reason}. State and batch take {_size(sizes['state'])} and {_size(sizes['batch'])} per chip. "
        f"Try {_advice(config, topology, chips)}"
    )


def _advice(config: Config, topology: str, chips: int) -> str:
    """Returns settings that reduce the memory of a step, the cheapest first."""
    tips = [f"--set={tip}" for tip in program.smaller(config, chips)]
    name, _, shape = topology.partition(":")
    shapes = GENERATIONS[name].shapes
    if shape in shapes[:-1]:
        tips.append(f"more chips (--compile_for={name}:{shapes[shapes.index(shape) + 1]})")
    return "; ".join(tips) or "a smaller network"


def _classes_and_labels(config: Config, data_dir: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns classes and training labels, which affect only constants; if not prepared, MANY of each class."""
    name, _ = datasets.resolve(config.data.dataset)
    if prepared.is_prepared(prepared.directory(data_dir, name.full)):
        data = datasets.open_dataset(config.data.dataset, data_dir, config.data.protocol)
        return data.classes, data.columns["label"][pipeline.train_rows(data)]
    classes = datasets.classes(config.data.dataset)
    if not classes:
        advice = "prepare it, or use another one, such as --set=data.dataset=covidx_ct (three classes)"
        raise ValueError(f"{name.full} is not prepared in {data_dir}, and its classes are unknown: {advice}")
    return classes, np.repeat(np.arange(len(classes)), MANY)


def _bytes_per_chip(shapes: Any) -> int:
    leaves = jax.tree.leaves(shapes)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
