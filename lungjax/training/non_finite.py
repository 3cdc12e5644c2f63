"""The policies of `train.on_nan` for a step with a non-finite loss or gradient: stop, skip and rewind.

The host sees the metrics of a step only at the next log line. So the step itself keeps the last good state (`select`),
and `check_steps` finds the bad step later.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lungjax.runtime.distributed import print_once
from lungjax.training.state import TrainState

if TYPE_CHECKING:  # the training step imports this module, and runs without orbax
    from lungjax.runtime.checkpoint import Checkpoints
    from lungjax.training.progress import Progress

MAX_CONSECUTIVE = 50  # skipped steps; more point to a real problem rather than a few bad batches
MAX_REWINDS = 5


class NonFiniteError(ValueError):
    """The loss or gradient was not finite at `step`; `cause` describes the batch, and the message adds advice."""

    def __init__(self, policy: str, step: int, cause: str):
        other = "; in this one, --set=train.on_nan=skip or rewind" if policy == "stop" else ""
        advice = "Check these examples. In another --workdir, try a smaller optim.lr or optim.clip_norm=1"
        super().__init__(f"{cause}. The checkpoints are intact. {advice}{other}")
        self.step, self.cause = step, cause


def select(policy: str, finite: jax.Array, updated: TrainState, state: TrainState) -> TrainState:
    """Returns `updated` if the step is finite, else `state` with new counters; only "skip" recovers from a bad step."""
    good = finite if policy == "skip" else finite & (state.bad_steps == 0)
    counted = state.replace(step=updated.step, bad_steps=state.bad_steps + 1)
    return jax.tree.map(lambda x, y: jnp.where(good, x, y), updated, counted)


def check_steps(
    policy: str, rows: Sequence[dict[str, Any]], last_step: int, progress: "Progress", batch_names: Callable[[int], str]
) -> tuple[list[dict[str, Any]], NonFiniteError | None]:
    """Returns the metrics of the finite steps, and an error if the run must stop or rewind.

    `rows` are the metrics of consecutive steps up to `last_step`; `batch_names(step)` lists the examples of a step. The
    first bad step is an error, but with "skip" only the last of MAX_CONSECUTIVE in a row is. Later metrics are dropped.
    """
    finite: list[dict[str, Any]] = []
    for step, row in enumerate(rows, last_step - len(rows) + 1):
        if row["finite"]:
            progress.consecutive_bad_steps = 0
            finite.append({name: value for name, value in row.items() if name != "finite"})
            continue
        cause = f"loss {row['loss']} and gradient norm {row['grad_norm']} at step {step}; batch: {batch_names(step)}"
        progress.consecutive_bad_steps += policy == "skip"
        if policy != "skip" or progress.consecutive_bad_steps >= MAX_CONSECUTIVE:
            return finite, NonFiniteError(policy, step, cause)
        print_once(f"Step skipped: {cause}")
    return finite, None


def with_counters(state: TrainState, **values: int) -> TrainState:
    """Returns the state with new values of `step` or `bad_steps`, all that steps after a bad one have changed."""
    counters = {name: getattr(state, name) for name in values}
    return state.replace(**{k: jnp.full_like(x, values[k], device=x.sharding) for k, x in counters.items()})


def rewind(
    checkpoints: "Checkpoints", abstract_state: TrainState, progress: "Progress", error: NonFiniteError
) -> tuple[TrainState, "Progress"]:
    """Returns the last checkpoint, with its progress moved past the bad batch. Raises ValueError after MAX_REWINDS."""
    if progress.rewinds == MAX_REWINDS:
        raise ValueError(f"{error}. The run has already been rewound {MAX_REWINDS} times")
    checkpoint = checkpoints.restore(abstract_state)
    assert checkpoint is not None  # train.on_nan=rewind saves one at the start
    state, restored = checkpoint[0], type(progress)(**checkpoint[1])
    restored.rewinds = progress.rewinds + 1
    restored.skipped_batches = progress.skipped_batches + error.step - int(state.step)
    print_once(f"{error.cause}. Rewinding to step {int(state.step)}; continuing with the examples after that batch")
    return state, restored
