"""The optimizer of a run: learning rate schedule, optax chain, weight decay, and freezing by parameter path."""

import math
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from lungjax.config import OptimConfig
from lungjax.models import trees

# Positions (stage, block) in the order of the forward pass.
LAST = 10**6
TOP, HEAD = (LAST, 0), (LAST, 1)


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Returns the schedule: linear warm-up, `optim.schedule` up to `optim.schedule_steps` or `steps`, then constant."""
    rest = max((config.schedule_steps or steps) - config.warmup_steps, 1)
    main: optax.Schedule
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.lr, rest, alpha=config.end_factor)
    elif config.schedule == "linear":
        main = optax.linear_schedule(config.lr, config.lr * config.end_factor, rest)
    elif config.schedule == "step":
        factors = {round(part * rest): config.decay_factor for part in config.decay_at}
        main = optax.piecewise_constant_schedule(config.lr, factors)
    else:
        main = optax.constant_schedule(config.lr)
    if not config.warmup_steps:
        return main
    # Starts above zero, since a rate of zero would waste step 0.
    warmup = optax.linear_schedule(config.lr / config.warmup_steps, config.lr, config.warmup_steps - 1)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def average(decay: float, updates: jax.Array, ema: Any, variables: Any) -> Any:
    """Returns the average `ema` with the `variables` after the next update; `updates` is the number of earlier ones.

    The decay is min(decay, (1 + updates) / (10 + updates)), as in TensorFlow's ExponentialMovingAverage. BatchNorm's
    statistics are averaged with the weights, as in timm's ModelEmaV2: the mean of a convolution's output is linear in
    its weights, so the averaged means fit the averaged weights, and the last ones would not.
    """
    rate = jnp.maximum(1 - decay, 9 / (10 + updates))
    # In contrast to optax.incremental_update, this keeps the bits of statistics that do not change.
    return jax.tree.map(lambda old, new: old + rate * (new - old), ema, variables)


def frozen_paths(config: OptimConfig, params: Any) -> frozenset[str]:
    """Returns the paths of the parameters that `optim.tune` and `optim.freeze` freeze.

    Raises ValueError for an unknown `tune`, for more blocks or stages than the network has, for a `freeze` that matches
    nothing, or if no parameter remains trainable.
    """
    paths = list(trees.flatten(params))
    positions: dict[str, tuple[int, ...]] = {path: _position(path) for path in paths}
    kind, _, count = config.tune.partition(":")
    first: tuple[int, ...] = (0, 0)
    if config.tune == "head":
        first = HEAD
    elif kind in ("blocks", "stages") and count.isdecimal() and int(count) > 0:
        in_stages = [position for position in positions.values() if 0 < position[0] < LAST]
        if kind == "stages":
            units = sorted({position[:1] for position in in_stages})
        else:
            units = sorted({position for position in in_stages if 0 < position[1] < LAST})
        if int(count) > len(units):
            raise ValueError(f"optim.tune={config.tune!r}: the network has {len(units)} {kind}")
        first = units[-int(count)]
    elif config.tune != "all":
        raise ValueError(f"optim.tune={config.tune!r}: expected all, head, blocks:K or stages:K")
    frozen = {path for path, position in positions.items() if position < first}
    if config.freeze:
        frozen |= set(_match(config.freeze, paths, f"optim.freeze={config.freeze!r}"))
    if len(frozen) == len(paths):
        settings = f"optim.tune={config.tune!r}, optim.freeze={config.freeze!r}"
        raise ValueError(f"{settings} freeze every parameter: nothing is left to train")
    return frozenset(frozen)


def _match(pattern: str, paths: Collection[str], setting: str, what: str = "parameter") -> list[str]:
    try:
        matches = [path for path in paths if re.search(pattern, path)]
    except re.error as error:
        raise ValueError(f"{setting}: not a regular expression: {error}") from None
    if not matches:
        raise ValueError(f"{setting} matches no {what}, such as {next(iter(paths))!r}")
    return matches


def _position(path: str) -> tuple[int, int]:
    """Returns the position of a layer, which follows from the names that all networks share."""
    stage = re.match(r"stage(\d+)_([a-z]+)(\d*)", path)
    if stage:
        unnumbered = {"downsample": 0, "transition": LAST}.get(stage[2], 1)
        return int(stage[1]), int(stage[3]) if stage[3] else unnumbered
    if path.startswith("head/"):
        return HEAD
    return TOP if path.startswith("top") else (0, 0)


def make_optimizer(config: OptimConfig, schedule: optax.Schedule, params: Any) -> optax.GradientTransformation:
    """Returns the optax chain for the paths of trainable `params`. Raises ValueError for invalid `optim.lr_factors`."""
    parts: list[optax.GradientTransformation] = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name in ("adam", "adamw"):
        parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    elif config.name == "rmsprop":
        parts.append(optax.scale_by_rms(decay=0.9, eps=config.eps))
    if config.weight_decay:
        # No recipe of these networks decays norm scales or biases.
        kernels = traverse_util.path_aware_map(lambda path, _: path[-1] == "kernel", params)
        parts.append(optax.add_decayed_weights(config.weight_decay, kernels))
    if config.name in ("sgd", "rmsprop") and config.momentum:
        parts.append(optax.trace(decay=config.momentum, nesterov=config.nesterov))
    parts.append(optax.scale_by_learning_rate(schedule))
    if config.lr_factors:
        factors = _factors(config.lr_factors, params)
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors)))
    return optax.chain(*parts)


def _factors(settings: tuple[str, ...], params: Any) -> dict[str, Any]:
    leaves = dict.fromkeys(trees.flatten(params), 1.0)
    for setting in reversed(settings):  # the first match overwrites later ones
        pattern, _, number = setting.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = -1.0
        if not pattern or not 0 <= factor < math.inf:
            raise ValueError(f"optim.lr_factors={setting!r}: expected REGEX=FACTOR, such as ^head/=10")
        leaves |= dict.fromkeys(_match(pattern, leaves, f"optim.lr_factors={setting!r}", "trained parameter"), factor)
    return trees.unflatten(leaves)


def class_weights(setting: str, labels: np.ndarray, classes: tuple[str, ...]) -> jnp.ndarray:
    """Returns the loss weights float32 [C] of `optim.class_weights`; "balanced" is n / (C * n_c), as in scikit-learn.

    For findings, `labels` [N, C], they are [2, C], of absent and present findings: "balanced" has C = 2 and the known
    labels of each finding, and given numbers are for present findings. Raises ValueError for numbers that are
    malformed, negative, or not one per class.
    """
    if labels.ndim == 2:
        if setting == "balanced":
            return jnp.stack([class_weights(setting, y[y >= 0], ("absent", "present")) for y in labels.T], axis=1)
        present = class_weights(setting, labels[:, 0], classes)
        return jnp.stack([jnp.ones_like(present), present])
    if setting == "none":
        return jnp.ones(len(classes), jnp.float32)
    if setting == "balanced":
        counts = np.bincount(labels, minlength=len(classes))
        return jnp.asarray(len(labels) / (len(classes) * np.maximum(counts, 1)), jnp.float32)
    try:
        numbers = [float(t) for t in setting.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(classes) or min(numbers) < 0:
        names = ", ".join(classes)
        raise ValueError(f"optim.class_weights={setting!r}: expected none, balanced, or a number for each of {names}")
    return jnp.asarray(numbers, jnp.float32)
