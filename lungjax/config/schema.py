"""The configuration of a run as frozen dataclasses. `lungjax.config.overrides` converts it from and to text."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
CROPS = ("none", "box", "center")
# Versions of a slice that `lungjax.data.imaging.lung_masks` makes; study_* and features are the studies' own.
STAGES = (
    "nobackg", "crop", "lungs_nocrop", "lungs", "no_lungs",
    "study_nobackg", "study_crop", "study_lungs_nocrop", "study_lungs", "features",
)  # fmt: skip
PROTOCOLS = ("clean", "study")
# Allowed values of fields, by path.
CHOICES = {
    "data.protocol": PROTOCOLS, "input.crop": CROPS, "input.interpolation": INTERPOLATIONS, "input.channels": (1, 3),
    "data.sampling": ("natural", "balanced"), "data.uncertain": ("ignore", "zero", "one"),
    "augment.fill": ("constant", "edge", "reflect"),
    "model.dtype": ("float32", "bfloat16"), "model.padding": ("valid", "same", "symmetric"),
    "model.gray": ("repeat", "fold", "slice"),
    # With "class_map", the classifier comes before the pool.
    "model.head.pool": ("avg", "max", "flatten", "avg2x2_flatten", "class_map"),
    "model.head.norm_before_pool": ("none", "batch", "layer", "group"),
    "model.head.norm_after_pool": ("none", "batch", "layer", "group"),
    "model.head.activation": ("relu", "hard_swish"), "model.head.output": ("softmax", "sigmoid", "multilabel"),
    "optim.name": ("adam", "adamw", "sgd", "rmsprop"), "optim.schedule": ("constant", "cosine", "linear", "step"),
    "optim.frozen_batch_norm": ("with_layer", "update", "frozen"),
    "train.on_nan": ("stop", "skip", "rewind"), "train.keep": ("best", "last"), "eval.tta": ("none", "flip"),
}  # fmt: skip
# Fields that lungjax/training/auto.py can choose, in this order: later ones depend on earlier ones.
AUTO = (
    "model.weights", "optim.lr", "train.batch_size", "train.epochs", "input.size", "augment", "model.momentum",
)  # fmt: skip
AGGREGATES = ("mean", "max", "top_k", "noisy_or")  # see lungjax/evaluation/aggregation.py
EXPLANATIONS = ("gradcam", "gradcam_positive", "gradcam++", "integrated_gradients", "occlusion")


@dataclass(frozen=True)
class InputSpec:
    """The network's input: `(pixel / 255 - mean) / std`, float32, [height, width, channels]."""

    size: tuple[int, int] = (224, 224)  # height, width in pixels
    channels: int = 1  # of images when read: 1 is gray, 3 is color (gray images are repeated)
    # One of CROPS; "box" crops to the body box of an image that has one, "center" to a window around the middle.
    crop: str = "none"
    crop_size: tuple[int, int] = (0, 0)  # height, width of the "center" crop in pixels of the stored image
    box_margin: float = 0.0  # fraction of the crop's sides added around it in training, for box_jitter and rotation
    interpolation: str = "bilinear"  # one of INTERPOLATIONS
    antialias: bool = True  # widen the kernel when shrinking; False samples the plain kernel
    # Of pixel / 255; one number, or one per channel. Three turn a gray image into three channels, on the device.
    # None uses the values of the weights (`model.weights`), or 0 and 1 without weights.
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def network_channels(self) -> int:
        """Number of channels after mean and std are applied."""
        return max(self.channels, len(self.mean or ()), len(self.std or ()))


