"""Several hosts in one run: starting them, and what they must agree on. On a single host all of it is free."""

import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lungjax.runtime import signals

T = TypeVar("T")


class CollectiveError(ValueError):
    """An error that every host raises at once."""


LONGEST = 2000  # bytes of an error message that the other hosts get to see


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins this process to the run's other ones; to be called before anything else asks jax for devices.

    Args:
      coordinator: HOST:PORT of process 0. None, as the rest, where jax finds it out: Cloud TPU, GKE, SLURM, Open MPI.
      processes: how many there are.
      process: the number of this one, from 0.

    Raises ValueError if the others can't be found or reached.
    """
    given = (coordinator, processes, process)
    if any(x is not None for x in given) and any(x is None for x in given):
        raise ValueError(
            f"--coordinator={coordinator} --processes={processes} --process={process}: give all three, or none where "
            "the cluster is detected (Cloud TPU, GKE, SLURM, Open MPI)"
        )
    if process is not None and processes is not None and not 0 <= process < processes:
        raise ValueError(f"--process={process}: with --processes={processes} allowed is 0 to {processes - 1}")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        what = str(error).splitlines()[0]
        raise ValueError(
            f"--multihost: the hosts did not come together ({what}). Outside Cloud TPU, GKE, SLURM and Open MPI give "
            "--coordinator=HOST:PORT --processes=N --process=I on every host, and let the port through"
        ) from error


def is_first_host() -> bool:
    """Returns whether this is the host that logs and writes."""
    return jax.process_index() == 0


def broadcast_int(value: int) -> int:
    """Returns the first host's `value` on every host."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def preempted() -> Callable[[int], bool] | None:
    """Returns what tells, of a step, whether a SIGTERM reached any host and all shall end there; None for one host.

    jax's preemption service catches the signal, and names a step that no host has passed yet.
    """
    return multihost_utils.reached_preemption_sync_point if jax.process_count() > 1 else None


def run_on_all_hosts(work: Callable[[], T]) -> T:
    """Runs `work` on every host and returns its result; if one of them fails, all do.

    Without this a host with a missing file would end, and the others wait for it until a timeout kills them.
    Raises Agreed on every host with the first failing host's message, if it was a ValueError or OSError there.
    """
    if jax.process_count() == 1:
        return work()
    message, result, cause = "", None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        message, cause = str(error) or repr(error), error
    text = message.encode()[:LONGEST].ljust(LONGEST, b"\0")
    everyone = np.asarray(multihost_utils.process_allgather(np.frombuffer(text, np.uint8)))
    for number, row in enumerate(everyone.reshape(-1, LONGEST)):
        said = row.tobytes().rstrip(b"\0").decode(errors="replace")
        if said:
            raise CollectiveError(f"host {number} of {len(everyone)}: {said}") from cause
    return result  # type: ignore[return-value]


@contextmanager
def abort_all_on_error() -> Iterator[None]:
    """Ends this process at once, with its message, if it alone of several hosts fails.

    A usual exit would wait five minutes for the others, which wait for this host's part of a step. Without it jax's
    heartbeat ends them sooner.
    """
    try:
        yield
    except (CollectiveError, signals.Interrupted):
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if not isinstance(error, ValueError | OSError):
            traceback.print_exc()
        print(f"lungjax: host {jax.process_index()} of {jax.process_count()}: {error}", file=sys.stderr, flush=True)
        os._exit(2)


def check_same(facts: Mapping[str, str]) -> None:
    """Raises Agreed on every host, naming fact and hosts, if `facts` (same keys everywhere) are not all equal."""
    if jax.process_count() == 1:
        return
    mine = np.stack([np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8) for value in facts.values()])
    everyone = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, *mine.shape)
    differ = (everyone != everyone[0]).any(2)  # [hosts, facts]
    lines = [
        f"{name} (host 0 against {', '.join(map(str, np.flatnonzero(differ[:, i])))})"
        for i, name in enumerate(facts)
        if differ[:, i].any()
    ]
    if lines:
        raise CollectiveError(
            f"the hosts differ in {'; '.join(lines)}. Give every host the same command, code and prepared data"
        )
