"""Process set-up before jax is imported: processor cores, memory allocator and compilation cache."""

import contextlib
import ctypes
import ctypes.util
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# From glibc's malloc.h. Its defaults return every large block to the kernel, so each training step would page-fault its
# buffers again, which took half of a small network's step. A trim threshold of -1 means never.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
SETTINGS = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 64 << 20, M_ARENA_MAX: 1}


def without_tpu() -> None:
    """Lets the TPU compiler load without a TPU, or while another process uses it. Call before jax is imported.

    The compiler then queries no metadata server and takes no lock. jax itself runs on the CPU, and programs are not
    cached, since jax can't read them back without TPUs.
    """
    settings = {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_ENABLE_COMPILATION_CACHE": "false",
    }  # fmt: skip
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def exit_with_parent() -> None:
    """Makes this worker process exit when its parent does, even if the parent is killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory; returns False for other C libraries. Call before jax is imported."""
    mallopt = _glibc("mallopt")
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in SETTINGS.items())


def trim_memory() -> None:
    """Gives the system the freed memory that `keep_freed_memory` keeps."""
    if trim := _glibc("malloc_trim"):
        trim(0)


@contextlib.contextmanager
def trimming() -> Iterator[None]:
    """Calls `trim_memory` now, and in this context whenever the process has grown by a tenth since the last call.

    Each training step allocates one block of up to some GiB. glibc (2.36) often can't place it in the gap that the last
    one has left, since it first needs a few bytes more for the alignment: the block moves, and the gap stays resident.
    """
    stop, glibc = threading.Event(), _glibc("malloc_trim") is not None

    def watch() -> None:
        limit = 0.0
        while glibc and not stop.wait(0.1):
            if resident_bytes() > limit:
                trim_memory()  # during a step, so its block is in use and stays
                limit = 1.1 * resident_bytes()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def resident_bytes() -> int:
    """Returns the resident memory of this process, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _glibc(function: str) -> Any:
    """Returns a function of glibc; None with another C library."""
    name = ctypes.util.find_library("c") or ""
    return getattr(ctypes.CDLL(name), function, None) if name.endswith("libc.so.6") else None


def prepare_jax() -> None:
    """Sets what jax reads at import: the allocator, the compilation cache, and deterministic GPU operations.

    The cache is in the user's cache folder unless JAX_COMPILATION_CACHE_DIR is set, with a folder for each number of
    cores: XLA splits operations for the cores it compiles on, but jax also loads programs of processes with other
    cores. It also holds the autotuned kernels of a GPU, so that the next run on this machine gives the same results.
    """
    keep_freed_memory()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(base) / "lungjax" / f"xla-{cores()}-cores"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    xla_flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_exclude_nondeterministic_ops" not in xla_flags:
        os.environ["XLA_FLAGS"] = f"{xla_flags} --xla_gpu_exclude_nondeterministic_ops=true".strip()
