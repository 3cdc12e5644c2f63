"""The machine: how many cores the process has, and on Linux that memory freed by XLA stays for the next step."""

import ctypes
import ctypes.util
import os
from pathlib import Path

# glibc's malloc.h. Its defaults hand every large block back to the kernel, so each training step would fault its
# buffers in again, page by page; that cost half of a small network's step.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
SETTINGS = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 << 20, M_ARENA_MAX: 1}


def without_tpu() -> None:
    """Lets the TPU compiler be loaded where there is no TPU, or another process has it. Call before jax is imported.

    It then asks no metadata server what machine this is and takes no lock, jax itself runs on the CPU, and no program
    goes into the compilation cache, from which jax can't read it back without TPUs.
    """
    settings = {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }  # fmt: skip
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def cores() -> int:
    """Returns how many processor cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory; returns whether it did. Call before jax is imported.

    The process's peak does not grow by it, but it stays at its peak. Other C libraries are left alone.
    """
    name = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is None or not name or not name.endswith("libc.so.6"):
        return False
    return all(mallopt(option, value) == 1 for option, value in SETTINGS.items())


def prepare_jax() -> None:
    """Sets what jax reads when it is imported: memory that stays, the compilation cache, and repeatable GPU sums.

    The cache lies in the user's cache folder unless JAX_COMPILATION_CACHE_DIR says where. With it a GPU's choice of
    kernels is kept as well, so that the next run of this machine computes the same.
    """
    keep_freed_memory()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(base) / "lungjax" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    if "xla_gpu_exclude_nondeterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_exclude_nondeterministic_ops=true".strip()
        )
