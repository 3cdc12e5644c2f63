import platform
import subprocess
import sys

COUNT = """
import resource, sys
import numpy as np
from lungjax.runtime import environment
print(environment.keep_freed_memory() if sys.argv[1] == "keep" else False)
np.ones(4 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(4 << 20)  # 32 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(choice: str) -> tuple[str, int]:
    result = subprocess.run([sys.executable, "-c", COUNT, choice], capture_output=True, text=True, check=True)
    applied, faults = result.stdout.split()
    return applied, int(faults)


def test_reuse_of_freed_memory():
    reused, few = page_faults("keep")
    assert reused == str(platform.libc_ver()[0] == "glibc")
    assert reused == "False" or few * 10 < page_faults("leave")[1]
