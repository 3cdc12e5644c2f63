"""Preparation: atomic writes, resumption, order and content of records, and the command."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import commands
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from small_runs import group_ends

from lungjax import cli, datasets, prepare
from lungjax.config import InputSpec
from lungjax.data import pipeline, prepared
from lungjax.data.imaging import images
from lungjax.data.imaging.limits import Limits
from lungjax.datasets import PrepareOptions
from lungjax.datasets.build import staging, writer


@pytest.fixture
def folder(tmp_path):
    """A folder of 24 images in two classes, with split folders."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "in" / ("train", "train", "val", "test")[i % 4] / "ab"[i // 4 % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 20), dtype=np.uint8)).save(path)
    return tmp_path / "in"


def write(root, name="folder", **settings):
    return datasets.write(name, root / "in", root / "data", PrepareOptions(), quiet=True, **settings)


def open_folder(root, protocol="clean"):
    return datasets.open_dataset("folder", root / "data", protocol)


def assert_nothing_opens(root):
    with pytest.raises(ValueError, match="not prepared"):
        open_folder(root)


def python(code, root, *arguments):
    """Runs code in a new process; returns its exit code and output."""
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=root, capture_output=True, text=True)


def test_command_without_tensorflow_and_jax(folder, tmp_path):
    code = (
        "import sys; from lungjax import cli, prepare\n"
        "sys.argv = ['prepare', '--dataset=folder/mine', '--source=in', '--data_dir=out']\n"
        "try: prepare.run()\n"
        "except SystemExit as end: assert not end.code\n"
        "from lungjax import datasets; datasets.open_dataset('folder/mine', 'out').records[0]\n"
        "print([m for m in ('tensorflow', 'jax', 'torch', 'grain') if m in sys.modules])"
    )
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    assert "| train |" in result.stdout
    assert "--experiment=finetune:dataset=folder/mine --data_dir=out" in result.stdout
    assert "24 of 24" in result.stderr and "images/s" in result.stderr