@dataclass(frozen=True)
class DataConfig:
    """The data set, its splits and the sampling."""

    dataset: str = "phantom_ct"  # name[/config][-stage][-size] of a prepared data set
    # One of PROTOCOLS: splits by patient without near duplicates across splits, or the splits of the study.
    protocol: str = "clean"
    sampling: str = "natural"  # one of CHOICES; "balanced" samples all classes equally often
    # One of CHOICES, for unknown or uncertain findings of training images: no loss ("ignore"), absent or present, the
    # policies U-Ignore, U-Zeros and U-Ones of CheXpert (arXiv 1901.07031). In tests they never count.
    uncertain: str = "ignore"
    # Cross-validation: images are split by patient into `folds` parts; part `fold` is test, the next one val.
    folds: int = 0  # 0 uses the splits of the data set
    fold: int = 0  # 0 to folds - 1
    # Leave one source out: the images of this source are the test split, and val is drawn by patient from the others.
    test_source: str = ""  # "" is off
    workers: int = 0  # reading processes; 0 reads in threads of this process
    threads: int = 0  # decoding threads per process; 0 is the number of cores plus one
    prefetch: int = 2  # batches read ahead


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images on the device, in the order of the fields; off by default; see `presets`."""

    exterior: float = 0.0  # probability: pixels outside the body become the mean of the dark ones among them
    # The geometric transforms are one warp to `size`.
    flip_horizontal: float = 0.0  # probability
    flip_vertical: float = 0.0  # probability
    rotation: float = 0.0  # maximum fraction of a turn each way, as in Keras: 0.1 is 36 degrees
    # As in Keras's RandomZoom, the visible side changes by a fraction from this range: 0.2 zooms out to 1.2 of it.
    zoom: tuple[float, float] = (0.0, 0.0)
    zoom_apart: bool = False  # draw height and width independently
    shear: float = 0.0  # maximum tangent each way, along x or along y
    shift: tuple[float, float] = (0.0, 0.0)  # maximum fractions of height and width each way
    box_jitter: float = 0.0  # maximum shift of each edge, as a fraction of the box's side; needs input.crop=box
    fill: str = "constant"  # one of CHOICES, for pixels outside the image
    fill_value: float = 0.0  # 0..255, for "constant"
    # Then intensities in 0..255, clipped to that range at the end.
    brightness: tuple[float, float] = (1.0, 1.0)  # factor of the image, drawn from this range
    contrast: tuple[float, float] = (1.0, 1.0)  # factor of the difference to the image's mean
    gamma: tuple[float, float] = (1.0, 1.0)  # 255 * (x / 255) ** gamma, drawn log-uniformly
    intensity_shift: float = 0.0  # scale * (x + shift): maximum shift in gray levels each way
    intensity_scale: float = 0.0  # maximum deviation of scale from 1
    invert: float = 0.0  # probability of 255 - x
    dropout: tuple[float, float] = (0.0, 0.0)  # fraction of patches that become black, drawn from this range
    dropout_grid: tuple[int, int] = (3, 8)  # patches along each side, drawn from this range (imgaug's size_px)
    noise: float = 0.0  # Gaussian; maximum standard deviation in gray levels
    probability: float = 1.0  # of each of rotation, shear, box_jitter, zoom, shift and intensities
    # Finally, two images and their losses are mixed. With both options, each is applied to half of the batches.
    mixup: float = 0.0  # alpha of the beta distribution; 0 is off
    cutmix: float = 0.0  # likewise


@dataclass(frozen=True)
class HeadConfig:
    """Norm, pool, norm, dropout, hidden layers and dense layer after the last map; None: as in the network's paper."""

    pool: str | None = None  # one of CHOICES
    # One of CHOICES; ReLU follows batch and group (pre-activation networks), not layer (Keras's ConvNeXt without top).
    norm_before_pool: str | None = None
    norm_after_pool: str | None = None  # one of CHOICES (ConvNeXt: layer)
    hidden: tuple[int, ...] | None = None  # widths of dense layers before the last one
    activation: str | None = None  # one of CHOICES, after each hidden layer
    hidden_dropout: float | None = None  # after each hidden layer, 0..1
    dropout: float | None = None  # right after the pool (and its norm), 0..1
    # One of CHOICES; "sigmoid" is one logit for two classes, "multilabel" one for each finding, the default for data
    # sets with several findings per image.
    output: str | None = None
    positive_class: str = ""  # with sigmoid: the class whose probability the logit gives
    zero_init: bool | None = None  # start the last kernel at zero


