"""One code path for one device, several devices and several hosts."""

import contextlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs as runs
from conftest import make_small_data

from lungjax import config as configs
from lungjax import models
from lungjax.config import Config, ModelConfig, TrainConfig
from lungjax.data import pipeline
from lungjax.evaluation import predictions
from lungjax.models import trees
from lungjax.models.transfusion import Transfusion
from lungjax.runtime import distributed
from lungjax.runtime import mesh as meshes
from lungjax.runtime.checkpoint import newest
from lungjax.training import metrics_log, program, train

pytestmark = pytest.mark.usefixtures("small_network")
HOSTS = "train.steps=8 train.shard_params=True train.keep=last optim.schedule=constant optim.name=sgd optim.lr=0.01"
MESH = jax.sharding.AbstractMesh((8,), ("data",))
FROZEN = "optim.frozen_batch_norm=frozen"
MODES = {
    "global": [],
    "sharded": ["train.shard_params=True"],
    "per_device": ["train.sync_batch_norm=False"],
    "frozen_per_device": [FROZEN, "train.sync_batch_norm=False"],
    "frozen": [FROZEN],
}
CONFIG = runs.changed(
    runs.PLAIN, "model.name=wide", "model.head.dropout=0", "optim.name=sgd", "optim.lr=0.1", "train.batch_size=16",
    "augment=ct_cov19_original",
)  # fmt: skip


def losses(workdir):
    return [row["train.loss"] for row in metrics_log.read(workdir / "metrics.jsonl") if "train.loss" in row]


def test_stop_and_resume_of_two_hosts(tmp_path):
    """SIGTERM to one host makes both save; the resumed run equals that of one device, which can also continue it."""
    hosts = runs.start_hosts(tmp_path / "two", *[f"{HOSTS} --pause=0.1"] * 2)
    runs.wait_for_step(tmp_path / "two", 2, hosts[0])
    hosts[1].send_signal(signal.SIGTERM)
    runs.finish(hosts, code=128 + signal.SIGTERM)
    assert 2 <= newest(tmp_path / "two", "last") < 8
    shutil.copytree(tmp_path / "two", tmp_path / "continued")
    runs.finish(runs.start_hosts(tmp_path / "two", HOSTS, HOSTS))
    for name in ("one", "continued"):
        train.run(runs.changed(runs.PLAIN, *HOSTS.split()), tmp_path / name, tmp_path)
    result = np.load(tmp_path / "two.npz")
    assert result["devices"] == 4 and len(set(losses(tmp_path / "one"))) == 8
    for other in (result["losses"], losses(tmp_path / "continued")):
        np.testing.assert_allclose(other, losses(tmp_path / "one"), rtol=1e-5)
    one = predictions.read(tmp_path / "one/predictions_test.csv").probabilities
    np.testing.assert_allclose(result["probabilities"], one, atol=1e-5)


