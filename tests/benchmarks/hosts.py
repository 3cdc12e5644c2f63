"""Two processes of two CPU devices against one of four: python -m tests.benchmarks.hosts [FIELD=VALUE ...]

Trains the same small run (tests/run_small.py) both ways for 50 steps, and prints how far losses and test predictions
are apart. Fields change the run, such as model.name=efficientnet_lite0 input.size=64.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from lungjax.evaluation import predictions

SCRIPT = Path(__file__).parent.parent / "run_small.py"


def start(out: Path, devices: int, arguments: list[str]) -> subprocess.Popen:
    """Starts one process on a number of CPU devices."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, str(SCRIPT), str(out), *arguments], env=env, **quiet)


def main() -> None:
    """Prints one line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fields", nargs="*")
    parser.add_argument("--steps", type=int, default=50)
    flags = parser.parse_args()
    fields = [f"train.steps={flags.steps}", f"train.eval_steps={flags.steps}", "train.batch_size=16", *flags.fields]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        hosts = [start(two, 2, [*fields, "--hosts=2", f"--host={i}", f"--port={port}"]) for i in range(2)]
        codes = [process.wait() for process in hosts]
        codes.append(start(one, 4, fields).wait())
        if any(codes):
            sys.exit(f"the processes ended with {codes}")
        losses = [np.load(out.with_suffix(".npz"))["losses"] for out in (one, two)]
        apart = np.abs(losses[1] / losses[0] - 1)
        print(f"{len(apart)} losses, relative difference: first five {apart[:5].max():.1e}, all {apart.max():.1e}")
        tested = [predictions.read(out / "predictions_test.csv") for out in (one, two)]
        same = (tested[0].predicted == tested[1].predicted).all()
        most = np.abs(tested[0].probabilities - tested[1].probabilities).max()
        print(f"{len(tested[0])} test images: same classes {same}, probabilities {most:.1e} apart at most")


if __name__ == "__main__":
    main()
