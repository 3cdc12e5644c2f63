"""Freed memory of the process."""

import subprocess
import sys

CODE = """
import time
import numpy as np
from lungjax.runtime import environment

def ones(megabytes):
    return np.ones(megabytes << 20, np.uint8)

def added():
    return (environment.resident_bytes() - before) >> 20

if environment.keep_freed_memory():  # glibc
    before = environment.resident_bytes()
    pairs = [(ones(64), ones(1)) for _ in range(6)]
    small = [pair[1] for pair in pairs]  # between the gaps, which can't be merged
    del pairs
    assert added() > 384, added()
    with environment.trimming():
        large = ones(128)
        end = time.monotonic() + 30
        while added() > 200 and time.monotonic() < end:
            time.sleep(0.05)
        assert 134 <= added() <= 200 and large.all(), added()
"""


def test_trimming_of_gaps():
    """The gaps of freed blocks stay resident for later steps, but not if a larger block needs more memory."""
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
