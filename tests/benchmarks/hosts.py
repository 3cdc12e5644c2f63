"""Two processes with two CPU devices each against one with four: python -m tests.benchmarks.hosts [FIELD=VALUE ...]

Trains the same small run (tests/run_small.py) both ways for 50 steps, and prints the differences of losses and test
predictions. Fields change the run, such as model.name=efficientnet_lite0 input.size=64.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from lungjax.evaluation import predictions
from tests.benchmarks import harness

sys.path.insert(0, str(harness.ROOT / "tests"))
import small_runs as runs


def main() -> None:
    flags = harness.parse(__doc__, positional="fields", steps=50)
    # Not Adam: a bias before a norm has only rounding errors for a gradient, which Adam scales to steps of full size.
    fields = ["optim.name=sgd", "optim.lr=0.01", f"train.steps={flags.steps}", f"train.eval_steps={flags.steps}"]
    fields += ["train.batch_size=16", *flags.fields]
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        runs.finish([*runs.start_hosts(two, *[" ".join(fields)] * 2), runs.start(one, 4, *fields)])
        losses = [np.load(out.with_suffix(".npz"))["losses"] for out in (one, two)]
        error = np.abs(losses[1] / losses[0] - 1)
        print(f"{len(error)} losses, relative difference: first five {error[:5].max():.1e}, all {error.max():.1e}")
        a, b = (predictions.read(out / "predictions_test.csv") for out in (one, two))
        same, error = (a.predicted == b.predicted).all(), np.abs(a.probabilities - b.probabilities).max()
        print(f"{len(a)} test images: same classes {same}, maximum difference of probabilities {error:.1e}")


if __name__ == "__main__":
    main()
