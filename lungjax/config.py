"""What one run is: frozen dataclasses, typed overrides, checks that need no device.

An experiment returns a `Config`; `--set=optim.lr=3e-4` changes a field through `override`, and a finished
run's `config.json` reads back through `from_json`. Nothing here imports jax, so a typing mistake on the
command line is answered at once.
"""

import ast
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
CROPS = ("none", "box")
SAMPLINGS = ("natural", "balanced")
POOLS = ("avg", "max", "flatten", "avg2x2_flatten")
NORMS = ("none", "batch", "layer", "group")
OUTPUTS = ("softmax", "sigmoid")
PADDINGS = ("valid", "same", "symmetric")
ACTIVATIONS = ("relu", "hard_swish")
DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop")
SCHEDULES = ("constant", "cosine", "linear", "step")
GRAYS = ("repeat", "fold", "slice")
BATCH_NORMS = ("with_layer", "update", "frozen")


@dataclass(frozen=True)
class InputSpec:
    """What the network is fed: `(pixel / 255 - mean) / std`, float32, [height, width, channels]."""

    size: tuple[int, int] = (224, 224)  # height, width in pixels
    channels: int = 1  # of the images that are read: 1 gray, or 3 (a gray image is repeated, a colour one kept)
    crop: str = "none"  # one of CROPS; "box" cuts the body box out of an image that has one
    box_margin: float = 0.0  # part of the box's side kept around it in training, for a later jitter
    interpolation: str = "bilinear"  # one of INTERPOLATIONS
    antialias: bool = True  # widen the kernel when shrinking; False samples the plain kernel
    # Of pixel / 255; one number, or one a channel. Three for a gray image make three channels of it, on the device.
    # None takes what the weights want (`model.weights`), and 0 and 1 without weights.
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def network_channels(self) -> int:
        """Returns how many channels the network gets, once mean and std are applied."""
        return max(self.channels, len(self.mean or ()), len(self.std or ()))


@dataclass(frozen=True)
class DataConfig:
    """Where the examples come from and how often each is seen."""

    dataset: str = "phantom_ct"  # name[/config] of a prepared data set
    sampling: str = "natural"  # one of SAMPLINGS; "balanced" draws each class equally often
    workers: int = 0  # reading processes; 0 reads in threads of this process
    threads: int = 4  # decoding threads of each process
    prefetch: int = 2  # batches read ahead


@dataclass(frozen=True)
class HeadConfig:
    """What follows the last feature map: norm, pool, norm, hidden layers, dropout, dense.

    A field left None takes the network's published head; `models.build` fills it in.
    """

    pool: str | None = None  # one of POOLS
    norm_before_pool: str | None = None  # one of NORMS, followed by ReLU (pre-activation networks)
    norm_after_pool: str | None = None  # one of NORMS (ConvNeXt: layer)
    hidden: tuple[int, ...] | None = None  # widths of dense layers before the last one
    activation: str | None = None  # one of ACTIVATIONS, after each hidden layer
    hidden_dropout: float | None = None  # after each hidden layer, 0..1
    dropout: float | None = None  # right after the pool (and its norm), 0..1
    output: str | None = None  # one of OUTPUTS; "sigmoid" is one logit for two classes
    positive_class: str = ""  # with sigmoid: the class whose probability the logit gives
    zero_init: bool | None = None  # start the last kernel at zero


