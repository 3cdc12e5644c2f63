"""Initial weights of a network: the source, input normalization and parameters of `model.weights`."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn

from lungjax import models
from lungjax.config import Config, ModelConfig, metadata, nearest, overrides
from lungjax.models import trees
from lungjax.runtime import checkpoint
from lungjax.weights import catalogue, download
from lungjax.weights.catalogue import PretrainedWeights
from lungjax.weights.convert import SAME_NAMES, Rules, convert
from lungjax.weights.identify import CLASSIFIER, record_of, suggestion
from lungjax.weights.name_rules import layouts
from lungjax.weights.readers import Tensors, open_tensors

Floats = tuple[float, ...]
MANY_PROBLEMS = 8  # with more, the file probably belongs to another network
ALLOWED = "none, imagenet, a catalogue name, file:PATH, run:WORKDIR, or meanvar: before one of these"


@dataclass(frozen=True)
class Source:
    """The source of weights; at most one of record and run is set."""

    record: PretrainedWeights | None = None
    file: Path | None = None  # of the record; None: in `weights_dir` or the cache
    run: Path | None = None  # workdir
    meanvar: bool = False  # draw random numbers with the mean and variance of each tensor


def parse(model: ModelConfig) -> Source:
    """Parses `model.weights`. Raises ValueError for an unknown, missing or forbidden source."""
    models.check_name(model.name)
    text, meanvar = model.weights.removeprefix("meanvar:"), model.weights.startswith("meanvar:")
    if text == "none" and not meanvar:
        return Source()
    kind, _, rest = text.partition(":")
    if kind == "run":
        if checkpoint.newest(Path(rest), "best") is None:
            raise ValueError(f"model.weights={model.weights}: no trained run in {rest} (checkpoints/best is empty)")
        return Source(run=Path(rest), meanvar=meanvar)
    file = Path(rest).expanduser() if kind == "file" else None
    if file and not file.is_file():
        raise ValueError(f"model.weights={model.weights}: no such file")
    record = record_of(file, model.name) if file else _named(model, text)
    if record.noncommercial and not model.noncommercial:
        accept = "--set=model.noncommercial=True accepts it"
        raise ValueError(f"{record.name}: license {record.license} forbids commercial use; {accept}")
    return Source(record=record, file=file, meanvar=meanvar)


def _named(model: ModelConfig, text: str) -> PretrainedWeights:
    """Returns the record of a network by name or tag."""
    candidates = catalogue.records(model.name)
    if not candidates and text == "imagenet":
        raise ValueError(
            f"model.weights={model.weights}: no ImageNet weights of {model.name} are public. Train them with "
            f"--experiment=imagenet_pretrain:model={model.name}, then use --set=model.weights=run:WORKDIR"
        )
    names = {name: record for record in candidates for name in (record.name, record.name.partition(".")[2])}
    names.update(zip(["imagenet"], candidates, strict=False))
    if text not in names:
        others = [record.model for record in catalogue.records() if record.name.partition(".")[2] == text]
        hint = f"{text} weights exist for {', '.join(others)}" if others else nearest(text, [*names, "none"])
        raise ValueError(f"model.weights={model.weights!r}: expected {ALLOWED}; {hint}")
    return names[text]


def resolve(config: Config) -> Config:
    """Returns the configuration with the mean, std, padding and epsilon that its weights require, unless set already.

    Raises ValueError as `parse` does, and for a padding, epsilon or `model.gray` that does not match the weights.
    """
    model, spec = config.model, config.input
    try:
        source = parse(model)
    except ValueError:
        kind = model.weights.removeprefix("meanvar:").partition(":")[0]
        if spec.mean is not None and spec.std is not None and kind in ("file", "run"):
            return config  # a saved, complete configuration, which may not need the weights again
        raise
    if source.record:
        trained, channels = source.record.input, source.record.input.channels
        model = _with_fields(model, dict(source.record.network), source.record.name)
    elif source.run:
        old = overrides.read(source.run / "config.json")
        trained, channels = old.input, old.input.network_channels
        model = _with_fields(model, vars(old.model), f"of {source.run}")
    else:
        return config
    mean, std = spec.mean or trained.mean or (0.0,), spec.std or trained.std or (1.0,)
    if (spec.channels, channels) == (1, 3):
        mean, std = _gray_normalization(mean, std, model)
    return replace(config, model=model, input=replace(spec, mean=mean, std=std))


def _with_fields(model: ModelConfig, required: Mapping[str, Any], weights: str) -> ModelConfig:
    """Returns `model` with the padding and epsilon that the weights require, by default those of the network."""
    network = models.MODELS[model.name]()
    fields: dict[str, Any] = {}
    for field in ("padding", "epsilon"):
        value, given = required.get(field), getattr(model, field)
        expected = getattr(network, field, None) if value is None else value
        if None not in (given, expected) and given != expected:
            raise ValueError(f"model.{field}={given!r}: the weights {weights} are for {expected!r}")
        fields[field] = value if given is None else given
    return replace(model, **fields)


def _gray_normalization(mean: Floats, std: Floats, model: ModelConfig) -> tuple[Floats, Floats]:
    """Returns the mean and std for gray images with weights trained on color images, according to `model.gray`."""
    if model.gray == "repeat":  # three numbers each, so that normalization repeats the channel
        return mean * (3 // len(mean)), std * (3 // len(std))
    if model.gray == "slice":
        return mean[len(mean) // 2 :][:1], std[len(std) // 2 :][:1]
    # Equivalent only if the channels are equal everywhere, even in the padding, which is added after normalization.
    problem = ""
    if len({*mean}) > 1 or len({*std}) > 1:
        problem = f"{model.weights} of {model.name} needs mean {mean} and std {std}, which differ by channel"
    elif models.family_of(model.name) == "bit":
        problem = f"{model.name} standardizes its kernels, which does not commute with the sum over channels"
    if problem:
        raise ValueError(f"model.gray=fold: {problem}, so no one-channel kernel is equivalent; use model.gray=repeat")
    return mean[:1], std[:1]


def leaves(
    config: Config, module: nn.Module, weights_dir: Path | None = None, keep_head: bool = False
) -> dict[str, np.ndarray]:
    """Returns initial parameters and statistics by path; all others must be initialized randomly.

    `config` must be resolved; `module` is its network. The classifier is loaded only if `keep_head` is set. Raises
    ValueError if the file is missing, damaged or for another network.
    """
    source = parse(config.model)
    if not source.record and not source.run:
        return {}
    ours = models.leaf_shapes(module, (*config.input.size, config.input.network_channels))
    opened, rules, channels, label = _open(source, config.model.name, weights_dir)
    with opened as tensors:
        shapes = models.leaf_shapes(module, (*config.input.size, channels))  # with the channels of the weights
        fresh = {} if keep_head else {"fresh": CLASSIFIER, "optional": "^head/"}
        try:
            loaded = convert(tensors, rules, shapes, label=label, **fresh)
        except ValueError as error:
            if isinstance(tensors, Tensors) and len(str(error).splitlines()) > MANY_PROBLEMS + 1:
                raise ValueError(f"{error}\n{tensors.path}: {suggestion(tensors.path)}") from None
            raise
    if not keep_head:
        loaded = _without_detached_hidden(loaded, shapes)
    for path, leaf in loaded.items():
        if leaf.dtype not in (np.float32, np.float64):  # 16-bit files
            loaded[path] = leaf = leaf.astype(np.float32)
        if shapes[path] != ours[path]:  # the first kernel
            loaded[path] = _one_channel(leaf, config.model.gray, ours[path], path)
    return mean_var(loaded, config.train.seed) if source.meanvar else loaded


def _open(
    source: Source, model: str, weights_dir: Path | None
) -> tuple[AbstractContextManager[Mapping[str, np.ndarray]], Rules, int, str]:
    """Returns the tensors of a source, their rules, their number of input channels, and a label for errors."""
    if source.record:
        path = source.file or download.locate(source.record, weights_dir)
        rules, channels = layouts(model)[source.record.layout], source.record.input.channels
        return open_tensors(path), rules, channels, f"{path} ({source.record.name})"
    assert source.run is not None
    old, classes = overrides.read(source.run / "config.json"), len(metadata.read_data(source.run)["classes"])
    image_shape = (*old.input.size, old.input.network_channels)
    network = models.build(old.model, classes)
    state, _ = checkpoint.restore_best(source.run, models.abstract_variables(network, image_shape))
    arrays = {path: leaf for tree in state.values() for path, leaf in trees.flatten(tree or {}).items()}
    label = f"model.weights=run:{source.run} ({old.model.name})"
    return nullcontext(arrays), SAME_NAMES, old.input.network_channels, label


def _without_detached_hidden(loaded: Mapping[str, np.ndarray], shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters without hidden layers of the head that follow a randomly initialized one."""
    hidden = {path: int(match[1]) for path in shapes if (match := re.match(r"head/hidden(\d+)", path))}
    first = min((number for path, number in hidden.items() if path not in loaded), default=None)
    return {path: leaf for path, leaf in loaded.items() if first is None or hidden.get(path, 0) < first}


def _one_channel(kernel: np.ndarray, gray: str, shape: tuple[int, ...], path: str) -> np.ndarray:
    """Returns a kernel [h, w, 3, D] as [h, w, 1, D]: the sum over channels ("fold") or the green one ("slice")."""
    if kernel.ndim != 4 or kernel.shape[2] != 3 or shape[2] != 1:
        channels = kernel.shape[2]
        raise ValueError(f"{path}: the weights need input.channels={channels}, but the images have {shape[2]} channels")
    return kernel.sum(2, keepdims=True) if gray == "fold" else kernel[:, :, 1:2]


def mean_var(leaves: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Returns normal random parameters with the mean and variance of each tensor ("Mean Var", arXiv 1902.07208).

    Running statistics are omitted, since they belong to the original weights.
    """
    random = {}
    for number, (path, leaf) in enumerate(sorted(leaves.items())):
        if not path.endswith(("/mean", "/var")):
            normal = np.random.default_rng((seed, number)).normal(size=leaf.shape)
            random[path] = (np.mean(leaf) + np.std(leaf) * normal).astype(np.float32)
    return random
