"""Damaged files and small files that promise gigabytes, in every path that opens files of users.

A child process opens the files, since its memory is limited and measured: `python tests/fuzz/test_files.py FOLDER`
opens the files of a folder, `python tests/fuzz/test_files.py FOLDER SEED COUNT` writes damaged ones there and opens
them. It prints one JSON object.
"""

import gzip
import json
import random
import re
import resource
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pytest
import scans
from folders import encoded
from hostile_files import EIGHT_BITS, GRAY, IMAGES, bombs, damage, split_dicom
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from lungjax.config import InputSpec
from lungjax.config.metadata import Metadata
from lungjax.data import preprocess
from lungjax.data.imaging import images, nifti
from lungjax.datasets import PrepareOptions, folder_volumes
from lungjax.datasets.build.process_image import ImageOptions, process_image
from lungjax.datasets.listing import Example
from lungjax.inference import inputs
from lungjax.serve import uploads

MEMORY = 2 * 2**30
SECONDS = 10
FEW = 3  # slices to open per volume
METADATA = Metadata("mine", ("a", "b"), InputSpec(size=(8, 8)), "folder/mine", window=(0, 4000))
WINDOWS = ((-600.0, 1500.0),)


def predicted(path):
    """Opens a file as `lungjax.predict` does; returns the reasons of failures."""
    sources = inputs.gather([str(path)], METADATA)
    reasons = [reason for _, reason in sources.failures]
    for item in sources.items[:FEW]:
        try:
            preprocess.picture(item.read(), METADATA)
        except (ValueError, OSError) as error:
            reasons.append(str(error))
    return reasons


def prepared(path):
    """Opens a file as `lungjax.prepare` does; returns the reasons of failures."""
    if not folder_volumes.kind(str(path)):
        return []
    rows, _, _ = folder_volumes.expand([folder_volumes.Row(path.name, str(path), "a", "train")], PrepareOptions())
    examples = [Example(row.file, row.image, 0, "train", "g") for row in rows[:FEW]]
    results = [process_image(example, ImageOptions(size=(16, 16))) for example in examples]
    return [result for result in results if isinstance(result, str)]


def uploaded(path):
    """Opens a file as the service does; returns the reason of a failure."""
    try:
        uploads.read(path.read_bytes(), uploads.Limits())
    except uploads.UploadError as error:
        assert error.status in (413, 415, 422) and error.__cause__ is None
        return [str(error)]
    return []


def in_child(*arguments):
    """Opens files in a new process; returns the printed object."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def open_files(paths):
    """Prints the failures by file and path of lungjax, unexpected errors, the longest time and the most memory."""
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    uploads.quiet()
    reasons, unexpected, slowest, count, failures = {}, [], 0.0, 0, 0
    for count, path in enumerate(paths, 1):
        for read in (predicted, prepared, uploaded):
            started = time.monotonic()
            try:
                failed = read(path)
            except Exception:
                failed = []
                unexpected.append(f"{path.name} {count} {read.__name__}: {traceback.format_exc(limit=-3)}")
            slowest, failures = max(slowest, time.monotonic() - started), failures + len(failed)
            if len(sys.argv) == 2:
                reasons.setdefault(path.name, {})[read.__name__] = " ".join(failed)
    # getrusage would include the process that started this one.
    memory = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    result = {"files": count, "failures": failures, "slowest": slowest, "memory": memory}
    print(json.dumps(result | {"unexpected": unexpected, "reasons": reasons}))


def originals(folder):
    """Returns (suffix, content, function that compresses the content) of intact files of every format."""
    jpeg, hu, plain = encapsulate([encoded(GRAY, "JPEG")]), scans.body(), bytes
    nifti_file = Path(scans.nifti(folder / "a.nii", hu)).read_bytes()
    rle, meta = scans.scan(), split_dicom(scans.file_bytes(scans.scan(syntax=DeflatedExplicitVRLittleEndian)))[0]
    rle.compress(RLELossless, generate_instance_uid=False)
    baseline = scans.scan("DX", GRAY.shape, JPEGBaseline8Bit, PixelData=jpeg, **EIGHT_BITS)
    scan, suffixes = scans.file_bytes(scans.scan()), {form: suffix[1:] for suffix, form in images.FORMATS.items()}
    return [
        *((suffixes[form], encoded(array, form, **options), plain) for array, form, options in IMAGES),
        *(("dcm", scans.file_bytes(data), plain) for data in (scans.scan(), scans.scan("DX"), rle, baseline)),
        ("dcm", Path(scans.enhanced(folder / "e.dcm", hu)).read_bytes(), plain),
        ("dcm", split_dicom(scan)[1], lambda data: meta + zlib.compress(data)[2:-4]),
        ("nii", nifti_file, plain), ("nii.gz", nifti_file, lambda data: gzip.compress(data, 1)),
        ("csv", b"path,group\nfile.png,p1\nscan.dcm,p2\n", plain),
    ]  # fmt: skip


def damaged(folder, seed, count):
    """Yields the paths of `count` files with random damage, each of which replaces the one before."""
    rng, files = random.Random(seed), originals(folder)
    (folder / "file.png").write_bytes(files[0][1])
    for _ in range(count):
        suffix, data, compress = rng.choice(files)
        inside = rng.random() < 0.5
        content = compress(damage(data, rng)) if inside else damage(compress(data), rng)
        path = folder / f"scan.{suffix}"
        path.write_bytes(content)
        yield path
        path.unlink()


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files(tmp_path, count):
    result = in_child(tmp_path, count, count)
    assert result["unexpected"] == []
    assert result["files"] == count and result["failures"] > count
    assert result["slowest"] < SECONDS and result["memory"] < MEMORY


def test_bombs(tmp_path):
    words = {}
    for name, data, words[name] in bombs():
        assert len(data) < 4 * 2**20
        (tmp_path / name).write_bytes(data)
    result = in_child(tmp_path)
    assert result["unexpected"] == [] and result["slowest"] < SECONDS and result["memory"] < MEMORY
    for name, word in words.items():
        for read, reason in result["reasons"][name].items():
            # The service reads no NIfTI, and does not quote errors of decoders.
            assert bool(reason) == bool(word), (name, read, reason)
            assert word in reason or read == "uploaded", (name, read, reason)


def test_broken_volume_is_read_once(tmp_path, monkeypatch):
    path = scans.nifti(tmp_path / "a.nii.gz", scans.body())
    intact = Path(path).read_bytes()
    Path(path).write_bytes(intact[:-400])
    calls, real = [], np.empty
    monkeypatch.setattr(np, "empty", lambda *args, **options: calls.append(args) or real(*args, **options))
    for index in range(5):
        with pytest.raises(ValueError, match="damaged"):
            nifti.picture(path, "axial", index, WINDOWS)
    assert len(calls) == 1
    Path(path).write_bytes(intact)
    assert nifti.picture(path, "axial", 0, WINDOWS)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    open_files(sorted(place.iterdir()) if len(sys.argv) == 2 else damaged(place, *map(int, sys.argv[2:])))
