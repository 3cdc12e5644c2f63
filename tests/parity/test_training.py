"""Training itself: 20 steps in Keras and in lungjax from the same weights, on the same batches, step by step.

python -m pytest -s tests/parity/test_training.py (needs the extra `parity`). Ours is what a run does: the batches of
`pipeline.train_batches` over a prepared folder of CT slices (of random images where there are none), the program of
`program.build` and its compiled step. Keras has the layers of `studies.build` under `train_on_batch`, with the very
arrays. Augmentation and dropout are off, so that nothing random is left.

python -m tests.parity.test_training "RUN" float32|float64 prints one comparison as JSON.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported

import json
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
SLICES = ROOT / os.environ.get("LUNGJAX_SHARED", "../shared") / "data" / "ct"
STEPS, SIDE = 20, 128
BATCH = {"float32": 16, "float64": 4}  # Keras's convolutions in float64 take seconds a step
CLASSES = {"COVID": 90, "NonCOVID": 50}  # images of each: unlike counts, so that class weights say something
NAMES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}  # Keras's and ours
SGD = ["optim.name=sgd", "optim.lr=0.01", "optim.momentum=0.9"]
RUNS = {  # network, what differs from Adam with rate 1e-3 and epsilon 1e-7
    "cbr_small": ("cbr_small", ["optim.class_weights=balanced"]),
    "simple, nesterov": ("simple", [*SGD, "optim.nesterov=True"]),
    "simple, adamw": ("simple", ["optim.name=adamw", "optim.weight_decay=0.01"]),
}


def prepared(folder: Path) -> Any:
    """Prepares slices as a user would, and opens them."""
    from lungjax import datasets

    lines, rng = ["path,label,split"], np.random.default_rng(0)
    (folder / "in").mkdir()
    for name, count in CLASSES.items():
        real = sorted(path for path in (SLICES / name).glob("*") if path.suffix in (".jpg", ".png"))
        for i in range(count):
            path = folder / "in" / f"{name}{i}.png"
            if real:
                Image.open(real[i * len(real) // count]).convert("L").save(path)
            else:
                coarse = Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8))
                coarse.resize((150, 140), Image.Resampling.BICUBIC).save(path)
            lines.append(f"{path.name},{name},{'val' if i < 5 else 'test' if i < 10 else 'train'}")
    (folder / "in/labels.csv").write_text("\n".join(lines))
    datasets.write("folder", folder / "in", folder / "data", datasets.PrepareOptions(), quiet=True)
    return datasets.open_dataset("folder", folder / "data")


def configured(run: str, kind: str) -> Any:
    """Returns the run's configuration; all that is not named here is lungjax's default."""
    from lungjax.config import Config, InputSpec, ModelConfig, OptimConfig, TrainConfig, overrides
    from lungjax.weights import load

    model, assignments = RUNS[run]
    config = Config(
        input=InputSpec(size=(SIDE, SIDE)),
        model=ModelConfig(name=model),
        optim=OptimConfig(name="adam", lr=1e-3, eps=1e-7),
        train=TrainConfig(batch_size=BATCH[kind], steps=STEPS),
    )
    for assignment in assignments:
        config = overrides.override(config, assignment)
    return load.resolve(config)


def keras_optimizer(optim: Any) -> Any:
    """Returns Keras's own optimiser with the same numbers, but for the epsilon of Adam.

    Keras adds epsilon to the root of the second moment before that is corrected for its start at zero, the paper
    (arXiv 1412.6980, algorithm 1) and optax after it: Keras's epsilon is 32 times the other at the first step and 7
    times at the 20th. EPSILON=keras in the environment leaves it.
    """
    from keras import optimizers

    if optim.name == "sgd":
        return optimizers.SGD(optim.lr, momentum=optim.momentum, nesterov=optim.nesterov)

    def corrected(base: type) -> type:
        class Corrected(base):
            def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
                step = self.iterations.value.astype(variable.dtype) + 1
                usual = self.epsilon
                self.epsilon = usual * (1 - self.beta_2**step) ** 0.5
                super().update_step(gradient, variable, learning_rate)
                self.epsilon = usual

        return base if os.environ.get("EPSILON") == "keras" else Corrected

    if optim.name == "adamw":
        made = corrected(optimizers.AdamW)(optim.lr, weight_decay=optim.weight_decay, epsilon=optim.eps)
        made.exclude_from_weight_decay(var_names=["bias"])  # kernels alone, as ours
        return made
    return corrected(optimizers.Adam)(optim.lr, epsilon=optim.eps)


def arrays(model: Any) -> dict[str, np.ndarray]:
    """Returns copies of Keras's arrays under our paths: head.dense/kernel is head/dense/kernel."""
    found = {}
    for variable in model.weights:
        layer, leaf = variable.path.split("/")[-2:]
        found[f"{layer.replace('.', '/')}/{NAMES.get(leaf, leaf)}"] = np.array(variable.value)
    return found


