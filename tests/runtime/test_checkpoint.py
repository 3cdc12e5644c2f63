"""Checkpoints: what is saved, retention, damage, kills and full disks."""

import errno
import json
import os
import shutil
import tempfile
import zlib
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from lungjax.runtime import checkpoint
from lungjax.runtime.checkpoint import Checkpoints, newest, restore_best
from lungjax.training import state


def make(step: int, value: float | None = None, shape: tuple[int, int] = (3, 4), name: str = "dense"):
    kernel = jnp.full(shape, float(step) if value is None else value)
    opt_state = ({name: {"kernel": kernel * 2}}, {})
    return state.TrainState(jnp.uint32(0), jnp.int32(step), jnp.int32(0), {name: {"kernel": kernel}}, {}, opt_state, {})


def abstract(**changes):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make(0, **changes))


SHAPES = jax.eval_shape(lambda: make(0)).variables  # without shardings


def kernel(tree) -> float:
    """The only value in the kernel of a state or of variables."""
    params = tree["params"] if isinstance(tree, dict) else tree.params
    (value,) = np.unique(params["dense"]["kernel"])
    return float(value)


def folders(workdir, kind: str) -> list[str]:
    return sorted(p.name for p in (workdir / "checkpoints" / kind).iterdir())


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A workdir with last/4, last/8, best/4 and best/8."""
    workdir = tmp_path_factory.mktemp("template")
    with Checkpoints(workdir) as checkpoints:
        for step in (4, 8):
            checkpoints.save(make(step), {"best": 0.5, "best_step": step}, best=True)
    return workdir


@pytest.fixture
def workdir(template, tmp_path):
    return shutil.copytree(template, tmp_path / "run")


def test_save_and_restore(tmp_path):
    progress = {"best": 0.1 + 0.2, "best_step": 2**30 + 1, "waited": 0, "tiny": 5e-324, "none": float("nan")}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract()) is None
        for step in (1, 2, 3):
            checkpoints.save(make(step), progress, best=step != 2)
            progress["waited"] += 1  # after the call, so it is not saved
    with Checkpoints(tmp_path) as checkpoints:
        restored, saved_progress = checkpoints.restore(abstract())
    assert int(restored.step) == 3 and kernel(restored) == 3
    np.testing.assert_array_equal(restored.opt_state[0]["dense"]["kernel"], 6.0)
    assert isinstance(restored.step, jax.Array) and restored.step.dtype == jnp.int32
    np.testing.assert_equal(saved_progress, progress | {"waited": 2})
    assert (folders(tmp_path, "last"), folders(tmp_path, "best")) == (["2", "3"], ["1", "3"])
    best, step = restore_best(tmp_path, abstract().variables)
    assert step == newest(tmp_path, "best") == 3 and kernel(best) == 3
    # Without lungjax, and without a layout.
    tree = ocp.load_checkpointables((tmp_path / "checkpoints/last/3").absolute())
    np.testing.assert_array_equal(tree["state"]["params"]["dense"]["kernel"], 3.0)
    assert isinstance(restore_best(tmp_path, SHAPES)[0]["params"]["dense"]["kernel"], np.ndarray)


def test_save_of_donated_buffers(tmp_path):
    train_step = jax.jit(
        lambda s: s.replace(step=s.step + 1, params=jax.tree.map(lambda x: x + 1, s.params)), donate_argnums=0
    )
    current = train_step(make(0, shape=(1024, 1024)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(current, {}, best=True)
        for _ in range(20):
            current = train_step(current)
        jax.block_until_ready(current)
        restored, _ = checkpoints.restore(abstract(shape=(1024, 1024)))
    best, _ = restore_best(tmp_path, abstract(shape=(1024, 1024)).variables)
    assert int(restored.step) == 1 and kernel(restored) == 1 and kernel(best) == 1


# Functions of a checkpoint's largest file, its content, and the checksums.
DAMAGE = {
    "flipped bit": lambda file, content, _: file.write_bytes(bytes([content[0] ^ 4]) + content[1:]),
    "truncated": lambda file, content, _: file.write_bytes(content[:-1]),
    "missing": lambda file, *_: file.unlink(),
    "no checksums": lambda _, __, checksums: checksums.unlink(),
    "garbled checksums": lambda _, __, checksums: checksums.write_text('["state"]'),
    "empty checksums": lambda _, __, checksums: checksums.write_text("{}"),
    "unlisted file": lambda _, content, checksums: (checksums.parent / "extra").write_bytes(content),
    "file outside": lambda file, content, checksums: checksums.write_text(
        json.dumps(json.loads(checksums.read_text()) | {str(file): [len(content), zlib.crc32(content)]})
    ),
}


def damage(path, kind: str) -> None:
    largest = max(path.glob("*/ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)
    DAMAGE[kind](largest, largest.read_bytes(), path / "checksums.json")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint(workdir, capsys, kind):
    last, best = workdir / "checkpoints/last", workdir / "checkpoints/best"
    damage(last / "8", kind)
    with Checkpoints(workdir) as checkpoints:
        restored, progress = checkpoints.restore(abstract())
        assert int(restored.step) == progress["best_step"] == kernel(restored) == 4
        # Nothing is lost, and the later best checkpoint does not count.
        assert folders(workdir, "last") == ["4", "8.damaged"] and folders(workdir, "best") == ["4"]
        assert f"{last / '8'} is damaged" in capsys.readouterr().out
        checkpoints.save(make(8), {}, best=True)
        assert int(checkpoints.restore(abstract())[0].step) == 8
    assert folders(workdir, "last") == ["4", "8", "8.damaged"] and capsys.readouterr().out == ""
    damage(best / "8", kind)
    variables, step = restore_best(workdir, SHAPES)
    assert step == kernel(variables) == 4 and folders(workdir, "best") == ["4", "8"]  # only reads
    assert f"{best / '8'} is damaged" in capsys.readouterr().out


def test_no_intact_checkpoint(workdir):
    for path in (workdir / "checkpoints").glob("*/*"):
        damage(path, "flipped bit")
    with Checkpoints(workdir) as checkpoints, pytest.raises(ValueError, match=r"no intact checkpoint \(8: .*; 4: "):
        checkpoints.restore(abstract())
    with pytest.raises(ValueError, match="best: no intact checkpoint"):
        restore_best(workdir, SHAPES)
    assert folders(workdir, "last") == folders(workdir, "best") == ["4", "8"]
    with pytest.raises(ValueError, match="no best weights"):
        restore_best(workdir / "other", SHAPES)


def test_preservation_of_the_last_best(workdir):
    # Both best checkpoints are later than the remaining state; one is kept because the state refers to a best step.
    for path, to in (("last/4", "last/2"), ("last/8", "other")):
        (workdir / "checkpoints" / path).rename(workdir / "checkpoints" / to)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.restore(abstract())
        assert folders(workdir, "best") == ["4"]
        checkpoints.save(make(3), {"best_step": 0})
        checkpoints.restore(abstract())  # this state refers to no best step
    assert folders(workdir, "best") == []


@pytest.mark.parametrize("again", [8, 12])
@pytest.mark.parametrize("call", range(1, 8))
def test_kill_while_saving(workdir, call, again, monkeypatch):
    """Stops at each rename, deletion or checksum while saving step 12 (or step 8 again), as a kill would."""
    calls = 0

    def killed(function):
        def counted(*arguments, **more):
            nonlocal calls
            calls += 1
            if calls >= call:
                raise KeyboardInterrupt
            return function(*arguments, **more)

        return counted

    with monkeypatch.context() as patch, Checkpoints(workdir) as checkpoints:
        path = type(workdir)
        patch.setattr(path, "rename", killed(path.rename))
        patch.setattr(shutil, "rmtree", killed(shutil.rmtree))
        patch.setattr(checkpoint, "_checksum", killed(checkpoint._checksum))
        try:
            checkpoints.save(make(again, value=80.0), {})
            checkpoints.wait()
        except KeyboardInterrupt:
            checkpoints._pending = None
    (workdir / "checkpoints/last/13.partial.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(workdir) as checkpoints:
        restored, _ = checkpoints.restore(abstract())
        assert kernel(restored) in (8, 80)
        checkpoints.save(make(14), {})
    assert folders(workdir, "last")[-1] != "14.partial" and newest(workdir, "last") == 14
    assert len(folders(workdir, "last")) == 2


def test_state_of_another_network(workdir):
    damage(workdir / "checkpoints/last/8", "flipped bit")
    for changes, words in (
        ({"shape": (3, 5)}, r"params/dense/kernel is float32 \[3, 4\] there and float32 \[3, 5\] here"),
        ({"name": "head"}, r"params/head/kernel is missing there"),
    ):
        with Checkpoints(workdir) as checkpoints, pytest.raises(ValueError, match=rf"another network: {words}"):
            checkpoints.restore(abstract(**changes))
        for shapes in (abstract(**changes), jax.eval_shape(lambda changes=changes: make(0, **changes))):
            with pytest.raises(ValueError, match=rf"best/8 belongs to another network: {words}"):
                restore_best(workdir, shapes.variables)
    with Checkpoints(workdir) as checkpoints, pytest.raises(ValueError, match="last/4 was written by another version"):
        checkpoints.restore(abstract().replace(ema={"fields without arrays": {}}))
    assert folders(workdir, "last") == folders(workdir, "best") == ["4", "8"]


def test_foreign_files_among_checkpoints(workdir):
    for kind in ("last", "best"):
        folder = workdir / "checkpoints" / kind
        for name in ("²", "١٢", "12 (copy)", "007"):
            shutil.copytree(folder / "8", folder / name)
        for name in ("12", "40", "41.partial", "notes.txt"):
            (folder / name).write_text("a file")
    with Checkpoints(workdir) as checkpoints:
        assert int(checkpoints.restore(abstract())[0].step) == newest(workdir, "last") == 8
        checkpoints.save(make(12), {}, best=True)
    assert restore_best(workdir, SHAPES)[1] == 12


def fail_with(code):
    return Mock(side_effect=OSError(code, os.strerror(code)))


@pytest.mark.parametrize(
    ("at", "code", "words"),
    [("save", errno.ENOSPC, "space"), ("wait", errno.EROFS, "Read-only"), ("exit", errno.ENOSPC, "space")],
)
def test_report_of_a_failed_background_save(workdir, monkeypatch, at, code, words):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_with(code))
        checkpoints = Checkpoints(workdir)
        checkpoints.save(make(12), {}, best=True)
        report = pytest.raises(ValueError, match=f"checkpoint of step 12 .*{words}.*intact")
        if at == "exit":
            with report, checkpoints:
                pass
        else:
            with report:
                checkpoints.wait() if at == "wait" else checkpoints.save(make(16), {})
            assert int(checkpoints.restore(abstract())[0].step) == 8
    with checkpoints if at == "wait" else Checkpoints(workdir) as checkpoints:
        checkpoints.save(make(12), {})
    assert folders(workdir, "last") == ["12", "8"] and folders(workdir, "best") == ["4", "8"]


def test_failed_save_as_note_on_another_error(workdir, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
    with pytest.raises(KeyError) as error, Checkpoints(workdir) as checkpoints:
        checkpoints.save(make(12), {})
        raise KeyError("of the training loop")
    assert "step 12" in error.value.__notes__[0]


def test_disk_without_room_or_permission(workdir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, Checkpoints(workdir) as checkpoints:
        patch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        with pytest.raises(ValueError, match=r"step 12.*0 MiB are free.*intact"):
            checkpoints.save(make(12), {})
    assert folders(workdir, "last") == ["4", "8"]
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(ValueError, match="can't be written"):
        Checkpoints(tmp_path)
    monkeypatch.setattr(tempfile, "TemporaryFile", fail_with(errno.EROFS))
    with pytest.raises(ValueError, match="Read-only file system"):
        Checkpoints(workdir)


def test_reading_during_a_pending_save(workdir):
    pending = workdir / "checkpoints/best/12.partial.orbax-checkpoint-tmp"
    pending.mkdir()
    variables, step = restore_best(workdir, SHAPES)
    assert step == kernel(variables) == 8 and variables["batch_stats"] == {} and pending.is_dir()
