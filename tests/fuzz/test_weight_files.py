"""Mutated weight files of every format: only ValueError, in bounded time and memory.

The files are read in a child process, since libhdf5 can crash for forged files; weights/README.md warns of that.
"""

import multiprocessing
import resource

import numpy as np
import pytest

from lungjax.weights.readers import open_tensors

FORMATS = ("safetensors", "npz", "h5", "pth", "pth stream")
ARRAYS = {f"block{i}/kernel": np.random.default_rng(i).normal(size=(3, 7)).astype(np.float32) for i in range(4)}
SECONDS = 10  # per file
PEAK = 2 << 20  # KiB of a child
CRASHES = 0.05  # of the HDF5 files may crash libhdf5


def mutated(content: bytes, seed: int) -> bytes:
    """Returns a copy with a few bytes replaced, removed, repeated or set to extreme integers, or cut at the end."""
    rng = np.random.default_rng(seed)
    data = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        # Two of three changes are at the start or end, where most formats have their directories.
        first, last = [(0, len(data)), (0, min(400, len(data))), (max(0, len(data) - 400), len(data))][rng.integers(3)]
        at, size, kind = int(rng.integers(first, last + 1)), int(rng.choice([1, 2, 4, 8])), rng.integers(6)
        if kind == 0:
            data[at : at + size] = rng.bytes(size)
        elif kind == 1:
            data[at : at + size] = rng.choice([b"\xff", b"\0", b"\x7f"]) * size
        elif kind == 2:
            del data[at : at + size * 4]
        elif kind == 3:
            data[at:at] = data[at : at + size * 8]
        elif kind == 4:
            data[at : at + 1] = bytes(byte ^ 1 << rng.integers(8) for byte in data[at : at + 1])
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


def read(path) -> str:
    """Reads all arrays of a file; returns an error other than ValueError."""
    try:
        with open_tensors(path) as tensors:
            for name in tensors:
                np.sum(tensors[name] != 0)
    except ValueError:
        pass
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def read_all(paths, pipe) -> None:
    for path in paths:
        pipe.send(read(path))


def problems(paths):
    """Reads files in child processes; returns the errors, hangs and crashes by file."""
    context, found, paths = multiprocessing.get_context("spawn"), {}, list(paths)
    while paths:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=read_all, args=(paths, sender))
        child.start()
        sender.close()
        try:
            receiver.poll(60)  # until the child has started
            while paths:
                result = receiver.recv() if receiver.poll(SECONDS) else "hang"
                if result:
                    found[paths[0]] = result
                paths = paths[1:]
                if result == "hang":
                    break
        except EOFError:
            found[paths[0]] = "crash"
            paths = paths[1:]
        child.kill()
        child.join()
    return found


@pytest.mark.parametrize(
    "seeds", [range(20), pytest.param(range(20, 400), marks=pytest.mark.slow)], ids=["quick", "all"]
)
@pytest.mark.parametrize("form", FORMATS)
def test_mutated_files(form, seeds, tmp_path):
    import weight_writers  # here, since the children import this module, and need no jax

    content = weight_writers.FORMATS[form][0](tmp_path / "intact", ARRAYS).read_bytes()
    for seed in seeds:
        (tmp_path / f"{seed:04}").write_bytes(mutated(content, seed))
    found = problems(sorted(tmp_path.iterdir()))
    crashes = sum(result == "crash" for result in found.values())
    print(f"{form}: {crashes} of {len(seeds)} files crash the reader")
    if form == "h5" and crashes <= CRASHES * len(seeds):
        found = {path: result for path, result in found.items() if result != "crash"}
    assert not found
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < PEAK