@dataclass(frozen=True)
class ModelConfig:
    """The network. A field left None takes the architecture's own published value."""

    name: str = "cbr_small"  # a key of lungjax.models.MODELS
    # What the network starts from: "none" (random), "imagenet" (its first record), a record such as "aa_in1k" or
    # "efficientnet_b0.aa_in1k" (python -m lungjax.weights --list), "file:PATH", "run:WORKDIR" of a lungjax run, or
    # "meanvar:" and any of these: random, with each tensor's mean and variance.
    weights: str = "none"
    noncommercial: bool = False  # True accepts weights whose licence forbids commercial use
    gray: str = "repeat"  # one of GRAYS: how gray images meet weights for three channels
    padding: str | None = None  # one of PADDINGS, for the networks that leave it open; weights may demand one
    epsilon: float | None = None  # of the norms, for the networks that leave it open; weights may demand one
    # Part of its running statistics that BatchNorm keeps at each step; networks without any BatchNorm ignore it. A
    # published 0.99 or 0.999 is too slow for a fine-tuning of some hundred steps.
    momentum: float | None = None
    drop_path: float | None = None  # stochastic depth of the last block, 0..1
    # One of BATCH_NORMS. "with_layer": frozen layers keep their running statistics and normalise with them (Keras);
    # "update": every norm uses the batch and updates, also in frozen layers; "frozen": none does.
    batch_norm: str = "with_layer"
    dtype: str = "float32"  # of the computation; parameters and statistics stay float32
    head: HeadConfig = field(default_factory=HeadConfig)  # what follows the last feature map


@dataclass(frozen=True)
class OptimConfig:
    """Loss, optimiser and schedule."""

    name: str = "adam"  # one of OPTIMIZERS
    lr: float = 1e-3  # peak learning rate
    schedule: str = "constant"  # one of SCHEDULES, after the warm-up
    warmup_steps: int = 0  # linear from zero
    end_factor: float = 0.0  # cosine and linear end at lr * end_factor
    decay_at: tuple[float, ...] = ()  # schedule "step": parts of the run (0..1) where lr falls
    decay_factor: float = 0.1  # schedule "step": by this factor each time
    momentum: float = 0.9  # sgd and rmsprop
    nesterov: bool = False  # sgd
    b1: float = 0.9  # adam, adamw
    b2: float = 0.999  # adam, adamw
    eps: float = 1e-7  # adam, adamw, rmsprop (Keras's value; torch has 1e-8)
    weight_decay: float = 0.0  # decoupled; kernels only, never norms or biases
    clip_norm: float = 0.0  # global gradient norm; 0 is off
    label_smoothing: float = 0.0  # 0..1
    class_weights: str = "none"  # "none", "balanced" (n / (classes * n_c)), or numbers "1,2.5,1"
    # What is trained: "all", "head", "blocks:K" or "stages:K" (the last K and all that follows them). Frozen
    # parameters cost neither gradient nor optimiser memory.
    tune: str = "all"
    freeze: str = ""  # regex over parameter paths that are frozen as well, such as "^stem"
    lr_factors: tuple[str, ...] = ()  # "REGEX=FACTOR" over parameter paths, the first that fits; such as "^head/=10"


@dataclass(frozen=True)
class TrainConfig:
    """How long, how often, and what counts as best."""

    batch_size: int = 32  # global, over all devices and hosts
    epochs: float = 10.0  # passes over the train split
    steps: int = 0  # above zero it replaces epochs
    eval_steps: int = 0  # steps between validations; 0 is once an epoch
    save_steps: int = 0  # steps between checkpoints; 0 is at each validation
    log_steps: int = 10  # steps between lines of metrics.jsonl
    seed: int = 0  # of weights, data order and dropout
    monitor: str = "slice.auc_macro"  # validation metric that picks the best weights
    maximize: bool = True  # False where smaller is better, as for "slice.loss"
    patience: int = 0  # validations without a better one before stopping; 0 never stops early
    accumulate: int = 1  # micro-batches a step; BatchNorm statistics are then per micro-batch
    remat: bool = False  # recompute activations in the backward pass: less memory, more time


@dataclass(frozen=True)
class EvalConfig:
    """How the best weights are tested."""

    batch_size: int = 64  # global
    examples: int = 12  # right and wrong test images on the sheet, each


@dataclass(frozen=True)
class Config:
    """One run, complete: with the data set and the code it is everything needed to repeat it."""

    name: str = "run"  # of the experiment; the default workdir is runs/NAME
    data: DataConfig = field(default_factory=DataConfig)
    input: InputSpec = field(default_factory=InputSpec)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: the nearest known names, or all of a few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"the nearest: {', '.join(close)}"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known: {shown}" if known else "none is known"


