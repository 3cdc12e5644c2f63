"""One code path for one device, several, and several hosts: the same losses, data and predictions."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_bn

from lungjax import config as configs
from lungjax import models
from lungjax.config import Config, InputSpec, ModelConfig, OptimConfig, TrainConfig, overrides
from lungjax.runtime import distributed
from lungjax.runtime import mesh as meshes
from lungjax.runtime.checkpoint import newest
from lungjax.training import metrics_log, program

HERE = Path(__file__).parents[1]


def start(out: Path, devices: int, *arguments: str, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, str(HERE / "run_small.py"), str(out), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_hosts(out: Path, *each: str) -> list[subprocess.Popen]:
    """Two processes of two devices; `each` are the arguments of a host."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(out, 2, "--hosts=2", f"--host={i}", f"--port={port}", *extra.split()) for i, extra in enumerate(each)]


def start_in_slurm(out: Path, *each: str) -> list[subprocess.Popen]:
    """The same without addresses: two tasks as SLURM would start them."""
    with socket.socket() as free:
        for job in range(1000, 2000):
            with contextlib.suppress(OSError):
                free.bind(("localhost", 61440 + job))  # the port that jax derives from the job's number
                break
    cluster = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    return [
        start(out, 2, *extra.split(), **cluster, SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
        for i, extra in enumerate(each)
    ]


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return [err for _, err in said]


def test_two_hosts_of_two_devices_are_one_of_four_stop_together_and_go_on_alone(tmp_path):
    fields = "train.steps=8 train.eval_steps=4 train.batch_size=8 train.shard_params=True"
    one = start(tmp_path / "one", 4, *fields.split())
    two = start_hosts(tmp_path / "two", *[f"{fields} --pause=0.15"] * 2)
    deadline = time.time() + 120
    while len(metrics_log.read(tmp_path / "two/metrics.jsonl")) < 2 and time.time() < deadline:
        time.sleep(0.01)
    two[1].send_signal(signal.SIGTERM)  # one of them, and both save and end
    finish(two, code=128 + signal.SIGTERM)
    stopped = newest(tmp_path / "two", "last")
    assert stopped is not None and 2 <= stopped < 8
    finish([one, *start_hosts(tmp_path / "two", fields, fields)])
    found = {name: np.load(tmp_path / f"{name}.npz") for name in ("one", "two")}
    assert found["one"]["devices"] == found["two"]["devices"] == 4
    losses = found["one"]["losses"]
    assert len(losses) == 8 and len(set(losses)) == 8
    np.testing.assert_allclose(found["two"]["losses"], losses, rtol=1e-6)
    np.testing.assert_allclose(found["two"]["probabilities"], found["one"]["probabilities"], atol=1e-6)
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert [report["facts"]["hosts"] for report in reports] == [1, 2]
    assert reports[0]["test"]["slice"]["confusion"] == reports[1]["test"]["slice"]["confusion"]
    # What two hosts wrote, one host of one device goes on with, over the same data: the end of step 10 is that of
    # the run that never moved.
    for name in ("one", "two"):
        config = tmp_path / name / "config.json"
        config.write_text(config.read_text().replace('"steps": 8', '"steps": 10'))
    fields = fields.replace("steps=8", "steps=10")
    finish([start(tmp_path / "one", 4, *fields.split()), start(tmp_path / "two", 1, *fields.split())])
    ends = [metrics_log.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    ends = [[row["train.loss"] for row in rows if "train.loss" in row] for rows in ends]
    assert len(ends[0]) == 10
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-5)


def test_hosts_that_differ_or_fail_end_all_with_the_reason(tmp_path):
    differing = start_in_slurm(tmp_path / "run", "", "optim.lr=0.5")
    failing = start_hosts(tmp_path / "run", "", "train.monitor=slice.acuracy")
    for said in finish(differing, code=2):
        assert "the hosts differ in the configuration (host 0 against 1)" in said
    for said in finish(failing, code=2):
        assert "host 1 of 2: train.monitor='slice.acuracy'" in said
    assert not (tmp_path / "run").exists()


def test_a_host_that_fails_alone_while_training_ends_at_once_and_holds_nobody(tmp_path):
    """A usual exit waits five minutes for the others, which wait for this host's part of the step."""
    begun = time.time()
    errors = finish(start_hosts(tmp_path / "run", "train.steps=50", "train.steps=50 --fail_at=4"), code=2)
    assert time.time() - begun < 120
    assert "lungjax: host 1 of 2: 7.png can't be read" in errors[1] and "host 0 of 2" in errors[0]


def test_each_device_alone_and_parameters_cut_make_the_global_step(tmp_path):
    """On 8 devices, with frozen BatchNorm and without dropout all three are the same step; see run_steps.py."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(HERE / "run_steps.py"), str(tmp_path / "steps.npz")]
    subprocess.run(command, env=env, check=True)
    found = np.load(tmp_path / "steps.npz")
    paths = [name.removeprefix("global/") for name in found if name.startswith("global/")]
    assert len(paths) > 5
    for path in paths:
        for other in ("per_device", "cut"):
            np.testing.assert_allclose(found[f"{other}/{path}"], found[f"global/{path}"], atol=2e-7, err_msg=path)
    assert np.abs(found["global/stage2_conv/kernel"] - found["first/stage2_conv/kernel"]).max() > 1e-3
    # With live statistics a device's own ones make another step; here is why the two are not the same thing.
    assert np.abs(found["live_per_device/stage2_conv/kernel"] - found["live/stage2_conv/kernel"]).max() > 1e-4
    assert found["bytes_cut"] < 0.3 * found["bytes_whole"]
    np.testing.assert_allclose(found["norm/spread"], found["norm/alone"], rtol=2e-5, atol=2e-6)


def test_a_mesh_that_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"train.devices=3: there are 1; allowed is 1 to that"):
        meshes.make_mesh(3)
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    with pytest.raises(ValueError, match="batch_size=12 can't be cut over 8 devices; set it to 8 or 16"):
        meshes.check_batch(12, mesh, "train.batch_size")
    with pytest.raises(ValueError, match="set it to 8$"):
        meshes.check_batch(4, mesh, "train.batch_size")
    with pytest.raises(ValueError, match="over 8 devices in train.accumulate=3 parts; set it to 48 or 72"):
        meshes.check_batch(64, mesh, "train.batch_size", 3)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="2 hosts work together with all their devices"):
        meshes.make_mesh(1, devices=[jax.devices()[0]] * 2)


def test_what_to_try_when_memory_is_short_is_allowed():
    """Each tip, taken alone, passes the checks of the configuration and of the mesh."""
    for assignments in ([], ["train.sync_batch_norm=False"], ["train.accumulate=3", "train.remat=True"]):
        config = Config(train=TrainConfig(batch_size=24))
        for assignment in assignments:
            config = overrides.override(config, assignment)
        tips = program.smaller(config, 4)
        assert tips
        for tip in tips:
            tried = overrides.override(config, tip)
            configs.check(tried)
            mesh = jax.sharding.AbstractMesh((4,), ("data",))
            meshes.check_batch(tried.train.batch_size, mesh, "train.batch_size", tried.train.accumulate)


def test_large_arrays_are_cut_along_their_longest_even_axis():
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    shapes = {"wide": (3, 3, 64, 4096), "odd": (3, 3, 1001, 257), "small": (8, 8), "scalar": ()}
    cut = meshes.state_sharding({k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}, mesh, cut=True)
    assert {k: tuple(v.spec) for k, v in cut.items()} == {
        "wide": (None, None, None, "data"), "odd": (), "small": (), "scalar": (),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("localhost:1", 2, None), "give all three"),
        (("localhost:1", 2, 2), "allowed is 0 to 1"),
        ((None, None, None), "did not come together"),
    ],
)
def test_hosts_that_cannot_be_found_are_explained(arguments, words):
    with pytest.raises(ValueError, match=words):
        distributed.start(*arguments)


def test_accelerators_compute_in_bfloat16_and_keep_float32(monkeypatch, small_data):
    monkeypatch.setitem(models.MODELS, "small_bn", small_bn())
    assert models.build(ModelConfig(), 3).dtype == jnp.float32
    assert models.build(ModelConfig(), 3, platform="tpu").dtype == jnp.bfloat16
    assert models.build(ModelConfig(dtype="float32"), 3, platform="gpu").dtype == jnp.float32
    config = Config(
        input=InputSpec(size=(32, 32)),
        model=ModelConfig(name="small_bn", dtype="bfloat16"),
        optim=OptimConfig(),
        train=TrainConfig(batch_size=8, steps=3),
    )
    labels = small_data.columns["label"][:36]
    compiled = program.build(
        overrides.override(config, "input.mean=0.5"), small_data.classes, labels, meshes.make_mesh()
    )
    wide = [leaf for leaf in jax.tree.leaves(compiled.abstract_state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in wide} == {jnp.dtype("float32")}
    batch = {"image": np.zeros((8, 32, 32, 1), np.uint8), "label": np.zeros(8, np.int32)}
    text = compiled.train_step.lower(compiled.abstract_state, batch).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line or "dot_general" in line]
    assert any("bf16" in line for line in convolutions)
