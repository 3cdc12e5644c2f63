"""Compiles the training step of a run for a TPU topology that is elsewhere, and says what that tells.

XLA's TPU compiler (libtpu) needs no TPU: it is given shapes, shardings and a topology's name. So a user learns whether
a step fits, how much arithmetic and memory traffic it is, and which collectives run, before paying for a pod. Nothing
is executed and no weight is read.
"""

import dataclasses
import importlib.util
import io
import os
import re
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from PIL import Image

from lungjax import config as configs
from lungjax import datasets
from lungjax.config import Config
from lungjax.data import pipeline, prepared
from lungjax.data.prepared import BODY_SIDE, Prepared
from lungjax.runtime import mesh as meshes
from lungjax.training import hlo, program, state
from lungjax.weights import load

GIB = 2**30
WORTH_CUTTING = 0.02  # of a chip's memory that the state takes
STEPS = 1000  # of a run whose data set isn't here; only the schedule's numbers depend on it


@dataclass(frozen=True)
class Generation:
    """One kind of TPU: what Google publishes of a chip, and in which shapes slices of it come."""

    memory: int  # GiB of HBM
    bandwidth: float  # GB/s of it
    speed: float  # TFLOP/s in bfloat16
    shapes: tuple[str, ...]  # of slices; for the 3-D ones some of many
    options: tuple[tuple[str, Any], ...] = ()  # for libtpu


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, "System architecture" and "Configurations".
GENERATIONS = {
    # A v4 chip's two cores are one device there, as on Google's machines.
    "v4": Generation(32, 1200, 275, CUBIC, (("chip_config_name", "megacore"),)),
    "v5e": Generation(16, 819, 197, FLAT),
    "v5p": Generation(95, 2765, 459, CUBIC),
    "v6e": Generation(32, 1638, 918, FLAT),
}


