"""Opens the data and builds the program of a run, and checks both before anything is written."""

import importlib.util
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lungjax import config as configs
from lungjax.config import Config
from lungjax.data import folds, pipeline
from lungjax.data.prepared import Prepared
from lungjax.datasets import open_dataset
from lungjax.evaluation import metrics, predict_split
from lungjax.evaluation.predictions import Predictions, with_rule
from lungjax.models import outputs, trees
from lungjax.runtime import mesh as meshes
from lungjax.runtime.signals import Watch
from lungjax.training import auto, optim, program
from lungjax.training import workdir as workdirs
from lungjax.training.program import Program
from lungjax.weights import load


@dataclass(frozen=True)
class Run:
    """The constants of a run, in contrast to its training state and progress."""

    config: Config
    workdir: Path
    data: Prepared
    program: Program
    started: float  # time.time() at the start

    def batches(self, start: int) -> Generator[dict[str, jax.Array]]:
        """Yields global training batches from index `start` on, while up to `data.prefetch` more are in transfer."""
        place = {"host": jax.process_index(), "hosts": jax.process_count()}
        batches = pipeline.train_batches(self.data, self.config, start=start, **place)
        ready = []
        try:
            for batch in batches:
                ready.append(meshes.to_devices(batch, self.program.mesh))
                if len(ready) > self.config.data.prefetch:
                    yield ready.pop(0)
        finally:
            batches.close()  # stops its threads and processes

    def predict(
        self, variables: dict[str, Any], split: str, data: Prepared | None = None, watch: Watch | None = None
    ) -> Predictions:
        """Returns predictions for a split of the run's data set, or of `data`, with the test-time augmentation.

        With `watch`, a validation during training: without augmentation, and raises Interrupted if `watch` does.
        """
        built, folded = self.program, self.program.network.fold(variables)
        step, mesh = built.predict_step if watch else built.test_step, built.mesh
        predicted = predict_split.predict(step, folded, data or self.data, split, self.config, mesh, watch)
        how = self.config.eval.aggregate  # "auto" is chosen later, from predictions on val
        return predicted if how == "mean" else with_rule(predicted, "mean" if how[:4] == "auto" else how)


def set_up(
    config: Config, workdir: Path, data_dir: Path, mode: str, started: float, weights_dir: Path | None = None
) -> Run:
    """Opens the data, resolves `config` and builds the program. Raises ValueError if they do not match the workdir."""
    data = open_data(config, data_dir)
    labels = data.columns["label"][pipeline.train_rows(data)]
    config = outputs.resolve(load.resolve(auto.resolve(config, data, workdir, weights_dir)), labels)
    workdirs.check(workdir, config, mode)
    workdirs.check_same_data(workdir, data)
    check_monitor(config, data)
    aggregated = configs.schema.parse_aggregate(config.eval.aggregate)[1]
    for field, names in (("prevalence", config.eval.prevalences()), ("aggregate", aggregated)):
        for name in names:
            if name not in data.classes:
                raise ValueError(f"eval.{field}: no class {name!r}; {configs.nearest(name, data.classes)}")
    if config.train.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ValueError("train.tensorboard=True needs the extra: pip install -e '.[tensorboard]'")
    mesh = meshes.make_mesh(config.train.devices)
    built = program.build(config, data.classes, labels, mesh)
    if mode == "train":
        workdirs.check_length(workdir, built.steps)
    return Run(config, workdir, data, built, started)


def open_data(config: Config, data_dir: Path) -> Prepared:
    """Returns the data set with its splits or folds. Raises ValueError if it is missing or unsuitable."""
    data = open_dataset(config.data.dataset, str(data_dir), config.data.protocol)
    return folds.apply(data, config)


def check_monitor(config: Config, data: Prepared) -> None:
    """Raises ValueError if the val or test split is empty, or `train.monitor` is unknown or undefined on val."""
    for split in ("val", "test"):
        if not len(data.rows(split)):
            raise ValueError(f"{data.name}: the {split} split is empty; prepare the data set with a {split} part")
    rows, classes = data.rows("val"), len(data.classes)
    files, groups, sources, labels = (data.columns[name][rows] for name in ("file", "group", "source", "label"))
    uniform = Predictions(files, groups, sources, labels, np.full((len(rows), classes), 1 / classes), data.classes)
    scores, name = metrics.flat_levels(uniform), config.train.monitor
    if name not in scores:
        raise ValueError(f"train.monitor={name!r}: {configs.nearest(name, scores)}")
    if scores[name] is None:
        raise ValueError(f"train.monitor={name} is undefined on the val split (a class is missing); use slice.accuracy")


def summary(run: Run) -> str:
    """Returns devices, network, length and folder of a run as text, and its parameters if `train.log_parameters`."""
    config, built = run.config, run.program
    devices, hosts = built.mesh.devices.flat, jax.process_count()
    params = trees.flatten(built.abstract_state.params)
    frozen = optim.frozen_paths(config.optim, built.abstract_state.params)
    total, trained = (sum(params[p].size for p in params if p not in left_out) for left_out in ((), frozen))
    epochs = built.steps * config.train.batch_size / len(pipeline.train_rows(run.data))
    lines = [
        f"Devices: {len(devices)} x {devices[0].device_kind} on {hosts} host{'s' * (hosts > 1)}, mesh axis "
        f"{meshes.AXIS}={built.mesh.size}",
        f"Network: {config.model.name}, {total:,} parameters, {trained:,} trained, {np.dtype(built.module.dtype)}",
        f"Training: {built.steps:,} steps of {config.train.batch_size} images ({epochs:.4g} epochs), validation every "
        f"{built.eval_steps:,} steps",
        f"Run: {run.workdir}",
    ]
    if config.train.log_parameters:
        width = max(map(len, params))
        for path, leaf in params.items():
            note = "  frozen" if path in frozen else ""
            lines.append(f"  {path:{width}}  {leaf.size:>11,}  {'x'.join(map(str, leaf.shape))}{note}")
    return "\n".join(lines)