def compare(run: str, kind: str, folder: Path) -> dict[str, Any]:
    """Trains both; returns the losses of each step, and how far statistics and logits are apart in the end."""
    import jax

    jax.config.update("jax_enable_x64", kind == "float64")
    import jax.numpy as jnp
    import keras

    from lungjax import models
    from lungjax.data import pipeline
    from lungjax.models import trees
    from lungjax.runtime import mesh as meshes
    from lungjax.training import program, step
    from tests.parity import studies

    data, config = prepared(folder), configured(run, kind)
    labels = data.columns["label"][pipeline.train_rows(data)]
    batches = list(islice(pipeline.train_batches(data, config, start=0), STEPS))

    keras.utils.set_random_seed(1)
    keras.config.set_floatx(kind)
    keras.config.set_dtype_policy(kind)
    if kind == "float64":
        from keras.src.backend.common import dtypes

        narrow = dtypes.result_type  # float32 for float64 and anything: BatchNorm and means would round to that

        def wide(*kinds: Any) -> str:
            given = [str(getattr(kind, "dtype", kind)) for kind in kinds]
            return "float64" if "float64" in given else narrow(*kinds)

        dtypes.result_type = keras.src.backend.result_type = wide
        # Pixels leave the augmentation as whole numbers in float32; from there on all is float64.
        build, normalize = models.build, step.normalize
        models.build = lambda *args, **kwargs: build(*args, **kwargs).clone(dtype=jnp.float64)
        step.normalize = lambda images, spec: normalize(images.astype(jnp.float64), spec)
    layers = studies.build(RUNS[run][0], SIDE, channels=1, outputs=len(data.classes)).layers
    theirs = keras.Sequential([keras.Input((SIDE, SIDE, 1)), keras.layers.Rescaling(1 / 255), *layers])
    theirs.compile(keras_optimizer(config.optim), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    weights = None
    if config.optim.class_weights == "balanced":
        weights = {number: len(labels) / (len(data.classes) * n) for number, n in enumerate(np.bincount(labels))}

    mesh = meshes.make_mesh(1)
    compiled = program.build(config, data.classes, labels, mesh)
    state = compiled.new_state({path: array.astype(kind) for path, array in arrays(theirs).items()})
    table = []
    for batch in batches:
        theirs.reset_metrics()
        want = theirs.train_on_batch(batch["image"].astype(kind), batch["label"], class_weight=weights)
        state, metrics = compiled.train_step(state, meshes.to_devices(batch, mesh))
        table.append((float(want), float(metrics["loss"])))

    ours, keras_s = {**trees.flatten(state.params), **trees.flatten(state.batch_stats)}, arrays(theirs)
    assert ours.keys() == keras_s.keys()
    apart = {path: float(np.abs(ours[path] - a).max() / np.abs(a).max()) for path, a in keras_s.items()}
    images = np.concatenate([batch["image"] for batch in batches[:3]])
    want = np.asarray(theirs(images.astype(kind), training=False))
    got = compiled.network(compiled.network.fold(state.variables), step.normalize(images, config.input))[0]
    return {
        "losses": table,
        "statistics": {path: part for path, part in apart.items() if path.endswith(("/mean", "/var"))},
        "parameters": {path: part for path, part in apart.items() if not path.endswith(("/mean", "/var"))},
        "logits": float(np.abs(want - got).max() / np.ptp(want)),
    }


def in_its_own_process(run: str, kind: str) -> dict[str, Any]:
    """Returns what `compare` gives, and prints the table."""
    line = [sys.executable, "-m", "tests.parity.test_training", run, kind]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{run}, {kind}\nstep     Keras      lungjax    apart")
    for number, (want, got) in enumerate(found["losses"], 1):
        print(f"{number:4} {want:10.7f} {got:10.7f}  {abs(got / want - 1):.1e}")
    print(f"in the end: logits {found['logits']:.1e} of their range, {found['statistics']}, {found['parameters']}")
    return found


def apart(found: dict[str, Any]) -> np.ndarray:
    """Returns the relative difference of the losses at each step."""
    losses = np.asarray(found["losses"])
    assert losses.shape == (STEPS, 2) and np.ptp(losses[:, 0]) > 0.01
    return np.abs(losses[:, 1] / losses[:, 0] - 1)


def test_twenty_steps_are_those_of_keras():
    """CBR-Small, Adam 1e-3, class weights: the loss goes up to 5 and down again, and every digit of it is Keras's."""
    found = in_its_own_process("cbr_small", "float64")
    assert apart(found).max() <= 1e-9
    assert max(found["statistics"].values()) <= 1e-7 and found["logits"] <= 1e-7


def test_twenty_steps_of_adamw_are_those_of_keras_in_float32():
    found = in_its_own_process("simple, adamw", "float32")
    assert apart(found).max() <= 1e-4
    assert max(found["parameters"].values()) <= 1e-4 and found["logits"] <= 1e-4


def test_float32_is_keras_to_its_digits_until_a_pool_decides_otherwise():
    """Of the 166,000 pool windows of stage 3 some have two maxima that are one in float32 and two in float64.

    One that is taken from another place changes the gradient below it by some thousandths, and steps of this size
    multiply that. So in float32 no two programs agree for long; the first loss has seen no gradient yet.
    """
    assert apart(in_its_own_process("cbr_small", "float32"))[0] <= 1e-5


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(compare(sys.argv[1], sys.argv[2], Path(name))))
