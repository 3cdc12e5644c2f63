"""Kills a run at random moments and compares its end with that of a complete run: python -m tests.benchmarks.kills

Each kill is a SIGKILL to a process that trains a small network (tests/run_small.py: 150 steps, a validation every 6, a
checkpoint every 2), after at least one more step or at any moment. Prints the step of each kill, and whether weights,
optimizer, best score and validation scores at the end are bit-exact.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from orbax.checkpoint import v1 as ocp

from lungjax.runtime.checkpoint import newest
from lungjax.training import metrics_log

SCRIPT = Path(__file__).parent.parent / "run_small.py"


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Returns every array of the last state by path."""
    import jax

    last = newest(workdir, "last")
    state = ocp.load_checkpointables((workdir / "checkpoints/last" / str(last)).absolute())["state"]
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(state)}


def main() -> None:
    """Prints the comparison; exit code 1 if the runs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    draw = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as folder:
        complete, killed = Path(folder, "complete"), Path(folder, "killed")
        fields = ["model.head.dropout=0.3", "train.steps=150", "train.eval_steps=6", "train.save_steps=2"]
        command = [sys.executable, str(SCRIPT), "--pause=0.08"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*command, str(complete), *fields], check=True, **quiet)
        moments = []
        while len(moments) < flags.kills:
            process = subprocess.Popen([*command, str(killed), *fields], **quiet)
            # Half of the kills are during training, the other half at any time after the start.
            reached = (newest(killed, "last") or 0) + draw.randint(1, 12)
            deadline = time.time() + (120 if len(moments) % 2 else draw.uniform(0, 8))
            while process.poll() is None and time.time() < deadline:
                rows = metrics_log.read(killed / "metrics.jsonl")
                if len(moments) % 2 and rows and rows[-1]["step"] >= reached:
                    break
                time.sleep(0.005)
            time.sleep(draw.random() / 20)
            if process.poll() is not None:
                break  # the run was complete
            process.kill()
            process.wait()
            rows = metrics_log.read(killed / "metrics.jsonl")
            moments.append((rows[-1]["step"] if rows else 0, newest(killed, "last")))
        subprocess.run([*command, str(killed), *fields], check=True, **quiet)
        print(f"{len(moments)} kills; (last logged step, newest checkpoint) at each: {moments}")
        a, b = arrays(complete), arrays(killed)
        same = a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        progress = [
            json.loads((w / "checkpoints/last" / str(newest(w, "last")) / "progress.json").read_text())
            for w in (complete, killed)
        ]
        scores = [
            [row["val.slice.loss"] for row in metrics_log.read(w / "metrics.jsonl") if "val.slice.loss" in row]
            for w in (complete, killed)
        ]
        print(
            f"{len(a)} arrays bit-exact: {same}; progress: {progress[0] == progress[1]}; "
            f"{len(scores[0])} validation losses: {scores[0] == scores[1]}"
        )
        sys.exit(not (same and progress[0] == progress[1] and scores[0] == scores[1]))


if __name__ == "__main__":
    main()
