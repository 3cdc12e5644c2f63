"""Validation of a configuration; needs no device."""

from lungjax.config import schema
from lungjax.config.schema import Config, fields_of

POSITIVE = (
    "train.batch_size", "train.log_steps", "train.accumulate", "optim.lr", "data.prefetch", "optim.eps",
    "model.epsilon", "input.size", "input.std",
)  # fmt: skip
NOT_NEGATIVE = (
    "train.steps", "train.eval_steps", "train.save_steps", "train.patience", "train.seed", "data.workers",
    "data.threads", "optim.warmup_steps", "optim.weight_decay", "optim.clip_norm", "input.box_margin", "eval.examples",
    "train.epochs", "train.devices", "eval.batch_size", "optim.schedule_steps", "eval.draws",
)  # fmt: skip
FRACTIONS_BELOW_ONE = (
    "optim.label_smoothing", "optim.ema", "model.momentum", "model.head.dropout", "model.head.hidden_dropout",
    "model.drop_path", "model.dropout",
)  # fmt: skip
FRACTIONS = ("eval.sensitivity",)


def _check_augment(config: Config) -> None:
    """Raises ValueError for the first field of `augment` whose value is out of bounds or whose range is reversed."""
    bounds = {
        "exterior": (0, 1), "flip_horizontal": (0, 1), "flip_vertical": (0, 1), "rotation": (0, 0.5), "shear": (0, 1),
        "shift": (0, 1), "box_jitter": (0, 0.4), "fill_value": (0, 255), "zoom": (-0.9, 1), "brightness": (0, 100),
        "contrast": (0, 100), "gamma": (0.01, 100), "intensity_shift": (0, 255), "intensity_scale": (0, 1),
        "invert": (0, 1), "dropout": (0, 1), "dropout_grid": (1, 256), "noise": (0, 255), "probability": (0, 1),
        "mixup": (0, 100), "cutmix": (0, 100),
    }  # fmt: skip
    augment = config.augment
    for name, (low, high) in bounds.items():
        value = getattr(augment, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(low <= number <= high for number in numbers):  # also False for nan
            raise ValueError(f"augment.{name}={value}: expected {low} to {high}")
        if isinstance(value, tuple) and (len(value) != 2 or (name != "shift" and value[0] > value[1])):
            raise ValueError(f"augment.{name}={value}: expected two numbers in increasing order")
    margin = config.input.box_margin
    if augment.box_jitter and (config.input.crop != "box" or margin < augment.box_jitter):
        needs = f"input.crop=box and at least the same input.box_margin; it is {margin:g}"
        raise ValueError(f"augment.box_jitter={augment.box_jitter} needs {needs}")
    if margin and config.input.crop == "none":
        raise ValueError(f"input.box_margin={margin} needs input.crop=box or center")


def _check_splits(config: Config) -> None:
    """Raises ValueError for invalid folds or train.fraction."""
    data, fraction = config.data, config.train.fraction
    if data.folds and data.folds < 3:
        raise ValueError(f"data.folds={data.folds}: must be 0, or at least 3 (one each for test, val and train)")
    if not 0 <= data.fold < max(data.folds, 1):
        allowed = f"0 to {data.folds - 1}" if data.folds else "only 0 without data.folds"
        raise ValueError(f"data.fold={data.fold}: expected {allowed}")
    for name, value in (("folds", data.folds), ("test_source", data.test_source)):
        if value and data.protocol != "clean":
            raise ValueError(f"data.{name}={value} needs data.protocol=clean: a study has fixed splits")
    if data.folds and data.test_source:
        raise ValueError(f"data.folds={data.folds} and data.test_source={data.test_source}: set only one of them")
    if not 0 < fraction <= 1:
        raise ValueError(f"train.fraction={fraction}: must be above 0 and at most 1")


def check(config: Config) -> None:
    """Raises ValueError for the first invalid field."""
    leaves = fields_of(config)
    for path, allowed in schema.CHOICES.items():
        if leaves[path] is not None and leaves[path] not in allowed:
            raise ValueError(f"{path}={leaves[path]!r}: expected {', '.join(map(str, allowed))}")
    for paths, valid, requirement in (
        (POSITIVE, lambda number: number > 0, "must be above zero"),
        (NOT_NEGATIVE, lambda number: number >= 0, "must not be negative"),
        (FRACTIONS_BELOW_ONE, lambda number: 0 <= number < 1, "must be at least 0 and below 1"),
        (FRACTIONS, lambda number: 0 <= number <= 1, "must be from 0 to 1"),
        (("train.seed",), lambda number: number < 2**32, f"must be below {2**32}"),
    ):
        for path in paths:
            numbers = leaves[path] if isinstance(leaves[path], tuple) else (leaves[path],)
            if not all(number is None or valid(number) for number in numbers):
                raise ValueError(f"{path}={leaves[path]}: {requirement}")
    for path in ("input.mean", "input.std"):
        if leaves[path] is not None and len(leaves[path]) not in (1, 3):
            raise ValueError(f"{path}={leaves[path]}: expected one number or three")
    for name in config.auto:
        if name not in schema.AUTO:
            raise ValueError(f"auto={name}: expected some of {', '.join(schema.AUTO)}")
    inputs, train, head = config.input, config.train, config.model.head
    if (inputs.crop == "center") != (min(inputs.crop_size) > 0):
        given = f"input.crop={inputs.crop} and input.crop_size={inputs.crop_size}"
        raise ValueError(f"{given}: crop center needs a height and width in pixels; other crops have no size")
    if train.epochs == 0 and train.steps == 0:
        raise ValueError("train.epochs=0 and train.steps=0: one of them must be above zero")
    if not train.sync_batch_norm and train.shard_params:
        raise ValueError("train.sync_batch_norm=False needs replicated parameters: set train.shard_params=False")
    if train.batch_size % train.accumulate:
        raise ValueError(f"train.batch_size={train.batch_size}: not a multiple of train.accumulate={train.accumulate}")
    if head.output == "sigmoid" and not head.positive_class:
        raise ValueError("model.head.output=sigmoid: name the class in model.head.positive_class")
    schema.parse_aggregate(config.eval.aggregate)
    config.eval.prevalences()
    _check_augment(config)
    _check_splits(config)
