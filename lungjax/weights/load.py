"""What a network starts from: `model.weights` resolved to a source, its input and its leaves."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn

from lungjax import config as configs
from lungjax import models
from lungjax.config import Config, ModelConfig, overrides
from lungjax.models import trees
from lungjax.runtime import checkpoint
from lungjax.weights import catalogue, download
from lungjax.weights.catalogue import PretrainedWeights
from lungjax.weights.convert import SAME_NAMES, Rules, convert
from lungjax.weights.identify import DENSE, fits, record_of
from lungjax.weights.readers import Tensors, open_tensors
from lungjax.weights.rules import rules_for

HEAD = r"^head/"  # kept where it fits
FEW = 8  # problems of a damaged file; with more of them it is rather another network's
ALLOWED = "none, imagenet, a record's name, file:PATH, run:WORKDIR, or meanvar: and one of these"


@dataclass(frozen=True)
class Source:
    """Where weights come from; at most one of record and run is there."""

    record: PretrainedWeights | None = None
    file: Path | None = None  # of the record; None looks for it where records are kept
    run: Path | None = None  # workdir
    meanvar: bool = False  # draw from each tensor's mean and variance


def parse(model: ModelConfig) -> Source:
    """Reads `model.weights`.

    Raises ValueError for a word that is no source (with the nearest), a network without public weights, weights
    whose licence was not accepted, a missing file, and a run without trained weights.
    """
    text, meanvar = model.weights.removeprefix("meanvar:"), model.weights.startswith("meanvar:")
    if text == "none" and not meanvar:
        return Source()
    kind, _, rest = text.partition(":")
    if kind == "run":
        if checkpoint.newest(Path(rest), "best") is None:
            raise ValueError(
                f"model.weights={model.weights}: no trained run in {rest} (no weights in checkpoints/best)"
            )
        return Source(run=Path(rest), meanvar=meanvar)
    file = Path(rest).expanduser() if kind == "file" else None
    if file and not file.is_file():
        raise ValueError(f"model.weights={model.weights}: no such file")
    record = record_of(file, model.name) if file else _named(model, text)
    if record.noncommercial and not model.noncommercial:
        raise ValueError(
            f"{record.name}: licence {record.licence} forbids commercial use; --set=model.noncommercial=True accepts it"
        )
    return Source(record=record, file=file, meanvar=meanvar)


def _named(model: ModelConfig, text: str) -> PretrainedWeights:
    """Returns the record that `model.weights` names."""
    known = catalogue.records(model.name)
    if not known and text == "imagenet":
        raise ValueError(
            f"model.weights={model.weights}: no ImageNet weights of {model.name} are public. "
            f"--experiment=imagenet_pretrain:model={model.name} makes some from your ImageNet folder; then "
            "--set=model.weights=run:WORKDIR"
        )
    names = {record.name: record for record in known} | {r.name.partition(".")[2]: r for r in known}
    if known:
        names["imagenet"] = known[0]
    if text not in names:
        raise ValueError(
            f"model.weights={model.weights!r}: allowed are {ALLOWED}; {configs.nearest(text, [*names, 'none'])}"
        )
    return names[text]


def resolve(config: Config) -> Config:
    """Returns the configuration with what its weights demand: mean, std, and fields of the network.

    A field that the user has set stays, but for those that would make other numbers of the weights.
    Raises ValueError as `parse`, for such a field, and for `model.gray=fold` where mean or std differ by channel.
    """
    model, spec = config.model, config.input
    try:
        source = parse(model)
    except ValueError:
        kind = model.weights.removeprefix("meanvar:").partition(":")[0]
        if spec.mean is not None and spec.std is not None and kind in ("file", "run"):
            return config  # a saved configuration, complete; whether the weights are needed is seen later
        raise
    if source.record:
        wanted, channels = source.record.input, 3
        model = _with_fields(model, dict(source.record.network), source.record.name)
    elif source.run:
        path = source.run / "config.json"
        old = overrides.from_json(path.read_text(), str(path))
        wanted, channels = old.input, old.input.network_channels
        fields = {"padding": old.model.padding, "epsilon": old.model.epsilon}
        model = _with_fields(model, fields, f"of {source.run}")
    else:
        return config
    mean, std = gray_input(spec.mean or wanted.mean, spec.std or wanted.std, spec.channels, channels, model)
    return replace(config, model=model, input=replace(spec, mean=mean, std=std))


def _with_fields(model: ModelConfig, wanted: Mapping[str, Any], whose: str) -> ModelConfig:
    """Returns `model` with the fields that weights want, else the network's own, which the user must not change."""
    network = models.MODELS[model.name]()
    fields: dict[str, Any] = {}
    for field in ("padding", "epsilon"):
        value, given = wanted.get(field), getattr(model, field)
        need = getattr(network, field, None) if value is None else value
        if None not in (given, need) and given != need:
            raise ValueError(f"model.{field}={given!r}: the weights {whose} are for {need!r}")
        fields[field] = value if given is None else given
    return replace(model, **fields)


