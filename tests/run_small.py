"""A small run in its own process: python tests/run_small.py OUT [FIELD=VALUE ...] [--host=I --hosts=N --port=P]

Trains `small_runs.PLAIN` (with --all: `small_runs.CONFIG`) and saves losses and test predictions as OUT.npz. With
--pause, it waits before each step, for tests that stop the run. With --hosts, this process is one host of a run.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    import conftest  # here, since reader processes import this file as well
    import jax
    import numpy as np
    import pytest
    import small_runs as runs

    from lungjax.evaluation import predictions
    from lungjax.runtime import distributed, signals
    from lungjax.training import metrics_log, train

    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("fields", nargs="*")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--fail_at", type=int, default=0)  # step whose batch can't be read on this host
    parser.add_argument("--differ")  # assignment of a first run, which must fail since another host's differs
    parser.add_argument("--host", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--port", type=int)
    flags = parser.parse_intermixed_args()
    if flags.hosts > 1:
        distributed.start(f"localhost:{flags.port}", flags.hosts, flags.host)
    elif "SLURM_JOB_ID" in os.environ:
        distributed.start()

    def wait_or_fail(step, batch):
        time.sleep(flags.pause)
        if step == flags.fail_at:
            raise ValueError("7.png can't be read")
        return batch

    runs.patched(pytest.MonkeyPatch(), conftest.make_small_data())
    runs.change_batches(pytest.MonkeyPatch(), wait_or_fail)
    out, config = flags.out, runs.changed(runs.CONFIG if flags.all else runs.PLAIN, *flags.fields)
    try:
        with distributed.abort_all_on_error():
            if flags.differ:
                with pytest.raises(distributed.CollectiveError) as error:
                    train.run(runs.changed(config, flags.differ), out, out.parent)
                print(error.value, "(nothing is written)" * (not out.exists()), file=sys.stderr)
            train.run(config, out, out.parent)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except signals.Interrupted as stop:
        sys.exit(128 + stop.number)
    if distributed.is_first_host():
        np.savez(
            out.with_suffix(".npz"),
            probabilities=predictions.read(out / "predictions_test.csv").probabilities,
            losses=[row["train.loss"] for row in metrics_log.read(out / "metrics.jsonl") if "train.loss" in row],
            devices=jax.device_count(),
        )


if __name__ == "__main__":
    main()
