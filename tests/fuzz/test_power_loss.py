"""Runs and data sets with damaged files: the same command resumes, or fails with one message that says what to do."""

import json
import random
import resource
import shutil
import time
import types
from pathlib import Path

import commands
import conftest
import folders
import pytest
import small_runs as runs

import lungjax
from lungjax import runs as run_list
from lungjax.config import experiments, metadata
from lungjax.data import prepared
from lungjax.training import train

pytestmark = pytest.mark.usefixtures("no_pictures")
CONFIG = runs.changed(folders.CONFIG, "data.dataset=folder/mine", "train.steps=4", "train.keep=last")
DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": Path.unlink,
}
RUN_FILES = (
    "config.json", "data.json", "model.json", "report.json", "metrics.jsonl", "predictions_test.csv",
    "checkpoints/last/4/progress.json", "checkpoints/last/4/checksums.json", "checkpoints/last/4/state/manifest.ocdbt",
    "checkpoints/best/4/checksums.json", "checkpoints/best/4/variables/manifest.ocdbt",
)  # fmt: skip
VALUES = ("NaN", "1e999", "null", "true", "-1", "0", "0.5", str(2**65), '""', '"x"', '"\\ud800"', "[]", "{}", "[[1]]")


@pytest.fixture(scope="module")
def complete(trained_run, tmp_path_factory):
    """A finished run with checkpoints of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("power") / "run"
    with pytest.MonkeyPatch.context() as patch:
        conftest.without_pictures(patch)
        train.run(CONFIG, workdir, trained_run.data_dir)
    return workdir


def quick(count: int, total: int) -> list:
    """Returns `total` seeds; all but the first `count` are slow."""
    return [pytest.param(seed, marks=[pytest.mark.slow] if seed >= count else []) for seed in range(total)]


@pytest.mark.parametrize("seed", quick(3, 30))
def test_power_loss_of_a_run(complete, trained_run, tmp_path, seed):
    workdir, rng = shutil.copytree(complete, tmp_path / "run"), random.Random(seed)
    for name in rng.sample(RUN_FILES, 3):
        DAMAGE[rng.choice(list(DAMAGE))](workdir / name)
    train.run(CONFIG, workdir, trained_run.data_dir)
    states = [runs.last_state(path) for path in (complete, workdir)]
    assert all((states[0][path] == array).all() for path, array in states[1].items())
    assert metadata.read(workdir / "model.json").classes == trained_run.classes


@pytest.mark.parametrize("kind", DAMAGE)
def test_power_loss_of_a_data_set(trained_run, tmp_path, kind):
    data_dir, name = shutil.copytree(trained_run.data_dir, tmp_path / "data"), "folder/mine"
    directory = prepared.directory(data_dir, name)
    for path in (*directory.glob("*.json"), *directory.glob("*record*"), directory / prepared.INDEX):
        content = path.read_bytes()
        DAMAGE[kind](path)
        if path.name == "summary.json" and kind == "missing":
            continue
        with pytest.raises(ValueError, match="lungjax.prepare|--overwrite") as error:
            train.run(CONFIG, tmp_path / "run", data_dir)
        assert str(directory) in str(error.value) or "not prepared" in str(error.value)
        path.write_bytes(content)


def mutate(path: Path, rng: random.Random) -> None:
    """Damages a file, or replaces or deletes a value of a JSON file."""
    content = path.read_bytes()
    kind = rng.choice(["value", "value", "value", "byte", "cut", "zeroed", "missing"])
    if kind in DAMAGE:
        DAMAGE[kind](path)
    elif kind == "value" and path.suffix == ".json":
        tree = json.loads(content)
        node = tree
        while True:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.1:
                break
            node = node[key]
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = "VALUE"
        path.write_text(json.dumps(tree).replace('"VALUE"', rng.choice(VALUES)))
    elif content:
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])


@pytest.mark.parametrize("seed", quick(10, 500))
def test_damaged_run(complete, trained_run, tmp_path, seed):
    workdir, rng = shutil.copytree(complete, tmp_path / "run"), random.Random(seed)
    files = [path for path in sorted(workdir.rglob("*")) if path.is_file() and path.name != "lock"]
    mutate(rng.choice([workdir / name for name in RUN_FILES] + [rng.choice(files)]), rng)
    action = {
        "load": lambda: lungjax.load(workdir),
        "list": lambda: run_list.find(tmp_path),
        "resume": lambda: train.run(CONFIG, workdir, trained_run.data_dir),
        "evaluate": lambda: train.run(
            experiments.load(str(workdir / "config.json")), workdir, trained_run.data_dir, mode="evaluate"
        ),
    }[("load", "list", "load", "resume", "load", "evaluate")[seed % 6]]
    started, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    command = types.SimpleNamespace(main=lambda _: action(), define_flags=lambda: None, __name__="command")
    assert commands.run(command) in (0, 2)  # other errors, which would print a traceback, are raised
    assert time.monotonic() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**21  # KiB
