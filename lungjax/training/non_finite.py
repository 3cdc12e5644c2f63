"""Policies of `train.on_nan` for a step whose loss or gradient is not finite:

    stop    saves the state before that step and raises an error with the names of the batch's examples
    skip    continues with the next batch, up to MAX_SKIPPED bad steps in a row
    rewind  returns to the last checkpoint and continues with the examples after the bad batch, up to MAX_REWINDS times

The host sees the metrics of a step only at the next log line, so the step itself leaves the state unchanged (`select`).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lungjax.runtime import distributed
from lungjax.training.state import TrainState

if TYPE_CHECKING:  # the training step imports this module, and runs without orbax
    from lungjax.runtime.checkpoint import Checkpoints
    from lungjax.training.early_stopping import Progress

MAX_SKIPPED = 50  # more point to a real problem, not to single bad batches
MAX_REWINDS = 5


class NonFiniteError(ValueError):
    """The loss or gradient was not finite at `step`. `cause` names the batch; the message adds advice."""

    def __init__(self, step: int, cause: str):
        super().__init__(
            f"{cause}. The last good state is saved. Check these examples; a smaller optim.lr or optim.clip_norm=1 may "
            "help (in another --workdir), or --set=train.on_nan=skip or rewind in this one"
        )
        self.step, self.cause = step, cause


def select(policy: str, finite: jax.Array, updated: TrainState, state: TrainState) -> TrainState:
    """Returns `updated` if the step was finite, otherwise `state` with only the counters `step` and `skipped` advanced.

    Unless the policy is "skip", a bad step also disables all steps after it, so that the state stays the last good one.
    """
    good = finite if policy == "skip" else finite & (state.skipped == 0)
    counted = state.replace(step=updated.step, skipped=state.skipped + 1)
    return jax.tree.map(lambda x, y: jnp.where(good, x, y), updated, counted)


def finite_steps(
    policy: str, rows: Sequence[dict[str, Any]], last_step: int, progress: "Progress", batch_names: Callable[[int], str]
) -> list[dict[str, Any]]:
    """Returns the metrics of the finite steps among those up to `last_step`, without the flag `finite`.

    `rows` are the metrics of consecutive steps, `batch_names(step)` lists the examples of a step. Raises NonFiniteError
    for the first bad step; with "skip" only after MAX_SKIPPED in a row.
    """
    for step, row in enumerate(rows, last_step - len(rows) + 1):
        progress.consecutive_bad_steps = 0 if row["finite"] else progress.consecutive_bad_steps + 1
        if row["finite"]:
            continue
        cause = f"loss {row['loss']} and gradient norm {row['grad_norm']} at step {step}; batch: {batch_names(step)}"
        if policy != "skip" or progress.consecutive_bad_steps >= MAX_SKIPPED:
            raise NonFiniteError(step, cause)
        distributed.print_once(f"Step skipped: {cause}")
    return [{k: v for k, v in row.items() if k != "finite"} for row in rows if row["finite"]]


def rewind(
    checkpoints: "Checkpoints", abstract_state: TrainState, progress: "Progress", error: NonFiniteError
) -> tuple[TrainState, "Progress"]:
    """Returns the last checkpoint, with the data moved past the bad batch. Raises ValueError after MAX_REWINDS."""
    if progress.rewinds == MAX_REWINDS:
        raise ValueError(f"{error}. The run has already been rewound {MAX_REWINDS} times")
    checkpoint = checkpoints.restore(abstract_state)
    assert checkpoint is not None  # train.on_nan=rewind saves one at the start
    state, restored = checkpoint[0], type(progress)(**checkpoint[1])
    restored.rewinds = progress.rewinds + 1
    restored.skipped_batches = progress.skipped_batches + error.step - int(state.step)
    distributed.print_once(
        f"{error.cause}. Rewinding to step {int(state.step)}; continuing with the examples after that batch"
    )
    return state, restored