def test_invalid_commands(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (folder / "train/a/b.png").write_bytes((folder / "train/a/000.png").read_bytes()[:150])
    cases = (
        (["--source=in"], 1, "--dataset=NAME"),
        (["--dataset=foldr", "--source=in"], 2, "did you mean folder"),
        (["--dataset=folder", "--source=none"], 2, "--source=none"),
        (["--dataset=folder", "--source=in", "--window=5"], 2, "--window=5"),
        (["--dataset=folder", "--source=in", "--on_bad_image=no"], 1, "on_bad_image"),
        (["folder"], 1, "'folder'"),
        (["--dataset=folder", "--source=in"], 2, "b.png: damaged"),
        (["--dataset=folder", "--source=in", "--data_dir=in/train/a/000.png"], 2, "in/train/a/000.png"),
    )
    commands.assert_errors(capsys, prepare, cases)
    assert_nothing_opens(tmp_path)
    assert cli.read_window("-160, 240.5") == (-160, 240.5)
    for text in ("9,5", "5,5", "1,2,3", "a,b", "nan,3"):
        with pytest.raises(ValueError, match=f"--window={text}: "):
            cli.read_window(text)


def test_order_of_records(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 1000)
    write(tmp_path)
    data = open_folder(tmp_path)
    assert len(list(prepared.directory(tmp_path / "data", "folder/default").glob("*.array_record*"))) > 5
    files = data.columns["file"].tolist()
    assert files == sorted(files) and len(files) == len(data.records) == 24
    for i, file in enumerate(files):
        assert data.records[i]["image"] == (folder / file).read_bytes()
    assert data.rows("val").tolist() == [i for i, file in enumerate(files) if file.startswith("val")]
    assert pickle.loads(pickle.dumps(data)).records[23]["image"] == data.records[23]["image"]
    # Two threads that import TFDS at once deadlock, so unpickling must import everything.
    (tmp_path / "records").write_bytes(pickle.dumps(data.records))
    code = (
        "import pickle, sys; records = pickle.load(open('records', 'rb'))\n"
        "before = set(sys.modules); records[0]['image']; print(sorted(set(sys.modules) - before))"
    )
    result = python(code, tmp_path)
    assert result.stdout.strip() == "[]", result.stderr


def test_records_of_tfds(tmp_path):
    result = datasets.write("phantom_ct/tiny", None, tmp_path, PrepareOptions(seed=3), quiet=True)
    # Synthetic slices at one level are as similar as slices of different patients; none may be removed.
    assert result["twins"]["near_pairs"] == result["twins"]["left_out"] == 0
    directory = prepared.directory(tmp_path, "phantom_ct/tiny")
    builder = tfds.builder_from_directory(directory)
    expected = builder.as_data_source(split=prepared.SLICES, decoders={"image": tfds.decode.SkipDecoding()})
    records = prepared.open_records(directory)
    assert len(records) == len(expected) == 48
    for record, other in zip((records[i] for i in range(48)), expected, strict=True):
        assert all(record[name] == other[name] for name in ("image", "file", "group", "source"))
        np.testing.assert_array_equal(np.frombuffer(zlib.decompress(record["body"]), np.uint8), other["body"])
    assert other["body"].any() and not other["body"].all()
    with pytest.raises(IndexError):
        records[48]


def test_bad_images(folder, tmp_path, monkeypatch):
    bad = ["train/a/000.png", "train/a/001.png", "train/a/zero.png", "train/b/004.png"]
    for file in bad:
        (folder / file).write_bytes((folder / file).read_bytes()[:200] if (folder / file).exists() else b"")
    with pytest.raises(ValueError, match=r"train/a/000.png: damaged .*--on_bad_image=skip"):
        write(tmp_path)
    assert_nothing_opens(tmp_path)
    assert not list((tmp_path / "data").rglob("*.array_record*"))
    monkeypatch.setattr(writer, "SHARD_BYTES", 200)  # so that some shards are empty
    result = write(tmp_path, on_bad_image="skip")
    assert [line.split(":")[0] for line in result["skipped"]] == bad
    assert any("skipped" in line for line in result["warnings"])
    data = open_folder(tmp_path)
    assert len(data.records) == 21 and not set(bad) & set(data.columns["file"])
    for path in folder.glob("*/*/*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no readable image"):
        write(tmp_path, on_bad_image="skip", overwrite=True)


def test_image_above_the_limit(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.eye(30, dtype=np.uint8)).save(folder / "train/a/large.png")
    arguments = ("--dataset=folder", "--source=in", "--max_megapixels=0.0005")
    assert commands.run(prepare, *arguments) == 2 and "large.png: 30 x 30 pixels" in capsys.readouterr().err
    assert commands.run(prepare, *arguments, "--on_bad_image=skip") == 0
    assert "train/a/large.png" not in open_folder(tmp_path).columns["file"]


def test_stored_image_above_the_default_limit(folder, tmp_path):
    write(tmp_path)
    file = open_folder(tmp_path).columns["file"][0]  # which is decoded when the data set is opened
    Image.new("L", (7000, 6000), 90).save(folder / file)
    with pytest.raises(ValueError, match="--max_megapixels"):
        write(tmp_path, overwrite=True)
    options = PrepareOptions(limits=Limits(pixels=50_000_000))
    datasets.write("folder", folder, tmp_path / "data", options, quiet=True, overwrite=True)
    assert open_folder(tmp_path).columns["width"][0] == 7000


def test_images_without_a_lung(folder, tmp_path):
    files = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*/*"))
    for value, file in enumerate(files, 100):
        Image.fromarray(np.full((16, 20), value, np.uint8)).save(folder / file)
    assert sorted(write(tmp_path, "folder/flat-lungs")["unstaged"]) == files
    for action, word in (("fail", "no body or lung"), ("skip", "no readable image")):
        with pytest.raises(ValueError, match=word):
            write(tmp_path, "folder/flat-lungs", on_no_lung=action, overwrite=True)


def test_overwrite(folder, tmp_path):
    write(tmp_path)
    first = open_folder(tmp_path).fingerprint
    with pytest.raises(ValueError, match="--overwrite"):
        write(tmp_path)
    assert [path.name for path in (tmp_path / "data/.staging").iterdir()] == ["folder-default.lock"]
    image = folder / "test/a/003.png"
    pixels, original = np.array(Image.open(image)), image.read_bytes()
    image.write_bytes(original[:99])
    with pytest.raises(ValueError, match="damaged"):
        write(tmp_path, overwrite=True)
    assert open_folder(tmp_path).fingerprint == first, "kept until the new one is complete"
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(image)
    write(tmp_path, overwrite=True)
    assert open_folder(tmp_path).fingerprint != first, "one pixel makes another data set"
    image.write_bytes(original)
    write(tmp_path, overwrite=True)
    assert open_folder(tmp_path).fingerprint == first


@pytest.mark.parametrize("name", ["folder", "folder/default-12"])
def test_resume_after_a_bad_image(folder, tmp_path, monkeypatch, name):
    write(tmp_path, name)
    first = datasets.open_dataset(name, tmp_path / "data")
    expected = [first.records[i] for i in range(24)]
    image = folder / "val/b/022.png"  # after all of test and train
    data, processed = image.read_bytes(), []
    image.write_bytes(data[:150])
    monkeypatch.setattr(writer, "SHARD_BYTES", 1000)
    with pytest.raises(ValueError, match="damaged"):
        write(tmp_path, name, overwrite=True)
    image.write_bytes(data)
    process = writer.process_image
    monkeypatch.setattr(writer, "process_image", lambda e, options: processed.append(e.file) or process(e, options))
    write(tmp_path, name, overwrite=True)
    assert "val/b/022.png" in processed and len(processed) <= 6
    again = datasets.open_dataset(name, tmp_path / "data")
    assert again.fingerprint == first.fingerprint and [again.records[i] for i in range(24)] == expected


KILL = """
import os, signal, sys
from functools import partial
from pathlib import Path
import numpy as np
from lungjax.data.imaging import images
from lungjax.datasets import listing
from lungjax.datasets.build import writer
def image(i):
    print(f"<{i}>", file=sys.stderr)
    if i == 40 and sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return images.encode(np.random.default_rng(i).integers(0, 255, (40, 40), np.uint8))
examples = [listing.Example(f"{i}", partial(image, i), i % 2, "train", f"{i}") for i in range(50)]
writer.SHARD_BYTES = 1
writer.prepare("folder/default", listing.Listing(("a", "b"), examples), Path("data"))
"""


def test_killed_run(tmp_path):
    assert python(KILL, tmp_path, "kill").returncode == -signal.SIGKILL
    assert list((tmp_path / "data/.staging").rglob("*.array_record*")), "killed while writing"
    assert_nothing_opens(tmp_path)
    result = python(KILL, tmp_path, "finish")
    assert result.returncode == 0
    assert "Resuming an interrupted run" in result.stdout
    assert re.findall(r"<(\d+)>", result.stderr) == [str(i) for i in range(40, 50)]
    records = open_folder(tmp_path).records
    (tmp_path / "whole").mkdir()
    assert python(KILL, tmp_path / "whole", "finish").returncode == 0
    assert [records[i] for i in range(50)] == [open_folder(tmp_path / "whole").records[i] for i in range(50)]
    assert open_folder(tmp_path).fingerprint == open_folder(tmp_path / "whole").fingerprint
    assert [path.name for path in (tmp_path / "data/.staging").iterdir()] == ["folder-default.lock"]


def test_kill_between_the_renames_of_an_overwrite(folder, tmp_path, monkeypatch):
    write(tmp_path)
    first, rename = open_folder(tmp_path).fingerprint, Path.rename

    def killed(path, target):
        if path.name == prepared.VERSION and ".staging" in path.parts:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, overwrite=True)
    final = tmp_path / "data/folder/default" / prepared.VERSION
    assert not final.exists() and open_folder(tmp_path).fingerprint == first
    write(tmp_path)
    assert final.exists() and open_folder(tmp_path).fingerprint == first
    assert [path.name for path in final.parent.iterdir()] == [prepared.VERSION]


def test_synced_files(folder, tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino) or fsync(handle))
    write(tmp_path)
    final = prepared.directory(tmp_path / "data", "folder/default")
    assert {path.stat().st_ino for path in (final.parent, final, *final.iterdir())} <= synced


def test_records_of_another_set(folder, tmp_path):
    write(tmp_path)
    for path in folder.glob("*/*/*"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    write(tmp_path, "folder/inverted")
    for path in list(folder.glob("*/*/*")):
        path.rename(path.with_name(f"x{path.name}"))
    write(tmp_path, "folder/renamed")
    first, *others = (
        next(prepared.directory(tmp_path / "data", name).glob("*record*"))
        for name in ("folder/default", "folder/inverted", "folder/renamed")
    )
    for other in others:
        first.write_bytes(other.read_bytes())
        with pytest.raises(ValueError, match="does not match row.*--overwrite"):
            open_folder(tmp_path)


def test_record_damaged_after_opening(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 1000)
    monkeypatch.setattr(prepared, "SAMPLE", 2)
    write(tmp_path)
    directory = prepared.directory(tmp_path / "data", "folder/default")
    shard = sorted(directory.glob("*record*"))[3]
    content = bytearray(shard.read_bytes())
    content[100:200] = bytes(100)
    shard.write_bytes(content)
    data = open_folder(tmp_path)
    reader = pipeline.Reader(data, InputSpec())
    with pytest.raises(ValueError, match=rf"{data.name}: .*{directory} is damaged.*--overwrite"):
        [reader(row) for row in range(24)]


def test_incomplete_index(folder, tmp_path):
    write(tmp_path)
    index = prepared.directory(tmp_path / "data", "folder/default") / prepared.INDEX
    original = index.read_bytes()
    arrays = dict(np.load(index))
    np.savez(index, **{name: values[:21] for name, values in arrays.items()})
    with pytest.raises(ValueError, match="21 rows but 24 records.*--overwrite"):
        open_folder(tmp_path)
    np.savez(index, **arrays | {"column/label": arrays["column/label"] + 1})
    with pytest.raises(ValueError, match="labels"):
        open_folder(tmp_path)
    for part in (original[:-200], b""):
        index.write_bytes(part)
        with pytest.raises(ValueError, match="damaged"):
            open_folder(tmp_path)
    index.unlink()
    assert_nothing_opens(tmp_path)


def test_insufficient_disk_space(folder, tmp_path, monkeypatch):
    free = staging.SPARE_BYTES + 24 * writer.GENERATED_BYTES
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    write(tmp_path)
    for path in folder.rglob("*.png"):  # stored as PNG, so the shards of an interrupted run have another copy
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    with pytest.raises(ValueError, match="--data_dir"):
        write(tmp_path, overwrite=True)


def test_shuffled_records(folder, tmp_path, monkeypatch):
    original = prepared.open_records
    monkeypatch.setattr(prepared, "open_records", lambda path: list(reversed(list(original(path)))))
    with pytest.raises(ValueError, match="does not match row"):
        write(tmp_path)
    assert_nothing_opens(tmp_path)


def test_workers_of_a_killed_run(tmp_path):
    command = [sys.executable, "-m", "lungjax.prepare", "--dataset=phantom_ct"]
    run = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while len(children.read_text().split()) < 2 and run.poll() is None:
        time.sleep(0.05)
    run.kill()
    run.wait()
    if not group_ends(run.pid):
        os.killpg(run.pid, signal.SIGKILL)
        raise AssertionError("workers outlived the run by 30 s")


def test_statistics_of_16_bit_images(folder, tmp_path):
    rng = np.random.default_rng(0)
    for path in folder.glob("*/*/*"):
        Image.fromarray((rng.random((30, 30)) * 1000 + 150 * int(path.stem)).astype(np.uint16)).save(path)
    for name, window in (("folder/given", (0, 4000)), ("folder/derived", None), ("folder/given-15", (0, 4000))):
        write(tmp_path, name, window=window)
        data = datasets.open_dataset(name, tmp_path / "data")
        low, high = data.window
        for i in range(24):
            values = images.read(data.records[i]["image"])[0].astype(float)
            values = (np.clip(values, low, high) if window else values) - low
            expected = (values.mean() / (high - low), values.std() / (high - low))
            np.testing.assert_allclose((data.columns["mean"][i], data.columns["std"][i]), expected, atol=2e-5)


def test_class_lost_to_duplicates(folder, tmp_path):
    for path in (folder / "train/a").iterdir():
        path.write_bytes(next((folder / "test/a").iterdir()).read_bytes())
    result = write(tmp_path)
    assert "the train split has no images labeled a" in result["warnings"]
    assert len(open_folder(tmp_path, protocol="study").rows("train")) == 12