@dataclass(frozen=True)
class ModelConfig:
    """The network. None stands for the published value of the architecture."""

    name: str = "cbr_small"  # a key of lungjax.models.MODELS
    # Initial weights: "none" (random), "imagenet" (its first record), a record such as "aa_in1k" or
    # "efficientnet_b0.aa_in1k" (python -m lungjax.weights --list), "file:PATH", "run:WORKDIR" of a lungjax run, or
    # "meanvar:" and any of these: random, with each tensor's mean and variance.
    weights: str = "none"
    noncommercial: bool = False  # True accepts weights whose license forbids commercial use
    gray: str = "repeat"  # one of CHOICES: how gray images are used with weights for three channels
    padding: str | None = None  # one of CHOICES, for networks without a fixed one; weights may require one
    epsilon: float | None = None  # of the norms, for networks without a fixed one; weights may require one
    # Decay of BatchNorm's running statistics per step; ignored without BatchNorm. The published 0.99 or 0.999 is too
    # slow for fine-tuning in some hundred steps.
    momentum: float | None = None
    drop_path: float | None = None  # stochastic depth of the last block, 0..1
    dropout: float | None = None  # after each block of the small CNNs (cbr_*, simple, xray_cnn), 0..1; see head.dropout
    # Of the computation, one of CHOICES; parameters, statistics, pooling and logits remain float32. None is bfloat16 on
    # GPU and TPU, and float32 on the CPU.
    dtype: str | None = None
    head: HeadConfig = field(default_factory=HeadConfig)  # layers after the last feature map