def parse(topology: str) -> tuple[Generation, tuple[int, ...]]:
    """Reads a topology such as "v5e:4x4": the generation, and chips along each side.

    Raises ValueError, with the choices, for another form, an unknown generation, or a shape that it doesn't come in.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", topology)
    name = found[1] if found else re.split(r"[:-]", topology)[0]
    generation = GENERATIONS.get(name)
    if generation is None:
        raise ValueError(
            f"--compile_for={topology}: give GENERATION:SHAPE, such as v5e:4x4 for 16 chips; generations are "
            f"{', '.join(GENERATIONS)}"
        )
    sides = tuple(int(side) for side in found[2].split("x")) if found else ()
    flat = generation.shapes == FLAT
    fits = found and (found[2] in FLAT if flat else len(sides) == 3 and min(sides) > 0)
    if not fits:
        raise ValueError(
            f"--compile_for={topology}: {name} comes as {', '.join(f'{name}:{shape}' for shape in generation.shapes)}"
            f"{'' if flat else ' and other boxes of 2x2 chips'}"
        )
    return generation, sides


def devices(topology: str) -> list[Any]:
    """Returns the devices of a topology, one a chip, which only a compiler can use.

    Raises ValueError for a topology that isn't there, and where libtpu isn't installed.
    """
    generation, sides = parse(topology)
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise ValueError("--compile_for needs the TPU compiler: pip install '.[tpu]' (or libtpu); no TPU is needed")
    options = dict(generation.options)
    if sides == (1, 1):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--compile_for={topology}: the TPU compiler says: {_first_line(error)}") from error
    return list(found)


@dataclass(frozen=True)
class Plan:
    """What compiling told; bytes, operations and seconds are those of one chip."""

    config: Config
    topology: str
    chips: int
    hosts: int
    parameters: int  # numbers, of the whole network
    dtype: str  # of the computation
    state: int  # bytes of parameters, statistics and optimiser state
    batch: int  # bytes of images, labels and what augmentation needs
    arguments: int  # bytes of both, as the chip lays them out
    temporaries: int  # bytes: activations, gradients
    outputs: int  # bytes of results that don't take over an argument's memory
    code: int  # bytes of the program
    costs: hlo.Costs
    seconds: float  # that the compiler took

    @property
    def generation(self) -> Generation:
        """Returns what the chip is."""
        return parse(self.topology)[0]

    @property
    def total(self) -> int:
        """Returns the bytes that a chip needs."""
        return self.arguments + self.temporaries + self.outputs + self.code

    @property
    def fits(self) -> bool:
        """Says whether that is there."""
        return self.total <= self.generation.memory * GIB

    @property
    def arithmetic_seconds(self) -> float:
        """Returns the least time of a step's arithmetic, at the chip's peak."""
        return self.costs.operations / (self.generation.speed * 1e12)

    @property
    def memory_seconds(self) -> float:
        """Returns the least time of a step's memory traffic, at the chip's peak."""
        return self.costs.memory / (self.generation.bandwidth * 1e9)

    @property
    def images_per_second(self) -> float:
        """Returns the most images a second of all chips: no step is faster than its arithmetic or its traffic."""
        return self.config.train.batch_size / max(self.arithmetic_seconds, self.memory_seconds)

    def text(self) -> str:
        """Returns all that in lines for a person."""
        config, chip, costs = self.config, self.generation, self.costs
        each = "cut over the chips" if config.train.shard_params else "a whole copy on each chip"
        limit = "arithmetic" if self.arithmetic_seconds > self.memory_seconds else "memory traffic"
        slowest = max(self.arithmetic_seconds, self.memory_seconds)
        advice = _advice(config, self.topology, self.chips, self.state)
        rows = [
            ("chips", f"{self.chips} {self.topology.partition(':')[0]} on {_count(self.hosts, 'host')}"),
            ("network", f"{config.model.name}, {self.parameters:,} parameters, computes in {self.dtype}"),
            (
                "batch",
                f"{config.train.batch_size} images of {config.input.size[0]} x {config.input.size[1]}, "
                f"{config.train.batch_size / self.chips:g} a chip"
                + (f", in {config.train.accumulate} parts" if config.train.accumulate > 1 else ""),
            ),
            (
                "memory",
                f"{self.total / GIB:.2f} of {chip.memory} GiB a chip: "
                f"{'it fits' if self.fits else f'it does not fit. Try {advice}'}",
            ),
            ("", f"{_size(self.state)} parameters, statistics and optimiser state, {each}"),
            ("", f"{_size(self.batch)} batch"),
            ("", f"{_size(max(self.arguments - self.state - self.batch, 0))} lost to their layout on the chip"),
            ("", f"{_size(self.temporaries)} temporaries: activations, gradients"),
            ("", f"{_size(self.outputs)} results; the new state takes the old one's place"),
            ("", f"{_size(self.code)} program"),
            (
                "arithmetic",
                f"{costs.operations / 1e9:,.1f} GFLOP a step and chip: "
                f"{_milliseconds(self.arithmetic_seconds)} at {chip.speed:g} TFLOP/s",
            ),
            (
                "traffic",
                f"{costs.memory / 1e9:.3g} GB a step and chip to and from its memory: "
                f"{_milliseconds(self.memory_seconds)} at {chip.bandwidth:g} GB/s",
            ),
            (
                "so",
                f"a step takes at least {_milliseconds(slowest)} ({limit}): at most {self.images_per_second:,.0f} "
                "images/s. Collectives, and reading the images, may take longer",
            ),
        ]
        for kind, moved in sorted(costs.collectives.items()):
            parts = ", ".join(f"{size / 1e6:,.1f} MB of {name}" for name, size in sorted(moved.kinds.items()))
            rows.append((kind, f"{moved.count:,} a step on each chip: {parts}"))
        if not costs.collectives:
            rows.append(("collectives", "none"))
        rows.append(("compiled", f"in {self.seconds:.0f} s by libtpu {_version()}; nothing was run"))
        return "\n".join(f"{name:<20}{value}" for name, value in rows)


def compile_for(config: Config, topology: str, data_dir: Path) -> Plan:
    """Compiles the training step of `config` for the chips of `topology`; takes minutes and some GB of memory.

    Args:
      config: of a run; `train.batch_size` is the global one.
      topology: generation and shape, such as "v5e:4x4".
      data_dir: where data sets lie. One that isn't prepared there is stood in for, if its classes are known.

    Raises ValueError for a topology that isn't there, a missing compiler, a configuration that doesn't go with it,
    and a step that doesn't fit into the chips' memory.
    """
    found = devices(topology)
    configs.check(config)
    config = load.resolve(config)
    if config.train.devices:
        raise ValueError(f"train.devices={config.train.devices}: --compile_for={topology} says how many; leave it 0")
    mesh = meshes.make_mesh(devices=found)
    data = _data(config, data_dir)
    if not len(data.records) > len(data.classes):
        steps = config.train.steps or STEPS
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    labels = data.columns["label"][pipeline.train_rows(data)]
    built = program.build(config, data.classes, labels, mesh)
    batch = batch_shapes(config, data, mesh)
    train_step: Any = built.train_step
    lowered = train_step.lower(built.abstract_state, batch)
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs = {"state": _bytes(built.abstract_state), "batch": _bytes(batch)}
        raise ValueError(does_not_fit(str(error), config, topology, len(found), needs)) from error
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    return Plan(
        config=config,
        topology=topology,
        chips=len(found),
        hosts=len({device.process_index for device in found}),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(built.abstract_state.params)),
        dtype=str(np.dtype(built.module.dtype)),
        state=_bytes(built.abstract_state),
        batch=_bytes(batch),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        costs=hlo.costs(compiled.as_text()),
        seconds=seconds,
    )


def batch_shapes(config: Config, data: Prepared, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and shardings of a global training batch, as the pipeline makes it."""
    one = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_size=1),
        data=dataclasses.replace(config.data, workers=0),
    )
    example = next(pipeline.train_batches(data, one, start=0))
    cut, size = meshes.batch_sharding(mesh), config.train.batch_size
    return {
        name: jax.ShapeDtypeStruct((size, *value.shape[1:]), value.dtype, sharding=cut)
        for name, value in example.items()
    }