def fields_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns every leaf field by dotted path, such as {"optim.lr": 0.001, ...}."""
    leaves: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            leaves |= fields_of(value, f"{prefix}{f.name}.")
        else:
            leaves[prefix + f.name] = value
    return leaves


def override(config: Config, assignment: str) -> Config:
    """Returns `config` with one "path=value" set, the value read by the field's own type.

    Raises ValueError for a missing "=", an unknown path (with the nearest ones) or a value of another type.
    """
    path, equals, text = assignment.partition("=")
    path = path.strip()
    if not equals or not path:
        raise ValueError(f"--set={assignment}: expected path=value, such as --set=optim.lr=3e-4")
    return typing.cast(Config, _set(config, path.split("."), text.strip(), path))


def _set(node: Any, parts: list[str], text: str, path: str) -> Any:
    hints = typing.get_type_hints(type(node))
    name, *rest = parts
    unknown = f"--set={path}={text}: no field {path!r}; "
    if name not in hints:
        raise ValueError(unknown + nearest(path, _paths(Config)))
    section = hints[name] if dataclasses.is_dataclass(hints[name]) else None
    if rest:
        if section is None:
            raise ValueError(unknown + nearest(path, _paths(Config)))
        value = _set(getattr(node, name), rest, text, path)
    elif section is not None:
        inside = ", ".join(f"{path}.{f.name}" for f in dataclasses.fields(section))
        raise ValueError(f"--set={path}={text}: {path} is a section; set one of its fields: {inside}")
    else:
        value = parse(text, hints[name], path)
    return dataclasses.replace(node, **{name: value})


def _paths(section: Any, prefix: str = "") -> list[str]:
    paths = []
    for name, hint in typing.get_type_hints(section).items():
        paths += _paths(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return paths


def parse(text: str, hint: Any, what: str) -> Any:
    """Reads `text` as the type `hint`: int, float, bool, str, None or a tuple of these.

    Raises ValueError naming `what`, the text and the wanted type.
    """
    wanted = _type_name(hint)
    wrong = ValueError(f"{what}={text}: expected {wanted}, got {text!r}")
    if isinstance(hint, types.UnionType):
        if text == "None":  # "none" in small letters is a choice of its own (norms, weights)
            return None
        hint = next(o for o in typing.get_args(hint) if o is not type(None))
    if hint is str:
        return text
    if hint is bool:
        if text.lower() in ("true", "yes", "1"):
            return True
        if text.lower() in ("false", "no", "0"):
            return False
        raise wrong
    if typing.get_origin(hint) is tuple:
        inside = text.strip()
        if inside[:1] + inside[-1:] in ("()", "[]"):  # as a whole: a regular expression has brackets of its own
            inside = inside[1:-1]
        items = [t.strip() for t in inside.split(",") if t.strip()]
        kinds = typing.get_args(hint)
        if kinds[-1] is ...:
            return tuple(parse(t, kinds[0], what) for t in items)
        if len(items) == 1 and len(set(kinds)) == 1:
            items *= len(kinds)  # --set=input.size=128 means 128, 128
        if len(items) != len(kinds):
            raise wrong
        return tuple(parse(t, k, what) for t, k in zip(items, kinds, strict=True))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise wrong from None
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint is int and type(value) in (int, float) and value == int(value):
        return int(value)
    raise wrong


def _type_name(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(o) for o in typing.get_args(hint))
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if kinds[-1] is ...:
            return f"{_type_name(kinds[0])}s with commas"
        return ", ".join(_type_name(k) for k in kinds)
    return getattr(hint, "__name__", str(hint))


def to_json(config: Config) -> str:
    """Returns the whole configuration as indented JSON; `from_json` gives the equal one back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> Config:
    """Rebuilds a `Config`. Raises ValueError naming `where` and the field for anything unknown or mistyped."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    return typing.cast(Config, _build(Config, tree, where, ""))


def _build(section: Any, tree: Any, where: str, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: {prefix or 'the file'} should be an object, got {tree!r}")
    hints = typing.get_type_hints(section)
    values = {}
    for name, value in tree.items():
        if name not in hints:
            raise ValueError(f"{where}: no field {prefix + name!r}; {nearest(prefix + name, _paths(Config))}")
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, where, f"{prefix}{name}.")
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            values[name] = parse(text, hints[name], f"{where}: {prefix + name}")
    return section(**values)


def difference(old: Config, new: Config) -> list[str]:
    """Returns one "path: old -> new" line a differing field."""
    a, b = fields_of(old), fields_of(new)
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a | b) if a.get(k) != b.get(k)]


def check(config: Config) -> None:
    """Raises ValueError for the first field whose value makes no sense, before any device work."""
    leaves = fields_of(config)
    choices = {
        "input.crop": CROPS, "input.interpolation": INTERPOLATIONS, "data.sampling": SAMPLINGS,
        "model.dtype": DTYPES, "model.padding": PADDINGS, "optim.name": OPTIMIZERS,
        "optim.schedule": SCHEDULES, "input.channels": (1, 3), "model.head.pool": POOLS,
        "model.head.norm_before_pool": NORMS, "model.head.norm_after_pool": NORMS,
        "model.head.output": OUTPUTS, "model.head.activation": ACTIVATIONS, "model.gray": GRAYS,
        "model.batch_norm": BATCH_NORMS,
    }  # fmt: skip
    for path, allowed in choices.items():
        if leaves[path] is not None and leaves[path] not in allowed:
            raise ValueError(f"{path}={leaves[path]!r}: allowed are {', '.join(map(str, allowed))}")
    for path in ("train.batch_size", "eval.batch_size", "train.log_steps", "train.accumulate", "optim.lr",
                 "data.threads", "data.prefetch", "optim.eps"):  # fmt: skip
        if leaves[path] <= 0:
            raise ValueError(f"{path}={leaves[path]}: must be above zero")
    for path in ("train.steps", "train.eval_steps", "train.save_steps", "train.patience", "train.seed",
                 "data.workers", "optim.warmup_steps", "optim.weight_decay", "optim.clip_norm",
                 "input.box_margin", "eval.examples", "train.epochs"):  # fmt: skip
        if leaves[path] < 0:
            raise ValueError(f"{path}={leaves[path]}: must not be negative")
    for path in (
        "optim.label_smoothing",
        "model.momentum",
        "model.head.dropout",
        "model.head.hidden_dropout",
        "model.drop_path",
    ):
        if leaves.get(path) is not None and not 0 <= leaves[path] < 1:
            raise ValueError(f"{path}={leaves[path]}: must be at least 0 and below 1")
    if config.train.epochs == 0 and config.train.steps == 0:
        raise ValueError("train.epochs=0 and train.steps=0: one of them must be above zero")
    if config.train.batch_size % config.train.accumulate:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} is not a multiple of "
            f"train.accumulate={config.train.accumulate}"
        )
    if min(config.input.size) < 1:
        raise ValueError(f"input.size={config.input.size}: must be above zero")
    for path in ("input.mean", "input.std"):
        if leaves[path] is not None and len(leaves[path]) not in (1, 3):
            raise ValueError(f"{path}={leaves[path]}: give one number, or three")
    if config.input.std is not None and min(config.input.std) <= 0:
        raise ValueError(f"input.std={config.input.std}: must be above zero")
    if config.model.epsilon is not None and config.model.epsilon <= 0:
        raise ValueError(f"model.epsilon={config.model.epsilon}: must be above zero")
    head = config.model.head
    if head.output == "sigmoid" and not head.positive_class:
        raise ValueError("model.head.output=sigmoid: name the class in model.head.positive_class")