@dataclass(frozen=True)
class OptimConfig:
    """Loss, optimizer and schedule."""

    name: str = "adam"  # one of CHOICES
    lr: float = 1e-3  # peak learning rate
    schedule: str = "constant"  # one of CHOICES, after the warm-up
    warmup_steps: int = 0  # linear from lr / warmup_steps
    end_factor: float = 0.0  # cosine and linear end at lr * end_factor
    schedule_steps: int = 0  # length of the schedule; 0 is that of the run
    decay_at: tuple[float, ...] = ()  # schedule "step": fractions of the run (0..1) at which lr decays
    decay_factor: float = 0.1  # schedule "step": by this factor each time
    momentum: float = 0.9  # sgd and rmsprop
    nesterov: bool = False  # sgd
    b1: float = 0.9  # adam, adamw
    b2: float = 0.999  # adam, adamw
    # adam, adamw, rmsprop. Keras's value (torch: 1e-8), added after bias correction as in the paper; Keras adds it
    # before, where it weighs 32 times as much at the first step.
    eps: float = 1e-7
    weight_decay: float = 0.0  # decoupled; kernels only, never norms or biases
    clip_norm: float = 0.0  # global gradient norm; 0 is off
    label_smoothing: float = 0.0  # 0..1
    class_weights: str = "none"  # "none", "balanced" (n / (classes * n_c)), or numbers "1,2.5,1"
    # Trained layers: "all", "head", "blocks:K" or "stages:K" (the last K and everything after them). Frozen parameters
    # cost neither gradients nor optimizer memory.
    tune: str = "all"
    # One of CHOICES: which BatchNorms use running statistics in training and do not update them, those of
    # frozen layers ("with_layer", as in Keras), none ("update") or all ("frozen").
    frozen_batch_norm: str = "with_layer"
    freeze: str = ""  # regex of parameter paths that are also frozen, such as "^stem"
    lr_factors: tuple[str, ...] = ()  # "REGEX=FACTOR" of parameter paths, such as "^head/=10"; the first match counts
    # Decay of an exponential moving average of weights and BatchNorm statistics, which is then validated, saved and
    # tested in place of the last values; 0 is off.
    ema: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """Training length, intervals, model selection and parallelism."""

    batch_size: int = 32  # global, over all devices and hosts
    epochs: float = 10.0  # passes over the train split
    steps: int = 0  # above zero it replaces epochs
    fraction: float = 1.0  # of training patients to use, for learning curves
    eval_steps: int = 0  # steps between validations; 0 is once per epoch
    save_steps: int = 0  # steps between checkpoints; 0 is at each validation
    # One of CHOICES, for a non-finite loss or gradient. "stop" saves the state before it; "skip" skips that step, which
    # the schedule does not count; "rewind" returns to the last checkpoint and continues after the bad batch.
    on_nan: str = "stop"
    log_steps: int = 10  # steps between lines of metrics.jsonl
    seed: int = 0  # of weights, data order, augmentation and dropout
    monitor: str = "slice.auc_macro"  # validation metric that selects the best weights
    maximize: bool = True  # False if smaller is better, as for "slice.loss"
    patience: int = 0  # validations without improvement before stopping; 0 never stops early
    keep: str = "best"  # one of CHOICES: test the best weights by `monitor`, or those of the last step
    accumulate: int = 1  # micro-batches per step; BatchNorm statistics are then per micro-batch
    remat: bool = False  # recompute activations in the backward pass: less memory, more time
    tensorboard: bool = False  # also write metrics, configuration and figures as TensorBoard events (extra tensorboard)
    log_parameters: bool = False  # print a table of the parameters at the start
    devices: int = 0  # number on a single host; 0 is all devices of all hosts
    sync_batch_norm: bool = True  # statistics of the global batch; False: per device (as in torch)
    shard_params: bool = False  # shard parameters and optimizer state over the devices instead of replicating them


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of the best weights."""

    batch_size: int = 0  # global; 0 chooses by image size and platform
    # One of CHOICES, test-time augmentation: "flip" averages the logits of an image and its horizontal mirror. It does
    # not apply to validations during training, so it does not change the weights.
    tta: str = "none"
    examples: int = 12  # number of correct and of wrong test images in the figure
    draws: int = 2000  # bootstrap resamples of patients for the 95 % intervals; 0 omits them
    sensitivity: float = 0.95  # of the operating point that is chosen on val
    # From the images of a patient to the patient: one of AGGREGATES, or "auto" for the one with the highest AUC per
    # patient on val. RULE:CLASS+CLASS applies the rule to these classes, as max:COVID.
    aggregate: str = "mean"
    prevalence: tuple[str, ...] = ()  # CLASS:NUMBER with a prevalence in 0..1, for additional predictive values

    def prevalences(self) -> dict[str, float]:
        """Returns `prevalence` as {class: number}. Raises ValueError for other text or a repeated class."""
        result: dict[str, float] = {}
        for text in self.prevalence:
            name, _, number = text.rpartition(":")
            try:
                value = float(number)
            except ValueError:
                value = 0.0
            if not (name and name not in result and 0 < value < 1):
                raise ValueError(f"eval.prevalence={text}: expected CLASS:NUMBER once per class, as COVID:0.02")
            result[name] = value
        return result


@dataclass(frozen=True)
class Config:
    """The complete configuration of a run, which can be reproduced from it, the data set and the code."""

    name: str = "run"  # of the experiment; the default workdir is runs/NAME
    data: DataConfig = field(default_factory=DataConfig)
    input: InputSpec = field(default_factory=InputSpec)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    # Fields from AUTO that the run chooses from the number of training images; `--set` of a field removes it from here.
    # --compile_for uses their values in this configuration.
    auto: tuple[str, ...] = ()


def parse_aggregate(text: str) -> tuple[str, tuple[str, ...]]:
    """Returns the rule and the classes of "RULE" or "RULE:CLASS+CLASS". Raises ValueError for an unknown rule."""
    rule, _, names = text.partition(":")
    if rule not in (rules := (*AGGREGATES, "auto")):
        raise ValueError(
            f"eval.aggregate={text}: expected {', '.join(rules)}, or one of them for classes, as max:COVID"
        )
    return rule, tuple(filter(None, names.split("+")))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Reads a JSON object. Raises ValueError, naming `where`, for other text, NaN, infinity and 65-bit integers."""

    def finite(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{digits:.20} is not a finite number")
        return value

    def int64(digits: str) -> int:
        if not -(2**63) <= (value := int(digits)) < 2**63:
            raise ValueError(f"{digits:.20} has more than 64 bits")
        return value

    try:
        tree = json.loads(text, parse_constant=finite, parse_float=finite, parse_int=int64)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: should be a JSON object, got {tree!r:.80}")
    return tree


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: the most similar known names, or the first ones if none is similar."""
    known = sorted(known)
    prefixed = [other for other in known if name and other.startswith(name)]
    similar = [n for n in difflib.get_close_matches(name, known, n=3, cutoff=0.5) if n not in prefixed]
    close = [*prefixed, *similar][:3]  # completions before similar names
    if close:
        return f"did you mean {', '.join(close)}?"
    first = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known: {first}" if known else "none is known"


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
