"""Support for runs on several hosts: start-up, agreement and errors. On a single host every function is trivial."""

import errno
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
from tqdm import tqdm

from lungjax.runtime import signals
from lungjax.runtime.advice import in_user_form

T = TypeVar("T")
MAX_MESSAGE = 2000  # bytes of an error message that is sent to the other hosts


class CollectiveError(ValueError):
    """An error that all hosts raise together."""


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Connects this process to the others of the run, before jax initializes its devices; raises ValueError."""
    if len({x is None for x in (coordinator, processes, process)}) > 1:
        raise ValueError(
            f"--coordinator={coordinator} --processes={processes} --process={process}: give all three, or none where "
            "the cluster is detected (Cloud TPU, GKE, SLURM, Open MPI)"
        )
    if process is not None and processes is not None and not 0 <= process < processes:
        raise ValueError(f"--process={process}: expected 0 to {processes - 1}, with --processes={processes}")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        what = str(error).splitlines()[0]
        raise ValueError(
            f"--multihost: could not connect to the other hosts ({what}). Outside Cloud TPU, GKE, SLURM and Open "
            "MPI, give --coordinator=HOST:PORT --processes=N --process=I on every host; open the port in the firewall"
        ) from error


def is_first_host() -> bool:
    """Returns whether this host logs and writes."""
    return jax.process_index() == 0


def print_once(line: str) -> None:
    """Prints a line on the first host, above its progress bar."""
    if is_first_host():
        try:
            tqdm.write(line)
        except OSError as error:
            if error.errno != errno.EIO:  # of a closed terminal, whose SIGHUP is handled by `signals`
                raise


def broadcast_int(value: int) -> int:
    """Returns the first host's `value` on every host."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def preempted() -> Callable[[int], bool] | None:
    """Returns a function that tells if all hosts should stop at a step because one got SIGTERM; None for one host.

    jax's preemption service catches the signal and chooses a step that no host has passed.
    """
    return multihost_utils.reached_preemption_sync_point if jax.process_count() > 1 else None


def run_on_all_hosts(work: Callable[[], T]) -> T:
    """Runs `work` on every host and returns its result; if it fails on one of them, all fail.

    Otherwise, a host with a missing file would exit, and the others would wait for it until a timeout.
    Raises CollectiveError on every host with the message of the first host that raised ValueError or OSError.
    """
    if jax.process_count() == 1:
        return work()
    message, result, cause = "", None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        message, cause = str(error) or repr(error), error
    text = message.encode()[:MAX_MESSAGE].ljust(MAX_MESSAGE, b"\0")
    messages = np.asarray(multihost_utils.process_allgather(np.frombuffer(text, np.uint8)))
    for host, row in enumerate(messages.reshape(-1, MAX_MESSAGE)):
        message = row.tobytes().rstrip(b"\0").decode(errors="replace")
        if message:
            raise CollectiveError(f"host {host} of {len(messages)}: {message}") from cause
    return result  # type: ignore[return-value]


def on_first_host(work: Callable[[], T]) -> T | None:
    """Runs `work` on the first host and returns its result there, None elsewhere; if it fails, all hosts fail."""
    return run_on_all_hosts(lambda: work() if is_first_host() else None)


@contextmanager
def abort_all_on_error() -> Iterator[None]:
    """Prints the error and ends this process immediately if only this one of several hosts fails.

    A regular exit would wait minutes for the other hosts, which wait for this one; here, jax's heartbeat ends them.
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
        message = f"lungjax: host {jax.process_index()} of {jax.process_count()}: {error}"
        print(in_user_form(message), file=sys.stderr, flush=True)
        os._exit(2)


def check_same(facts: Mapping[str, str]) -> None:
    """Raises CollectiveError on every host if `facts`, which must have the same keys on all hosts, differ."""
    digests = np.stack([np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8) for value in facts.values()])
    all_digests = np.asarray(multihost_utils.process_allgather(digests)).reshape(-1, *digests.shape)
    differ = (all_digests != all_digests[0]).any(2).T  # [facts, hosts]
    hosts = {name: ", ".join(map(str, np.flatnonzero(row))) for name, row in zip(facts, differ, strict=True)}
    lines = [f"{name} (host 0 against {others})" for name, others in hosts.items() if others]
    if lines:
        raise CollectiveError(f"the hosts differ in {'; '.join(lines)}: each needs the same command, code and data")
