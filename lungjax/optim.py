"""The optimiser of a run: learning-rate schedule, optax chain, decay and freezing by parameter path."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from lungjax import trees
from lungjax.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Returns step -> learning rate: a linear warm-up, then the named schedule over the rest of `steps`."""
    rest = max(steps - config.warmup_steps, 1)
    main: optax.Schedule
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.lr, rest, alpha=config.end_factor)
    elif config.schedule == "linear":
        main = optax.linear_schedule(config.lr, config.lr * config.end_factor, rest)
    elif config.schedule == "step":
        falls = {round(part * rest): config.decay_factor for part in config.decay_at}
        main = optax.piecewise_constant_schedule(config.lr, falls)
    else:
        main = optax.constant_schedule(config.lr)
    if not config.warmup_steps:
        return main
    # Step 0 already learns: a first step at rate zero would be wasted.
    warmup = optax.linear_schedule(config.lr / config.warmup_steps, config.lr, config.warmup_steps - 1)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def make_optimizer(config: OptimConfig, schedule: optax.Schedule, params: Any) -> optax.GradientTransformation:
    """Builds the optax chain. `params` may be shapes alone; only its paths are read.

    Raises ValueError if `optim.freeze` leaves nothing to train, or matches nothing.
    """
    parts: list[optax.GradientTransformation] = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name in ("adam", "adamw"):
        parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    elif config.name == "rmsprop":
        parts.append(optax.scale_by_rms(decay=0.9, eps=config.eps))
    if config.weight_decay:
        # Norm scales, offsets and biases are left alone, as every recipe of these networks does.
        parts.append(optax.add_decayed_weights(config.weight_decay, trees.mask(params, r"kernel$")))
    if config.name in ("sgd", "rmsprop") and config.momentum:
        parts.append(optax.trace(decay=config.momentum, nesterov=config.nesterov))
    chain = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
    if not config.freeze:
        return chain
    frozen = trees.mask(params, config.freeze)
    flags = list(trees.flatten(frozen).values())
    if not any(flags):
        raise ValueError(
            f"optim.freeze={config.freeze!r} matches no parameter, such as {next(iter(trees.flatten(params)))!r}"
        )
    if all(flags):
        raise ValueError(f"optim.freeze={config.freeze!r} matches every parameter: nothing is left to train")
    labels = trees.unflatten({k: "frozen" if v else "trained" for k, v in trees.flatten(frozen).items()})
    return optax.multi_transform({"frozen": optax.set_to_zero(), "trained": chain}, labels)


def class_weights(setting: str, labels: np.ndarray, classes: tuple[str, ...]) -> jnp.ndarray:
    """Returns [C] float32 loss weights from `optim.class_weights` and the train labels.

    "balanced" is n / (C * n_c), scikit-learn's rule. Raises ValueError for a wrong count of numbers.
    """
    if setting == "none":
        return jnp.ones(len(classes), jnp.float32)
    if setting == "balanced":
        counts = np.bincount(labels, minlength=len(classes))
        return jnp.asarray(len(labels) / (len(classes) * counts), jnp.float32)
    try:
        numbers = [float(t) for t in setting.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(classes) or min(numbers) < 0:
        raise ValueError(
            f"optim.class_weights={setting!r}: expected none, balanced, or {len(classes)} numbers with commas "
            f"for {', '.join(classes)}"
        )
    return jnp.asarray(numbers, jnp.float32)
