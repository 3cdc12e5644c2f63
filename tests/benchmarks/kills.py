"""Kills a run at random moments and compares it with an uninterrupted one.

python -m tests.benchmarks.kills [--kills=20] [--seed=0]
"""

import random
import sys
import tempfile
import time
from pathlib import Path

from lungjax.runtime.checkpoint import newest
from lungjax.training.progress import last_step
from tests.benchmarks import harness

sys.path.insert(0, str(harness.ROOT / "tests"))
import small_runs as runs

FIELDS = ("--pause=0.08", "model.head.dropout=0.3", "train.steps=150", "train.eval_steps=6", "train.save_steps=2")


def main() -> None:
    flags = harness.parse(__doc__, kills=20, seed=0)
    rng = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as folder:
        uninterrupted, killed = Path(folder, "uninterrupted"), Path(folder, "killed")
        runs.finish([runs.start(uninterrupted, 1, *FIELDS)])
        moments = []
        while len(moments) < flags.kills:
            process = runs.start(killed, 1, *FIELDS)
            # Half of the kills occur during training, the others at any time after the start.
            in_training = len(moments) % 2
            target = (newest(killed, "last") or 0) + rng.randint(1, 12)
            deadline = time.time() + (120 if in_training else rng.uniform(0, 8))
            while process.poll() is None and time.time() < deadline:
                if in_training and last_step(killed) >= target:
                    break
                time.sleep(0.005)
            time.sleep(rng.random() / 20)
            if process.poll() is not None:
                break  # it has finished
            process.kill()
            process.wait()
            moments.append((last_step(killed), newest(killed, "last")))
        runs.finish([runs.start(killed, 1, *FIELDS)])
        runs.assert_same_end(uninterrupted, killed)
    print(f"identical after {len(moments)} kills; (last logged step, newest checkpoint) at each: {moments}")


if __name__ == "__main__":
    main()
