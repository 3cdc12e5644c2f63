"""The folder of compiled programs."""

import os

from lungjax.runtime import environment


def test_folder_per_number_of_cores(monkeypatch, tmp_path):
    """A program that was compiled on one core would run on one core of a larger machine, too."""

    def folder(cores, **variables):
        monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path), **variables})
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
        monkeypatch.setattr(environment, "keep_freed_memory", lambda: True)
        environment.prepare_jax()
        return os.environ["JAX_COMPILATION_CACHE_DIR"]

    assert folder(1) != folder(2) == folder(2)
    assert folder(2).startswith(str(tmp_path))
    assert folder(2, JAX_COMPILATION_CACHE_DIR="mine") == "mine"