def does_not_fit(said: str, config: Config, topology: str, chips: int, needs: dict[str, int]) -> str:
    """Returns the compiler's RESOURCE_EXHAUSTED in words: what is needed, what is there, what to try.

    `needs` has the bytes a chip of state and batch, which come on top of the temporaries that the compiler counts.
    """
    amount = r"([\d.]+[KMGT]?)"
    found = re.search(rf"required for HLO temporaries \({amount}\) exceeds available HBM \({amount}\)", said)
    used = re.search(rf"Used {amount} of {amount} hbm", said)
    if found:
        known = ", ".join(f"{_size(size)} of {name}" for name, size in needs.items())
        told = f"a chip would need {_gib(found[1])} for activations and gradients beside {known}, of {_gib(found[2])}"
    elif used:
        told = f"a chip would need {_gib(used[1])} of {_gib(used[2])}"
    else:
        told = f"the TPU compiler says: {said.splitlines()[0][:300]}"
    return (
        f"{config.model.name} with train.batch_size={config.train.batch_size} does not fit on {topology}: {told}. "
        f"Try {_advice(config, topology, chips, needs['state'])}"
    )


def _advice(config: Config, topology: str, chips: int, held: int) -> str:
    """Returns what may make a step fit, in the order of what it costs; `held` is a chip's bytes of state."""
    tips = program.smaller(config, chips)
    cut = "train.shard_params=True"
    if cut in tips:  # what it is worth depends on how much of the memory the state takes
        tips.remove(cut)
        tips = [cut, *tips] if held > WORTH_CUTTING * parse(topology)[0].memory * GIB else tips
    tips = [f"--set={tip}" for tip in tips]
    name, _, shape = topology.partition(":")
    shapes = GENERATIONS[name].shapes
    if shape in shapes[:-1]:
        tips.append(f"more chips (--compile_for={name}:{shapes[shapes.index(shape) + 1]})")
    return "; ".join(tips) or "a smaller network"


def _data(config: Config, data_dir: Path) -> Prepared:
    """Returns the data set, or one black image a class in its place."""
    name, _ = datasets.resolve(config.data.dataset)
    if prepared.is_prepared(prepared.directory(data_dir, name.full)):
        return datasets.open_dataset(config.data.dataset, data_dir, config.data.protocol)
    classes = datasets.classes(config.data.dataset)
    if not classes:
        raise ValueError(
            f"data set {name.full} is not prepared in {data_dir}, and only its images say which classes there are: "
            "prepare it, or take another one's place with --set=data.dataset=covidx_ct (three classes)"
        )
    black = io.BytesIO()
    Image.fromarray(np.zeros((BODY_SIDE, BODY_SIDE), np.uint8)).save(black, "PNG")
    record = {"image": black.getvalue(), "body": np.zeros(BODY_SIDE**2 // 8, np.uint8)}
    n = len(classes)
    return Prepared(
        name=name.full,
        classes=classes,
        columns={
            "file": np.full(n, "black.png"),
            "label": np.arange(n),
            "split": np.full(n, "train"),
            "split_study": np.full(n, "train"),
            "box": np.tile(np.asarray([0, 0, BODY_SIDE, BODY_SIDE], np.float32), (n, 1)),
        },
        records=[record] * n,
        window=None,
        fingerprint="",
        protocol=config.data.protocol,
        body=True,
    )


def _bytes(shapes: Any) -> int:
    """Returns the bytes of a tree of shapes on one device, as their shardings cut them."""
    return state.size(
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype), shapes)
    )


def _gib(amount: str) -> str:
    """Returns XLA's "19.40G" as "19.40 GiB"."""
    number, unit = re.fullmatch(r"([\d.]+)([KMGT]?)", amount).groups()  # type: ignore[union-attr]
    return f"{float(number) * 2.0 ** {'': -30, 'K': -20, 'M': -10, 'G': 0, 'T': 10}[unit]:.2f} GiB"


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300]


def _version() -> str:
    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return "of TPU_LIBRARY_PATH"
