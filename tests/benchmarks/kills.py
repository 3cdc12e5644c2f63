"""Kills a run at random moments and compares its end with the untouched run's: python -m tests.benchmarks.kills

Each kill is a SIGKILL to a process of its own that trains a small network (tests/run_small.py: 150 steps, a
validation every 6, a checkpoint every 2), some time after it has made at least one further step. Prints where each kill
came and whether weights, optimiser, best score and validation scores at the end are the same bits.
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
    """Every array of the last state by path."""
    import jax

    last = newest(workdir, "last")
    found = ocp.load_checkpointables((workdir / "checkpoints/last" / str(last)).absolute())["state"]
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(found)}


def main() -> None:
    """Runs both and prints the comparison; exit code 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    draw = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder, "whole"), Path(folder, "cut")
        fields = ["model.head.dropout=0.3", "train.steps=150", "train.eval_steps=6", "train.save_steps=2"]
        command = [sys.executable, str(SCRIPT), "--pause=0.08"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*command, str(whole), *fields], check=True, **quiet)
        moments = []
        while len(moments) < flags.kills:
            process = subprocess.Popen([*command, str(cut), *fields], **quiet)
            # Half of the kills come while it trains, the other half anywhere from its start on.
            reached = (newest(cut, "last") or 0) + draw.randint(1, 12)
            deadline = time.time() + (120 if len(moments) % 2 else draw.uniform(0, 8))
            while process.poll() is None and time.time() < deadline:
                rows = metrics_log.read(cut / "metrics.jsonl")
                if len(moments) % 2 and rows and rows[-1]["step"] >= reached:
                    break
                time.sleep(0.005)
            time.sleep(draw.random() / 20)
            if process.poll() is not None:
                break  # it came to its end
            process.kill()
            process.wait()
            rows = metrics_log.read(cut / "metrics.jsonl")
            moments.append((rows[-1]["step"] if rows else 0, newest(cut, "last")))
        subprocess.run([*command, str(cut), *fields], check=True, **quiet)
        print(f"{len(moments)} kills; (last logged step, newest checkpoint) at each: {moments}")
        a, b = arrays(whole), arrays(cut)
        same = a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        progress = [
            json.loads((w / "checkpoints/last" / str(newest(w, "last")) / "progress.json").read_text())
            for w in (whole, cut)
        ]
        scores = [
            [row["val.slice.loss"] for row in metrics_log.read(w / "metrics.jsonl") if "val.slice.loss" in row]
            for w in (whole, cut)
        ]
        print(
            f"{len(a)} arrays the same bits: {same}; progress: {progress[0] == progress[1]}; "
            f"{len(scores[0])} validation losses: {scores[0] == scores[1]}"
        )
        sys.exit(not (same and progress[0] == progress[1] and scores[0] == scores[1]))


if __name__ == "__main__":
    main()
