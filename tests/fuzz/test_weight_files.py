"""Mutated weight files of every format: only ValueError, in bounded time and memory.

The files are read in child processes, since forged files may crash or hang libhdf5; weights/README.md warns of that.
"""

import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lungjax.weights.readers import open_tensors

FORMATS = ("safetensors", "npz", "h5", "pth", "pth stream")
ARRAYS = {f"block{i}/kernel": np.random.default_rng(i).normal(size=(3, 7)).astype(np.float32) for i in range(4)}
SECONDS = 10  # per file
PEAK = 2 << 20  # KiB
CRASHES = 0.05  # of the HDF5 files may crash or hang libhdf5


def read(path) -> str:
    """Reads all arrays of a file; returns the problem, such as an error other than ValueError."""
    problem = ""
    try:
        with open_tensors(path) as tensors:
            for name in tensors:
                np.sum(tensors[name] != 0)
    except ValueError:
        pass
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"
    # getrusage would include the process that started this one.
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    return problem + (peak > PEAK) * f" peak {peak} KiB"


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(20, 400), marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMATS)
def test_mutated_files(form, seeds, tmp_path):
    import weight_writers  # here, since the children run this file, and need no jax
    from hostile_files import damage

    content = weight_writers.FORMATS[form][0](tmp_path / "intact", ARRAYS).read_bytes()
    for seed in seeds:
        (tmp_path / f"{seed:04}").write_bytes(damage(content, random.Random(seed)))
    paths, problems, crashes = sorted(tmp_path.iterdir()), {}, 0
    while paths:
        command = [sys.executable, __file__, *paths]
        results = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        problems |= {path.name: result for path, result in zip(paths, results, strict=False) if result}
        crashes += len(results) < len(paths)
        paths = paths[len(results) + 1 :]  # after the file that crashed, if any
    print(f"{form}: {crashes} of {len(seeds)} files crash or hang the reader")
    assert not problems and crashes <= CRASHES * len(seeds) * (form == "h5")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        signal.alarm(SECONDS)  # ends the process, like a crash
        print(read(argument).replace("\n", " "), flush=True)
