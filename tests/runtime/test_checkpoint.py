import errno
import os
import shutil
import tempfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from orbax.checkpoint import v1 as ocp

from lungjax.config import Config, InputSpec, ModelConfig, overrides
from lungjax.runtime import checkpoint
from lungjax.runtime.checkpoint import Checkpoints, newest, restore_best
from lungjax.training import state
from lungjax.weights import load


class OneLayer(nn.Module):
    """The network whose state `make` gives."""

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(4, use_bias=False, name="dense")(images.mean((1, 2)))


def make(step: int, value: float | None = None, shape: tuple[int, int] = (3, 4), name: str = "dense"):
    kernel = jnp.full(shape, float(step) if value is None else value)
    return state.TrainState(
        step=jnp.asarray(step, jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params={name: {"kernel": kernel}},
        batch_stats={},
        opt_state=({name: {"kernel": kernel * 2}}, {}),
    )


def like(sharding=None, **changes):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make(0, **changes))


def kernel(found) -> float:
    """The one value of a state's or variables' kernel."""
    params = found["params"] if isinstance(found, dict) else found.params
    (value,) = np.unique(params["dense"]["kernel"])
    return float(value)


def folders(workdir, kind: str) -> list[str]:
    return sorted(p.name for p in (workdir / "checkpoints" / kind).iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with last/4, last/8, best/4 and best/8; to be copied before it is changed."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir) as checkpoints:
        for step in (4, 8):
            checkpoints.save(make(step), {"best": 0.5, "best_step": step}, best=True)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def test_the_newest_state_comes_back_with_its_very_progress_and_two_are_kept(tmp_path):
    progress = {"best": 0.1 + 0.2, "best_step": 2**30 + 1, "waited": 0, "tiny": 5e-324, "none": float("nan")}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(like()) is None
        for step in (1, 2, 3):
            checkpoints.save(make(step), progress, best=step != 2)
            progress["waited"] += 1  # after the save began, which must not see it
    with Checkpoints(tmp_path) as checkpoints:
        found, restored = checkpoints.restore(like())
    assert int(found.step) == 3 and kernel(found) == 3
    np.testing.assert_array_equal(found.opt_state[0]["dense"]["kernel"], 6.0)
    assert isinstance(found.step, jax.Array) and found.step.dtype == jnp.int32
    np.testing.assert_equal(restored, progress | {"waited": 2})
    assert (folders(tmp_path, "last"), folders(tmp_path, "best")) == (["2", "3"], ["1", "3"])
    best, step = restore_best(tmp_path, like().variables)
    assert step == newest(tmp_path, "best") == 3 and kernel(best) == 3


def test_what_is_saved_is_the_state_of_the_call_though_the_next_steps_overwrite_it(tmp_path):
    train_step = jax.jit(
        lambda s: s.replace(step=s.step + 1, params=jax.tree.map(lambda x: x + 1, s.params)), donate_argnums=0
    )
    current = train_step(make(0, shape=(1024, 1024)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(current, {}, best=True)
        for _ in range(20):
            current = train_step(current)
        jax.block_until_ready(current)
        checkpoints.wait()
        found, _ = checkpoints.restore(like(shape=(1024, 1024)))
    assert int(found.step) == 1 and kernel(found) == 1
    assert kernel(restore_best(tmp_path)[0]) == 1


def test_save_returns_before_the_files_are_written_and_the_next_one_waits(tmp_path, monkeypatch):
    commit, gate, order = checkpoint._commit, threading.Event(), []

    def slow(folder, step):
        assert gate.wait(60)
        order.append((folder.name, step))
        commit(folder, step)

    monkeypatch.setattr(checkpoint, "_commit", slow)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(1), {}, best=True)
        assert newest(tmp_path, "last") is None
        second = threading.Thread(target=lambda: checkpoints.save(make(2), {}))
        second.start()
        second.join(0.2)
        assert second.is_alive() and not order
        gate.set()
        second.join(60)
    # A state whose progress speaks of a best must not be there before that best is.
    assert order == [("best", 1), ("last", 1), ("last", 2)] and folder_steps(tmp_path) == [1, 2]


def folder_steps(workdir):
    return sorted(int(name) for name in folders(workdir, "last"))


def test_saving_a_step_again_replaces_it(workdir):
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(make(8, value=0.0), {}, best=True)
        found, _ = checkpoints.restore(like())
    assert kernel(found) == 0 and folder_steps(workdir) == [4, 8] and kernel(restore_best(workdir)[0]) == 0


def largest(folder):
    """The file that holds most of the values."""
    return max(folder.glob("*/ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)


def flip(folder):
    path = largest(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return f"the checksum of {path.relative_to(folder)} is wrong"


def truncate(folder):
    path = largest(folder)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    return f"{path.relative_to(folder)} has {size - 1} bytes instead of {size}"


def lose_a_file(folder):
    path = largest(folder)
    path.unlink()
    return f"{path.relative_to(folder)} is missing"


def lose_the_checksums(folder):
    (folder / "checksums.json").unlink()
    return "checksums.json is missing"


def garble_the_checksums(folder):
    (folder / "checksums.json").write_text('["state"]')
    return "checksums.json can't be read"


@pytest.mark.parametrize("damage", [flip, truncate, lose_a_file, lose_the_checksums, garble_the_checksums])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(workdir, capsys, damage):
    last, best = workdir / "checkpoints/last", workdir / "checkpoints/best"
    why = damage(last / "8")
    with Checkpoints(workdir) as checkpoints:
        found, progress = checkpoints.restore(like())
        assert int(found.step) == progress["best_step"] == kernel(found) == 4
        # Nothing is lost, and the best of a future that has not come yet doesn't count.
        assert folders(workdir, "last") == ["4", "8.damaged"] and folders(workdir, "best") == ["4"]
        assert capsys.readouterr().out == f"{last / '8'} is damaged ({why}): taking {last / '4'} instead\n"
        checkpoints.save(make(8), {}, best=True)
        assert int(checkpoints.restore(like())[0].step) == 8
    assert folders(workdir, "last") == ["4", "8", "8.damaged"] and capsys.readouterr().out == ""

    why = damage(best / "8")
    found, step = restore_best(workdir)
    assert step == kernel(found) == 4 and folders(workdir, "best") == ["4", "8"]  # it only reads
    assert capsys.readouterr().out == f"{best / '8'} is damaged ({why}): taking {best / '4'} instead\n"


def test_if_none_is_good_nothing_is_touched_and_no_fresh_start_made(workdir):
    for kind in ("last", "best"):
        for step in "48":
            flip(workdir / "checkpoints" / kind / step)
    for _ in range(2):
        with (
            Checkpoints(workdir) as checkpoints,
            pytest.raises(ValueError, match=r"no checkpoint there is good \(8: the checksum.*; 4: .*Put back a copy"),
        ):
            checkpoints.restore(like())
    with pytest.raises(ValueError, match="best: no checkpoint there is good"):
        restore_best(workdir)
    assert folders(workdir, "last") == folders(workdir, "best") == ["4", "8"]


def test_the_last_best_is_never_dropped(workdir):
    # Both bests are newer than the state that is left, which has seen a best before: one of them is better than none.
    for path, to in (("last/4", "last/2"), ("last/8", "gone")):
        (workdir / "checkpoints" / path).rename(workdir / "checkpoints" / to)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.restore(like())
        assert folders(workdir, "best") == ["4"]
        checkpoints.save(make(3), {"best_step": 0})
        checkpoints.wait()
        checkpoints.restore(like())  # this state has seen none: it will come
    assert folders(workdir, "best") == []


@pytest.mark.parametrize("moment", ["orbax writes", "checksums", "before the name", "old set aside", "old deleted"])
def test_killed_at_any_moment_of_saving_a_good_one_is_left(workdir, moment, monkeypatch):
    """Each moment is what is on the disk if the process ends there, while step 8 is saved again and then 12."""
    again = 8 if moment.startswith("old") else 12
    rename = type(workdir).rename

    def stop(*arguments, **more):
        raise KeyboardInterrupt

    def stopping_rename(path, target):
        return stop() if path.name == f"{again}.partial" else rename(path, target)

    with monkeypatch.context() as patch:
        if moment in ("orbax writes", "checksums"):
            patch.setattr(checkpoint, "_commit" if moment == "orbax writes" else "_checksum", stop)
        elif moment == "old deleted":
            patch.setattr(checkpoint, "_clear", lambda folder: stop() if (folder / "8.old").exists() else None)
        else:
            patch.setattr(type(workdir), "rename", stopping_rename)
        with pytest.raises(KeyboardInterrupt), Checkpoints(workdir) as checkpoints:
            checkpoints.save(make(again, value=80.0), {})
            checkpoints.wait()
    assert newest(workdir, "last") == 8 and len(folders(workdir, "last")) == 3  # what was half done is still there
    (workdir / "checkpoints/last/13.partial.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(workdir) as checkpoints:
        found, _ = checkpoints.restore(like())
        assert kernel(found) == (80 if moment == "old deleted" else 8)
        checkpoints.save(make(12), {})
    assert folder_steps(workdir) == [8, 12]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (3, 5)}, r"params/dense/kernel: saved float32 \[3, 4\], here float32 \[3, 5\]"),
        (
            {"name": "head"},
            r"params/head/kernel: saved nothing, here float32 \[3, 4\](.|\n)*params/dense/kernel: saved",
        ),
    ],
)
def test_the_state_of_another_network_is_refused_and_left(workdir, changes, words):
    flip(workdir / "checkpoints/last/8")
    with Checkpoints(workdir) as checkpoints, pytest.raises(ValueError, match=rf"another network:\n(.|\n)*{words}"):
        checkpoints.restore(like(**changes))
    with pytest.raises(ValueError, match=rf"best/8 is of another network:\n(.|\n)*{words}"):
        restore_best(workdir, like(**changes).variables)
    assert folders(workdir, "last") == folders(workdir, "best") == ["4", "8"]


FULL = (errno.ENOSPC, "the disk is full; .*intact: free some space")
READ_ONLY = (errno.EROFS, "the disk is read-only; .*intact: make it writable")


@pytest.mark.parametrize(
    ("at", "code", "words"), [("save", *FULL), ("wait", *READ_ONLY), ("exit", *FULL), ("in flight", *FULL)]
)
def test_a_save_that_failed_in_the_background_is_told_next(workdir, monkeypatch, at, code, words):
    def fail(*arguments):
        raise RuntimeError("wrapped") from OSError(code, os.strerror(code))

    told = pytest.raises(ValueError, match=f"checkpoint of step 12 to .*{words}")
    monkeypatch.setattr(checkpoint, "_seal", fail)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(make(12), {}, best=True)
    if at == "in flight":
        with pytest.raises(KeyError) as raised, checkpoints:
            raise KeyError("the loop's own")
        assert "step 12" in raised.value.__notes__[0]
    elif at == "exit":
        with told, checkpoints:
            pass
    else:
        with told:
            checkpoints.wait() if at == "wait" else checkpoints.save(make(16), {})
        assert int(checkpoints.restore(like())[0].step) == 8
    monkeypatch.undo()
    with checkpoints if at == "wait" else Checkpoints(workdir) as checkpoints:
        checkpoints.save(make(12), {})
    assert folder_steps(workdir) == [8, 12] and folders(workdir, "best") == ["4", "8"]


def test_a_disk_that_has_no_room_is_told_at_once(workdir, monkeypatch):
    with monkeypatch.context() as patch, Checkpoints(workdir) as checkpoints:
        patch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        with pytest.raises(ValueError, match="step 12.*0 MiB are free.*intact"):
            checkpoints.save(make(12), {})
    assert folder_steps(workdir) == [4, 8]


def test_a_folder_that_can_not_be_written_is_told_when_opened(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"can't be written \(Read-only file system\); choose another --workdir"):
        Checkpoints(tmp_path / "run")
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(ValueError, match="can't be written .*choose another --workdir"):
        Checkpoints(tmp_path)


def test_a_source_without_weights_is_named(tmp_path):
    assert load.parse(ModelConfig(weights="none")) == load.Source()
    with pytest.raises(ValueError, match="model.weights='imagenett': allowed are none.*run:WORKDIR"):
        load.parse(ModelConfig(weights="imagenett"))
    with pytest.raises(ValueError, match="no trained run"):
        load.parse(ModelConfig(weights=f"run:{tmp_path}"))
    with pytest.raises(ValueError, match="no best weights there yet"):
        restore_best(tmp_path)


def test_the_best_without_a_layout_comes_as_numpy_and_reading_it_leaves_a_save_in_progress_alone(workdir):
    unfinished = workdir / "checkpoints/best/12.partial.orbax-checkpoint-tmp"
    unfinished.mkdir()
    found, step = restore_best(workdir)
    assert isinstance(found["params"]["dense"]["kernel"], np.ndarray) and found["batch_stats"] == {}
    assert step == kernel(found) == 8
    config = Config(input=InputSpec(size=(8, 8), channels=3), model=ModelConfig(weights=f"run:{workdir}"))
    (workdir / "config.json").write_text(overrides.to_json(config))
    start = load.leaves(config, OneLayer())
    assert list(start) == ["dense/kernel"]
    np.testing.assert_array_equal(start["dense/kernel"], 8.0)
    assert unfinished.is_dir()


def test_orbax_alone_reads_what_was_saved(saved):
    found = ocp.load_checkpointables((saved / "checkpoints/last/8").absolute())
    np.testing.assert_array_equal(found["state"]["params"]["dense"]["kernel"], 8.0)
