"""What one run is: frozen dataclasses.

An experiment returns a `Config`; `lungjax.config.overrides` changes a field (`--set=optim.lr=3e-4`), reads and writes
`config.json`. Nothing here imports jax, so a typing mistake on the command line is answered at once.
"""

import dataclasses
import difflib
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
FILLS = ("constant", "edge", "reflect")
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
FROZEN_BATCH_NORMS = ("with_layer", "update", "frozen")
ON_NAN = ("stop", "skip", "rewind")
KEEPS = ("best", "last")
EXPLANATIONS = ("gradcam", "gradcam_positive", "gradcam++", "integrated_gradients", "occlusion")


@dataclass(frozen=True)
class InputSpec:
    """What the network is fed: `(pixel / 255 - mean) / std`, float32, [height, width, channels]."""

    size: tuple[int, int] = (224, 224)  # height, width in pixels
    channels: int = 1  # of the images that are read: 1 gray, or 3 (a gray image is repeated, a colour one kept)
    # One of CROPS; "box" cuts the body box out of an image that has one, "center" a window around the middle.
    crop: str = "none"
    crop_size: tuple[int, int] = (0, 0)  # height, width of the "center" crop in pixels of the stored image
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

    dataset: str = "phantom_ct"  # name[/config][-stage][-size] of a prepared data set
    # One of PROTOCOLS: splits by patient without twins over two of them, or what the study did.
    protocol: str = "clean"
    sampling: str = "natural"  # one of SAMPLINGS; "balanced" draws each class equally often
    # Cross-validation: all images are dealt into so many parts by patient; part `fold` is test, the next one val.
    folds: int = 0  # 0 keeps the data set's own splits
    fold: int = 0  # 0 to folds - 1
    workers: int = 0  # reading processes; 0 reads in threads of this process
    threads: int = 0  # decoding threads of each process; 0 is one more than cores
    prefetch: int = 2  # batches read ahead


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to train images on the device, in this order; at its defaults a field does nothing.

    Presets of the studies are in `lungjax.config.presets`: `--set=augment=covidnet_ct`, then single fields.
    """

    exterior: float = 0.0  # probability: what lies outside the body becomes the mean of the dark outside
    # One warp, with `size` as its result.
    flip_horizontal: float = 0.0  # probability
    flip_vertical: float = 0.0  # probability
    rotation: float = 0.0  # at most this part of a turn each way, as in Keras: 0.1 is 36 degrees
    # Keras's RandomZoom: a number drawn from this range is added to the side that is seen, so -0.2 zooms in on 0.8 of
    # it and 0.2 shows 1.2.
    zoom: tuple[float, float] = (0.0, 0.0)
    zoom_apart: bool = False  # draw height and width on their own
    shear: float = 0.0  # at most this coefficient (tangent) each way, along x or along y
    shift: tuple[float, float] = (0.0, 0.0)  # at most these parts of height and width each way
    box_jitter: float = 0.0  # each edge of the box moves by at most this part of the box's side; needs input.crop=box
    fill: str = "constant"  # one of FILLS, for what lies outside the image
    fill_value: float = 0.0  # 0..255, for "constant"
    # Then the intensities, of 0..255, clipped to that range in the end.
    brightness: tuple[float, float] = (1.0, 1.0)  # the image times a number of this range
    contrast: tuple[float, float] = (1.0, 1.0)  # the distance to the image's mean times a number of this range
    gamma: tuple[float, float] = (1.0, 1.0)  # 255 * (x / 255) ** a number of this range, drawn log-evenly
    intensity_shift: float = 0.0  # scale * (x + shift): shift at most this many gray levels each way
    intensity_scale: float = 0.0  # scale 1 -/+ at most this
    invert: float = 0.0  # probability of 255 - x
    dropout: tuple[float, float] = (0.0, 0.0)  # part of the patches that become black, drawn from this range
    dropout_grid: tuple[int, int] = (3, 8)  # patches along each side, drawn from this range (imgaug's size_px)
    noise: float = 0.0  # Gaussian, its standard deviation drawn from 0 to this many gray levels
    probability: float = 1.0  # that an image gets each of rotation, shear, box_jitter, zoom, shift and intensities
    # Last, between two images of a batch; the loss is shared out in the same parts. Both: each half of the batches.
    mixup: float = 0.0  # alpha of the beta distribution; 0 is off
    cutmix: float = 0.0  # the same


@dataclass(frozen=True)
class HeadConfig:
    """What follows the last feature map: norm, pool, norm, hidden layers, dropout, dense.

    A field left None takes the network's published head; `models.build` fills it in.
    """

    pool: str | None = None  # one of POOLS
    # One of NORMS; ReLU follows batch and group (pre-activation networks), not layer (Keras's ConvNeXt without top).
    norm_before_pool: str | None = None
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
    noncommercial: bool = False  # True accepts weights whose license forbids commercial use
    gray: str = "repeat"  # one of GRAYS: how gray images meet weights for three channels
    padding: str | None = None  # one of PADDINGS, for the networks that leave it open; weights may demand one
    epsilon: float | None = None  # of the norms, for the networks that leave it open; weights may demand one
    # Part of its running statistics that BatchNorm keeps at each step; networks without any BatchNorm ignore it. A
    # published 0.99 or 0.999 is too slow for a fine-tuning of some hundred steps.
    momentum: float | None = None
    drop_path: float | None = None  # stochastic depth of the last block, 0..1
    # Of the computation, one of DTYPES; parameters, statistics, pooling and logits stay float32. None is bfloat16 on
    # GPU and TPU, and float32 on the CPU.
    dtype: str | None = None
    head: HeadConfig = field(default_factory=HeadConfig)  # what follows the last feature map


@dataclass(frozen=True)
class OptimConfig:
    """Loss, optimiser and schedule."""

    name: str = "adam"  # one of OPTIMIZERS
    lr: float = 1e-3  # peak learning rate
    schedule: str = "constant"  # one of SCHEDULES, after the warm-up
    warmup_steps: int = 0  # linear from zero
    end_factor: float = 0.0  # cosine and linear end at lr * end_factor
    schedule_steps: int = 0  # the schedule is through after so many steps; 0 is those of the run
    decay_at: tuple[float, ...] = ()  # schedule "step": parts of the run (0..1) where lr falls
    decay_factor: float = 0.1  # schedule "step": by this factor each time
    momentum: float = 0.9  # sgd and rmsprop
    nesterov: bool = False  # sgd
    b1: float = 0.9  # adam, adamw
    b2: float = 0.999  # adam, adamw
    # adam, adamw, rmsprop. Keras's number (torch has 1e-8), added as in the paper, after the moments are corrected for
    # their start at zero; Keras adds it before, where it weighs 32 times as much at the first step.
    eps: float = 1e-7
    weight_decay: float = 0.0  # decoupled; kernels only, never norms or biases
    clip_norm: float = 0.0  # global gradient norm; 0 is off
    label_smoothing: float = 0.0  # 0..1
    class_weights: str = "none"  # "none", "balanced" (n / (classes * n_c)), or numbers "1,2.5,1"
    # What is trained: "all", "head", "blocks:K" or "stages:K" (the last K and all that follows them). Frozen
    # parameters cost neither gradient nor optimiser memory.
    tune: str = "all"
    # One of FROZEN_BATCH_NORMS, what BatchNorm does in training. "with_layer": in frozen layers it keeps its running
    # statistics and normalizes with them (Keras); "update": it uses and updates those of the batch in all layers;
    # "frozen": in none.
    frozen_batch_norm: str = "with_layer"
    freeze: str = ""  # regex over parameter paths that are frozen as well, such as "^stem"
    lr_factors: tuple[str, ...] = ()  # "REGEX=FACTOR" over parameter paths, the first that fits; such as "^head/=10"


@dataclass(frozen=True)
class TrainConfig:
    """How long, how often, and what counts as best."""

    batch_size: int = 32  # global, over all devices and hosts
    epochs: float = 10.0  # passes over the train split
    steps: int = 0  # above zero it replaces epochs
    fraction: float = 1.0  # of the train patients that are used, for learning curves
    eval_steps: int = 0  # steps between validations; 0 is once an epoch
    save_steps: int = 0  # steps between checkpoints; 0 is at each validation
    # One of ON_NAN, for a loss or gradient that is no number. "stop" keeps the state from before it; "skip" leaves that
    # step out; "rewind" returns to the last checkpoint and goes on with the examples after the bad batch.
    on_nan: str = "stop"
    log_steps: int = 10  # steps between lines of metrics.jsonl
    seed: int = 0  # of weights, data order and dropout
    monitor: str = "slice.auc_macro"  # validation metric that picks the best weights
    maximize: bool = True  # False where smaller is better, as for "slice.loss"
    patience: int = 0  # validations without a better one before stopping; 0 never stops early
    keep: str = "best"  # one of KEEPS: the weights that are tested, the best by `monitor` or those of the last step
    accumulate: int = 1  # micro-batches a step; BatchNorm statistics are then per micro-batch
    remat: bool = False  # recompute activations in the backward pass: less memory, more time
    devices: int = 0  # to train on, of this one host; 0 is all, of all hosts
    sync_batch_norm: bool = True  # statistics of the global batch; False: of each device's part (as in torch)
    shard_params: bool = False  # cut parameters and optimiser state over the devices instead of a copy on each


@dataclass(frozen=True)
class EvalConfig:
    """How the best weights are tested."""

    batch_size: int = 0  # global; 0 chooses by image size and machine
    examples: int = 12  # right and wrong test images on the sheet, each
    draws: int = 2000  # of patients, for the 95 % intervals (bootstrap); 0 leaves them out
    sensitivity: float = 0.95  # of the operating point that is chosen on val for it
    prevalence: float = 0.0  # 0..1, at which predictive values are given as well; 0 is the test split's own alone


@dataclass(frozen=True)
class Config:
    """One run, complete: with the data set and the code it is everything needed to repeat it."""

    name: str = "run"  # of the experiment; the default workdir is runs/NAME
    data: DataConfig = field(default_factory=DataConfig)
    input: InputSpec = field(default_factory=InputSpec)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: the nearest known names, or all of a few."""
    known = sorted(known)
    begun = [other for other in known if name and other.startswith(name)]  # half a name before one that looks alike
    close = [*begun, *(n for n in difflib.get_close_matches(name, known, n=3, cutoff=0.5) if n not in begun)][:3]
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
