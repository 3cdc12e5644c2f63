"""A small training run for tests: 12 steps of a network with BatchNorm on the data of `conftest.make_small_data`."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from random_weights import random_variables

from lungjax import models
from lungjax.config import Config, EvalConfig, HeadConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig, overrides
from lungjax.models import trees
from lungjax.runtime import mesh as meshes
from lungjax.runtime.checkpoint import newest
from lungjax.training import metrics_log, optim, program, setup

# Has what must survive an interruption: dropout, augmentation, mixing, a schedule, frozen and averaged parameters.
CONFIG = Config(
    name="small",
    input=InputSpec(size=(32, 32)),
    model=ModelConfig(name="small_bn", head=HeadConfig(dropout=0.2)),
    optim=OptimConfig(lr=3e-3, schedule="cosine", freeze="^stem_conv", ema=0.2),
    train=TrainConfig(batch_size=8, steps=12, eval_steps=4, save_steps=3, log_steps=1, monitor="slice.accuracy"),
    eval=EvalConfig(batch_size=8, examples=1, draws=0),
)
CONFIG = overrides.override(CONFIG, "augment=xray_covid_online")
CONFIG = overrides.override(CONFIG, "augment.cutmix=1")
PLAIN = overrides.override(CONFIG, "augment=none")
BUILD, PROGRAMS = program.build, dict[tuple, program.Program]()


def changed(config: Config, *assignments: str) -> Config:
    for assignment in assignments:
        config = overrides.override(config, assignment)
    return config


def patched(patch: pytest.MonkeyPatch, data) -> None:
    """Makes runs find the small network and open `data`, share programs, and omit the figures of their reports."""
    patch.setitem(models.MODELS, "small_bn", conftest.small_bn())
    patch.setattr(program, "build", shared_program)
    patch.setattr(setup, "open_dataset", lambda *_, **__: data)
    conftest.without_pictures(patch)


def change_batches(patch: pytest.MonkeyPatch, change) -> None:
    """Applies `change(step, batch)` to every training batch."""
    device_batches = setup.Run.batches

    def batches(run, start):
        for step, batch in enumerate(device_batches(run, start), start + 1):
            yield change(step, batch)

    patch.setattr(setup.Run, "batches", batches)


def interrupt(patch: pytest.MonkeyPatch, number: int, at: int) -> None:
    """Sends this process a signal at step `at`."""

    def change(step, batch):
        if step == at:
            os.kill(os.getpid(), number)
        return batch

    change_batches(patch, change)


def last_state(workdir: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of the last state by path, read without lungjax."""
    path = workdir.absolute() / "checkpoints/last" / str(newest(workdir, "last"))
    leaves = jax.tree_util.tree_leaves_with_path(ocp.load_checkpointables(path)["state"])
    return {jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(leaf) for key, leaf in leaves}


def best_variables(workdir: Path) -> dict:
    """Returns the best parameters and statistics, read without lungjax."""
    path = workdir.absolute() / "checkpoints/best" / str(newest(workdir, "best"))
    return ocp.load_checkpointables(path)["variables"]


def assert_same_end(a: Path, b: Path) -> None:
    """Asserts that the last state, best step and losses of two runs are bit-identical."""
    states = [last_state(workdir) for workdir in (a, b)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    for path, array in states[0].items():
        np.testing.assert_array_equal(states[1][path], array, err_msg=path)
    assert newest(a, "best") == newest(b, "best")
    rows = [metrics_log.read(workdir / "metrics.jsonl") for workdir in (a, b)]
    losses = [[(row["step"], row.get("train.loss"), row.get("val.slice.loss")) for row in log] for log in rows]
    assert losses[0] == losses[1]


def start(out: Path, devices: int, *arguments: str, new_group: bool = False, **environment: str) -> subprocess.Popen:
    """Starts run_small.py in its own process, on a number of CPU devices."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, str(Path(__file__).with_name("run_small.py")), str(out), *arguments]
    pipes = {} if new_group else {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, start_new_session=new_group, **pipes)


def start_hosts(out: Path, *arguments: str) -> list[subprocess.Popen]:
    """Starts one run on several hosts with two devices each; `arguments` has one string per host."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        start(out, 2, f"--hosts={len(arguments)}", f"--host={i}", f"--port={port}", *own.split())
        for i, own in enumerate(arguments)
    ]


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """Waits for processes to end with `code`; returns the stderr of each."""
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return [errors for _, errors in outputs]


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    """Returns once metrics.jsonl has a row for `step`."""
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        rows = metrics_log.read(workdir / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}; exit code {process.poll()}")


def group_ends(group: int) -> bool:
    """Waits up to 30 seconds for all processes of a group to end; returns whether they did."""
    deadline = time.time() + 30
    while time.time() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def batch_of(config: Config, n: int = 8) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 255, (n, *config.input.size, 1), dtype=np.uint8)
    labels = jnp.asarray(rng.integers(0, 3, n), jnp.int32)
    return {"image": jnp.asarray(images), "label": labels, "place": jnp.arange(n, dtype=jnp.uint32)}


def shared_program(config: Config, classes: tuple[str, ...], labels: np.ndarray, mesh) -> program.Program:
    """Returns one program per network, schedule and step, so that a process traces and compiles it only once."""
    steps, eval_steps = program.step_counts(config, len(labels))
    train = replace(config.train, steps=0, save_steps=0, eval_steps=0, log_steps=1, patience=0, keep="best")
    scheduled, network = steps * (config.optim.schedule != "constant"), models.MODELS.get(config.model.name)
    key = (replace(config, train=train), scheduled, network, classes, labels.tobytes(), mesh)  # some replace networks
    built = PROGRAMS.get(key) or PROGRAMS.setdefault(key, BUILD(config, classes, labels, mesh))
    return replace(built, steps=steps, eval_steps=eval_steps)


def build(config: Config) -> program.Program:
    return shared_program(config, ("left", "middle", "right"), np.arange(36) % 3, meshes.make_mesh())


def first_state(config: Config):
    """Returns a state with random weights and statistics."""
    built = build(config)
    variables = random_variables(built.module, (*config.input.size, config.input.network_channels))
    return built.new_state({path: leaf for tree in variables.values() for path, leaf in trees.flatten(tree).items()})


@cache
def one_step(config: Config):
    """Returns the states before and after one step from random weights, and its metrics, as numpy arrays."""
    first = first_state(config)
    before = jax.device_get(first)
    after, metrics = build(config).train_step(first, batch_of(config))
    return before, jax.device_get(after), jax.device_get(metrics)


def frozen_paths(config: Config) -> frozenset[str]:
    return optim.frozen_paths(config.optim, build(config).abstract_state.params)


def different(before, after) -> set[str]:
    """Returns the paths of the leaves that are not bit-identical."""
    before, after = trees.flatten(before), trees.flatten(after)
    assert before.keys() == after.keys()
    return {path for path in before if not np.array_equal(before[path], after[path])}


def assert_close(a, b, **tolerance) -> None:
    a, b = trees.flatten(a), trees.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], err_msg=path, **tolerance)
