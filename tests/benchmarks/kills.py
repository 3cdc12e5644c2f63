"""Kills a run at random moments and compares it with an uninterrupted one: python -m tests.benchmarks.kills"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lungjax.runtime.checkpoint import newest
from lungjax.training import metrics_log
from tests.benchmarks import harness

sys.path.insert(0, str(harness.ROOT / "tests"))
import small_runs as runs

FIELDS = ("model.head.dropout=0.3", "train.steps=150", "train.eval_steps=6", "train.save_steps=2")
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def outcome(workdir: Path) -> dict[str, Any]:
    """Returns the bytes of every array of the last state, its progress, and the validation losses."""
    rows = metrics_log.read(workdir / "metrics.jsonl")
    progress = workdir / "checkpoints/last" / str(newest(workdir, "last")) / "progress.json"
    return {
        "arrays": {path: array.tobytes() for path, array in runs.last_state(workdir).items()},
        "progress": json.loads(progress.read_text()),
        "validation losses": [row["val.slice.loss"] for row in rows if "val.slice.loss" in row],
    }


def last_step(workdir: Path) -> int:
    rows = metrics_log.read(workdir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def main() -> None:
    flags = harness.parse(__doc__, kills=20, seed=0)
    rng = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        command = [sys.executable, str(harness.ROOT / "tests/run_small.py"), "--pause=0.08", *FIELDS]
        subprocess.run([*command, str(whole)], check=True, **QUIET)
        moments = []
        while len(moments) < flags.kills:
            process = subprocess.Popen([*command, str(killed)], **QUIET)
            # Half of the kills come during training, the others at any time after the start.
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
        subprocess.run([*command, str(killed)], check=True, **QUIET)
        print(f"{len(moments)} kills; (last logged step, newest checkpoint) at each: {moments}")
        one, two = outcome(whole), outcome(killed)
        same = {name: one[name] == two[name] for name in one}
        print(f"{len(one['arrays'])} arrays, {len(one['validation losses'])} validation losses; identical: {same}")
        sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