def gray_input(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int, wanted: int, model: ModelConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and std for images of `channels` that meet weights for `wanted` channels.

    Repeated, a gray image gets three numbers, which is what makes three channels of it in the step.
    Raises ValueError for `model.gray=fold` where no folded kernel is the same network.
    """
    mean, std = mean or (0.0,), std or (1.0,)
    if channels == 1 and wanted == 3 and model.gray == "repeat":
        mean, std = mean * (3 // len(mean)), std * (3 // len(std))
    elif channels == 1 and wanted == 3 and model.gray == "fold":
        # A sum of the kernel's three slices is the same network only if the three channels are the same number,
        # borders included: padding comes after the normalisation.
        if len({*mean}) > 1 or len({*std}) > 1:
            raise ValueError(
                f"model.gray=fold: {model.weights} of {model.name} want mean {mean} and std {std}, which differ by "
                "channel, so no one-channel kernel is equal; use model.gray=repeat"
            )
        if models.family_of(model.name) == "bit":
            raise ValueError(
                f"model.gray=fold: {model.name} standardises its kernels, so a sum of three slices is scaled "
                "otherwise; use model.gray=repeat"
            )
        mean, std = mean[:1], std[:1]
    elif channels == 1 and wanted == 3:
        mean, std = mean[len(mean) // 2 :][:1], std[len(std) // 2 :][:1]
    return mean, std


def leaves(
    config: Config, module: nn.Module, weights_dir: Path | None = None, keep_head: bool = False
) -> dict[str, np.ndarray]:
    """Returns the leaves that the network starts from, by path; what is missing starts at random.

    Args:
      config: resolved.
      module: the network of `config`, with its class count.
      weights_dir: where files are looked for first.
      keep_head: load the classifier as well; else it starts anew.

    Raises ValueError if the file is missing, damaged or of another network; nothing is loaded then.
    """
    source = parse(config.model)
    if not source.record and not source.run:
        return {}
    ours = models.leaf_shapes(module, (*config.input.size, config.input.network_channels))
    with _opened(source, config.model.name, weights_dir) as (tensors, rules, channels, where):
        theirs = models.leaf_shapes(module, (*config.input.size, channels))
        fresh = {} if keep_head else {"fresh": DENSE, "optional": HEAD}
        try:
            found = convert(tensors, rules, theirs, where=where, **fresh)
        except ValueError as error:
            if isinstance(tensors, Tensors) and len(str(error).splitlines()) > FEW + 1:
                raise ValueError(f"{error}\n{tensors.path}: {fits(tensors.path)}") from None
            raise
    if not keep_head:
        found = {path: found[path] for path in kept(found, theirs)}
    for path, leaf in found.items():
        if leaf.dtype not in (np.float32, np.float64):  # files in 16 bits; ours train in 32
            found[path] = leaf = leaf.astype(np.float32)
        if theirs[path] != ours[path]:  # the kernel that meets the image
            found[path] = one_channel(leaf, config.model.gray, ours[path], path)
    return mean_var(found, config.train.seed) if source.meanvar else found


@contextmanager
def _opened(
    source: Source, model: str, weights_dir: Path | None
) -> Iterator[tuple[Mapping[str, np.ndarray], Rules, int, str]]:
    """Yields a source's tensors, the rules for them, the channels that they are for, and what errors call it."""
    if source.record:
        path = source.file or download.locate(source.record, weights_dir)
        with open_tensors(path) as tensors:
            yield tensors, rules_for(model, source.record.layout), 3, f"{path} ({source.record.name})"
    else:
        assert source.run is not None
        saved, _ = checkpoint.restore_best(source.run)
        old = overrides.from_json((source.run / "config.json").read_text())
        leaves = {k: v for tree in saved.values() for k, v in trees.flatten(tree or {}).items()}
        yield leaves, SAME_NAMES, old.input.network_channels, f"model.weights=run:{source.run} ({old.model.name})"


def kept(found: Mapping[str, Any], shapes: Mapping[str, Any]) -> list[str]:
    """Returns the paths of `found` without hidden layers of the head that follow one which starts anew."""
    lacking = [path for path in shapes if re.match(r"head/hidden\d", path) and path not in found]
    first = min((int(re.findall(r"\d+", path)[0]) for path in lacking), default=10**6)
    return [p for p in found if not (re.match(r"head/hidden\d", p) and int(re.findall(r"\d+", p)[0]) >= first)]


def one_channel(kernel: np.ndarray, how: str, wanted: tuple[int, ...], path: str) -> np.ndarray:
    """Returns a kernel [h, w, 3, D] as [h, w, 1, D]: the sum ("fold") or the middle slice, green ("slice").

    Raises ValueError where the kernel is not for three channels or one is not wanted.
    """
    if kernel.ndim != 4 or kernel.shape[2] != 3 or wanted[2] != 1:
        raise ValueError(
            f"{path}: the weights are for {kernel.shape[2]} channels, the images have {wanted[2]}; "
            f"set input.channels={kernel.shape[2]}"
        )
    return kernel.sum(2, keepdims=True) if how == "fold" else kernel[:, :, 1:2]


def mean_var(leaves: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Returns random parameters, normal with each tensor's own mean and variance ("Mean Var", arXiv 1902.07208).

    Running statistics are left out: they belong to the weights that were drawn from.
    """
    drawn = {}
    for number, (path, leaf) in enumerate(sorted(leaves.items())):
        if not path.endswith(("/mean", "/var")):
            normal = np.random.default_rng((seed, number)).normal(size=leaf.shape)
            drawn[path] = (np.mean(leaf) + np.std(leaf) * normal).astype(np.float32)
    return drawn