def test_differing_and_failing_hosts_in_slurm(tmp_path):
    with socket.socket() as free:
        for job in range(1000, 2000):
            with contextlib.suppress(OSError):
                free.bind(("localhost", 61440 + job))  # jax derives this port from the job id
                break
    slurm = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    tasks = [{**slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    begin, own = time.time(), (["--differ=optim.lr=0.02"], ["--differ=optim.lr=0.5", "--fail_at=3"])
    hosts = [runs.start(tmp_path / "run", 2, *HOSTS.split(), *own[i], **tasks[i]) for i in range(2)]
    errors = runs.finish(hosts, code=2)
    assert time.time() - begin < 120  # a normal exit would wait five minutes for the other host, which waits for this
    assert "host 1 of 2: 7.png can't be read" in errors[1] and "host 0 of 2" in errors[0]
    assert all("in the configuration (host 0 against 1)" in text and "nothing is written" in text for text in errors)


@pytest.mark.slow
def test_failed_setup_on_one_host(tmp_path):
    for errors in runs.finish(runs.start_hosts(tmp_path / "run", "", "train.monitor=slice.acuracy"), code=2):
        assert "host 1 of 2: train.monitor='slice.acuracy'" in errors
    assert not (tmp_path / "run").exists()


def steps(mode):
    """Returns the parameters after two steps by path, and the bytes of the initial ones on the first device."""
    models.MODELS["wide"] = lambda: Transfusion(3, (32, 64))
    config = runs.changed(CONFIG, *MODES[mode])
    data, mesh = make_small_data(), meshes.make_mesh()
    built = program.build(config, data.classes, data.columns["label"][data.rows("train")], mesh)
    state = built.new_state({})
    arrays = {"bytes": sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))}
    for _, batch in zip(range(2), pipeline.train_batches(data, config, start=0), strict=False):
        state, _ = built.train_step(state, meshes.to_devices(batch, mesh))
    return arrays | {path: np.asarray(leaf) for path, leaf in trees.flatten(state.variables["params"]).items()}


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    """The arrays of `steps` on eight devices, by mode."""
    path = tmp_path_factory.mktemp("steps") / "steps.pickle"
    code = (
        "import pickle, sys, test_scale as test; "
        "pickle.dump({mode: test.steps(mode) for mode in test.MODES if mode != 'frozen'}, open(sys.argv[1], 'wb'))"
    )
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, path], env=env, check=True)
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize(("mode", "reference"), [("sharded", "global"), ("frozen_per_device", "frozen")])
def test_step_on_eight_devices_against_one(eight_devices, monkeypatch, mode, reference):
    monkeypatch.setitem(models.MODELS, "wide", None)
    one, eight = steps(reference), eight_devices[mode]
    assert eight.keys() == one.keys() and len(one) > 5
    if mode == "sharded":
        assert eight["bytes"] < 0.3 * one["bytes"]
    for name in one.keys() - {"bytes"}:
        np.testing.assert_allclose(eight[name], one[name], atol=5e-6, err_msg=name)
        if mode == "sharded":
            np.testing.assert_allclose(eight_devices["global"][name], one[name], atol=5e-6, err_msg=name)


def test_global_and_per_device_batch_statistics(eight_devices):
    live, own = (eight_devices[mode]["stage2_conv/kernel"] for mode in ("global", "per_device"))
    assert np.abs(live - own).max() > 1e-4


def test_mesh_errors(monkeypatch):
    with pytest.raises(ValueError, match="train.devices=3"):
        meshes.make_mesh(3)
    for size, parts, hint in ((12, 1, "set it to 8 or 16"), (4, 1, "set it to 8$"), (64, 3, "set it to 48 or 72")):
        with pytest.raises(ValueError, match=hint):
            meshes.check_batch(size, MESH, "train.batch_size", parts)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="2 hosts"):
        meshes.make_mesh(1, devices=[jax.devices()[0]] * 2)


def test_validity_of_memory_tips():
    for assignments in ([], ["train.sync_batch_norm=False"], ["train.accumulate=3", "train.remat=True"]):
        config = runs.changed(Config(train=TrainConfig(batch_size=24)), *assignments)
        tips = program.smaller(config, 4)
        assert tips
        for tip in tips:
            smaller = runs.changed(config, tip)
            configs.check(smaller)
            mesh = jax.sharding.AbstractMesh((4,), ("data",))
            meshes.check_batch(smaller.train.batch_size, mesh, "train.batch_size", smaller.train.accumulate)


def test_out_of_memory_advice():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.")
    advice = r"batch_size=8.*32, 32.*accumulate=2.*remat=True.*batch_size=4.*99 bytes"
    with pytest.raises(ValueError, match=advice), program.memory_advice(runs.CONFIG, 1):
        raise error
    with pytest.raises(jax.errors.JaxRuntimeError), program.memory_advice(runs.CONFIG, 1):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_unreachable_hosts():
    for arguments, hint in (
        (("localhost:1", 2, None), "give all three"),
        (("localhost:1", 2, 2), "expected 0 to 1"),
        ((None, None, None), "could not connect"),
    ):
        with pytest.raises(ValueError, match=hint):
            distributed.start(*arguments)


def test_bfloat16_on_accelerators():
    assert models.build(ModelConfig(), 3).dtype == jnp.float32
    assert models.build(ModelConfig(), 3, platform="tpu").dtype == jnp.bfloat16
    assert models.build(ModelConfig(dtype="float32"), 3, platform="gpu").dtype == jnp.float32
