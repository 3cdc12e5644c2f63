"""Preparing and opening: nothing half done, order kept, copies of the bytes, and the command itself."""

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lungjax import cli, datasets
from lungjax.data import prepared
from lungjax.data.imaging import images
from lungjax.datasets import PrepareOptions
from lungjax.datasets.build import staging, writer
from lungjax.datasets.build.process_image import Treatment
from lungjax.datasets.listing import Example, Listing
from lungjax.datasets.phantom import slices


def make_folder(root, count=24, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = root / "in" / ("train", "train", "val", "test")[i % 4] / "ab"[i // 4 % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 20), dtype=np.uint8)).save(path)
    return root / "in"


def write(root, **how):
    return datasets.write("folder", root / "in", root / "data", PrepareOptions(), quiet=True, **how)


def run(root, *arguments):
    command = [sys.executable, "-m", "lungjax.prepare", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def assert_nothing_opens(root):
    with pytest.raises(ValueError, match="not prepared"):
        datasets.open_dataset("folder", root / "data")


def test_the_command_prepares_without_tensorflow_or_jax(tmp_path):
    make_folder(tmp_path)
    code = (
        "import sys; from absl import app; from lungjax import prepare\n"
        "sys.argv = ['prepare', '--dataset=folder/mine', '--source=in', '--data_dir=out']\n"
        "try: app.run(prepare.main)\n"
        "except SystemExit as end: assert not end.code\n"
        "from lungjax import datasets; datasets.open_dataset('folder/mine', 'out').records[0]\n"
        "print([m for m in ('tensorflow', 'jax', 'torch', 'grain') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "[]"
    assert lines[0].startswith("24 images, about ") and lines[0].endswith(" free)")
    assert "| train |" in result.stdout and "--set=data.dataset=folder/mine --data_dir=out" in result.stdout
    assert "24/24" in result.stderr and "images/s" in result.stderr


def test_help_answers_at_once_with_our_flags_first(tmp_path):
    start = time.monotonic()
    text = run(tmp_path, "--help").stdout
    assert time.monotonic() - start < 5  # alone it takes a third of a second
    assert 0 < text.index("--dataset") < text.index("--window")
    code = (
        "import sys; from lungjax import prepare; "
        "print([m for m in sys.modules if m in ('jax', 'tensorflow_datasets')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


MISTAKES = [
    (["--source=in"], 1, "--dataset=NAME is missing"),
    (["--dataset=foldr", "--source=in"], 2, "unknown data set 'foldr'; the nearest: folder"),
    (
        ["--dataset=covidx_ct/4a", "--source=in"],
        2,
        "unknown configuration '4a' of covidx_ct; the nearest: 3a, 2a",
    ),
    (["--dataset=folder", "--source=none"], 2, "--source=none is no folder"),
    (["--dataset=folder", "--source=in", "--window=5"], 2, "--window=5: wanted two numbers"),
    (["--dataset=folder", "--source=in", "--on_bad_image=no"], 1, "on_bad_image"),
    (["folder"], 1, "unexpected argument 'folder'"),
    (["--dataset=folder", "--source=in"], 2, "b.png: damaged or truncated image"),
    (["--dataset=folder", "--source=in", "--data_dir=in/train/a/000.png"], 2, "in/train/a/000.png"),
]


def test_a_window_is_two_rising_numbers():
    assert cli.read_window("-160, 240.5") == (-160, 240.5)
    for text in ("9,5", "5,5", "1,2,3", "a,b", "nan,3"):
        with pytest.raises(ValueError, match=f"--window={text}: "):
            cli.read_window(text)


def test_mistakes_end_in_one_line_without_a_traceback(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "train/a/b.png").write_bytes((folder / "train/a/000.png").read_bytes()[:150])
    for arguments, code, words in MISTAKES:
        result = run(tmp_path, *arguments)
        said = result.stdout + result.stderr
        assert result.returncode == code, said
        assert words in said and "Traceback" not in said
        if code == 2:
            assert result.stderr.splitlines()[-1].startswith("lungjax: ")
    assert_nothing_opens(tmp_path)


def test_records_are_the_index_rows_over_many_shards(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)
    monkeypatch.setattr(writer, "SHARD_BYTES", 1000)
    write(tmp_path)
    data = datasets.open_dataset("folder", tmp_path / "data")
    assert len(list((tmp_path / "data/folder/default/2.0.0").glob("*.array_record*"))) > 5
    files = data.columns["file"].tolist()
    assert files == sorted(files) and len(files) == len(data.records) == 24
    for i, file in enumerate(files):
        assert data.records[i]["image"] == (folder / file).read_bytes()
    again = pickle.loads(pickle.dumps(data))
    assert again.records[23]["image"] == data.records[23]["image"]
    assert data.rows("val").tolist() == [i for i, file in enumerate(files) if file.startswith("val")]


def test_a_record_that_is_decoded_in_part_holds_what_tfds_reads(tmp_path):
    slices = [Example(f"{i}", functools.partial(phantom_png, i), i % 2, "train", f"p{i}", "x") for i in range(3)]
    writer.prepare("folder/ct", Listing(("a", "b"), slices, body=True), tmp_path, quiet=True)
    directory = prepared.directory(tmp_path, "folder/ct")
    whole = tfds.builder_from_directory(directory).as_data_source(
        split=prepared.SLICES, decoders={"image": tfds.decode.SkipDecoding()}
    )
    ours = prepared.open_records(directory)
    assert len(ours) == len(whole) == 3
    for i in range(3):
        for name in ("image", "file", "group", "source"):
            assert ours[i][name] == whole[i][name], name
        np.testing.assert_array_equal(ours[i]["body"], whole[i]["body"])
    assert 0.2 < np.unpackbits(ours[0]["body"]).mean() < 0.9
    with pytest.raises(IndexError):
        ours[3]


def phantom_png(seed):
    patient = slices.new_patient(seed, "Normal")
    return images.encode(slices.gray(slices.draw_slice(patient, 0.5).hu, patient.window))


def test_bad_images_fail_or_are_skipped_and_listed(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)
    bad = ["train/a/000.png", "train/a/001.png", "train/b/004.png"]
    for file in bad:
        (folder / file).write_bytes((folder / file).read_bytes()[:200])
    (folder / "train/a/zero.png").touch()
    with pytest.raises(ValueError, match=r"train/a/000.png: damaged or truncated image .*--on_bad_image=skip"):
        write(tmp_path)
    assert_nothing_opens(tmp_path)
    assert not list((tmp_path / "data").rglob("*.array_record*"))
    monkeypatch.setattr(writer, "SHARD_BYTES", 200)  # so that some shards have no image at all
    result = write(tmp_path, on_bad_image="skip")
    assert [line.split(":")[0] for line in result["skipped"]] == [*bad[:2], "train/a/zero.png", bad[2]]
    said = json.loads((tmp_path / "data/folder/default/2.0.0/summary.json").read_text())
    assert said["skipped"] == result["skipped"] and "4 images were skipped" in said["warnings"]
    data = datasets.open_dataset("folder", tmp_path / "data")
    assert len(data.records) == 21 and not set(bad) & set(data.columns["file"])
    for i, file in enumerate(data.columns["file"]):
        assert data.records[i]["image"] == (folder / file).read_bytes()


def test_no_image_left_and_a_class_that_lost_its_training_images(tmp_path):
    folder = make_folder(tmp_path)
    for path in folder.glob("train/a/*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no training example of a"):
        write(tmp_path, on_bad_image="skip")
    for path in folder.glob("*/*/*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no readable image is left; the first: test/a/\d+.png: not an image"):
        write(tmp_path, on_bad_image="skip")
    assert_nothing_opens(tmp_path)


def test_a_prepared_set_is_kept_unless_asked_and_until_the_new_one_is_whole(tmp_path):
    folder = make_folder(tmp_path)
    write(tmp_path)
    first = datasets.open_dataset("folder", tmp_path / "data")
    with pytest.raises(ValueError, match=r"already prepared in .*; --overwrite replaces it"):
        write(tmp_path)
    image = folder / "test/a/003.png"
    pixels = np.asarray(Image.open(image)).copy()
    good = image.read_bytes()
    image.write_bytes(good[:99])
    with pytest.raises(ValueError, match="damaged"):
        write(tmp_path, overwrite=True)
    assert datasets.open_dataset("folder", tmp_path / "data").fingerprint == first.fingerprint
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(image)
    write(tmp_path, overwrite=True)
    second = datasets.open_dataset("folder", tmp_path / "data")
    assert second.fingerprint != first.fingerprint, "one pixel makes another data set"
    image.write_bytes(good)
    write(tmp_path, overwrite=True)
    assert datasets.open_dataset("folder", tmp_path / "data").fingerprint == first.fingerprint
    assert write(tmp_path, keep=True) == {}


KILLED = """
import io, os, signal, sys
from pathlib import Path
import numpy as np
from PIL import Image
from lungjax.datasets import listing
from lungjax.datasets.build import writer
def image(i):
    if i == 40 and sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40), np.uint8)).save(out, "PNG")
    return out.getvalue()
examples = [listing.Example(f"{i}", lambda i=i: image(i), i % 2, "train", f"{i}") for i in range(50)]
writer.SHARD_BYTES = 1
writer.prepare("folder/default", listing.Listing(("a", "b"), examples), Path("data"))
"""


def test_a_killed_run_leaves_nothing_that_opens_and_the_next_one_cleans_up(tmp_path):
    for what, code in (("kill", -signal.SIGKILL), ("finish", 0)):
        result = subprocess.run([sys.executable, "-c", KILLED, what], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        if what == "kill":
            assert list((tmp_path / "data/.staging").rglob("*.array_record*")), "killed while writing"
            assert_nothing_opens(tmp_path)
    assert len(datasets.open_dataset("folder", tmp_path / "data").records) == 50
    assert [path.name for path in (tmp_path / "data/.staging").iterdir()] == ["folder-default.lock"]


def test_an_index_that_is_not_whole_does_not_open(tmp_path):
    make_folder(tmp_path)
    write(tmp_path)
    index = tmp_path / "data/folder/default/2.0.0/index.csv"
    text = index.read_text()
    index.write_text("\n".join(text.splitlines()[:-3]) + "\n")
    with pytest.raises(ValueError, match=r"index.csv has 21 rows, the records 24"):
        datasets.open_dataset("folder", tmp_path / "data")
    index.unlink()
    assert_nothing_opens(tmp_path)


def test_too_little_disk_is_said_before_anything_is_read(tmp_path, monkeypatch):
    make_folder(tmp_path)
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"the records need about 67 MB, 1 MB are free; choose another --data_dir"):
        write(tmp_path)


def test_no_more_than_a_few_images_wait_in_memory(tmp_path, monkeypatch):
    path = str(next(make_folder(tmp_path).glob("*/*/*")))
    read: list[str] = []
    treat = writer.treat
    monkeypatch.setattr(writer, "treat", lambda example, how: read.append(example.file) or treat(example, how))
    examples = [Example(f"{i}", path, 0, "train", "p") for i in range(300)]
    ahead = [len(read) - done for done, _ in enumerate(writer._treated(examples, Treatment()))]
    assert max(ahead) <= 4 * 8 + 1 + 8


def test_records_in_another_order_than_the_index_are_noticed(tmp_path, monkeypatch):
    make_folder(tmp_path)
    original = prepared.open_records
    monkeypatch.setattr(prepared, "open_records", lambda path: list(reversed(list(original(path)))))
    with pytest.raises(RuntimeError, match="not in the order of the index"):
        write(tmp_path)
    assert_nothing_opens(tmp_path)


def test_workers_end_with_a_killed_run(tmp_path):
    command = [sys.executable, "-m", "lungjax.prepare", "--dataset=phantom_ct"]
    run = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while len(children.read_text().split()) < 2 and run.poll() is None:
        time.sleep(0.05)
    run.kill()
    run.wait()
    for _ in range(200):
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    raise AssertionError("workers outlived the run by 20 s")


def test_records_are_ready_for_reading_threads_when_they_are_unpickled(tmp_path):
    """Two threads that import TFDS at once wait for each other for ever, so unpickling does it."""
    make_folder(tmp_path)
    write(tmp_path)
    data = datasets.open_dataset("folder", tmp_path / "data")
    (tmp_path / "records").write_bytes(pickle.dumps(data.records))
    code = (
        "import pickle, sys; records = pickle.load(open('records', 'rb'))\n"
        "before = set(sys.modules); records[0]['image']; print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_mean_and_deviation_of_16_bits_are_those_of_the_window(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / f"in/train/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.random((30, 30)) * 1000 + 500 * i).astype(np.uint16)).save(path)
    for name, flags in (
        ("folder/given", {"window": (0, 4000)}),
        ("folder/found", {}),
        ("folder/given-15", {"window": (0, 4000)}),
    ):
        datasets.write(name, tmp_path / "in", tmp_path / "data", PrepareOptions(), quiet=True, **flags)
        data = datasets.open_dataset(name, tmp_path / "data")
        low, high = data.window
        for i, row in enumerate(data.records[i]["image"] for i in range(8)):
            values = images.read(row)[0].astype(float)
            shown = (np.clip(values, low, high) if flags else values) - low
            wanted = (shown.mean() / (high - low), shown.std() / (high - low))
            got = (data.columns["mean"][i], data.columns["std"][i])
            np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_a_class_lost_to_twins_leaves_the_studys_splits_usable(tmp_path):
    make_folder(tmp_path)
    for path in (tmp_path / "in/train/a").iterdir():
        path.write_bytes(next((tmp_path / "in/test/a").iterdir()).read_bytes())
    result = write(tmp_path)
    assert "the train split has no image of a" in result["warnings"]
    study = datasets.open_dataset("folder", tmp_path / "data", "study")
    assert len(study.rows("train")) == 12
