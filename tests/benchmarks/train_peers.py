"""The frameworks of `train.py`: each process trains one network and is idle between requests.

Each interpreter needs numpy and only its own libraries: jax, flax and optax; Keras and jax; or torch and timm.

All train the same layers with Adam in float32, with the same classes, dropout and stochastic depth. CBR networks are
defined here for torch and in tests.parity for Keras; ResNet50V2 is defined here, since timm's has other strides.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks import harness
from tests.parity.studies import CBR, build

SIDE, BATCH = 224, 8
LR = 1e-3
WARM_STEPS = 3  # after the first step, since torch tunes its kernels for some steps
TURN_SECONDS = 2.0  # length of a turn; at least one step
PROCESS = contextlib.ExitStack()  # contexts that last as long as the process

CLASSES = 3
KERAS = {
    "efficientnet_b0": "EfficientNetB0", "mobilenetv2": "MobileNetV2", "efficientnetv2_s": "EfficientNetV2S",
    "convnext_tiny": "ConvNeXtTiny", "resnet50v2": "ResNet50V2", "densenet121": "DenseNet121",
}  # fmt: skip
TIMM = {
    "efficientnet_b0": "tf_efficientnet_b0", "mobilenetv2": "mobilenetv2_100",
    "efficientnetv2_s": "tf_efficientnetv2_s", "convnext_tiny": "convnext_tiny", "densenet121": "densenet121",
}  # fmt: skip


def channels(network: str) -> int:
    """Returns the number of image channels, 1 for CBR networks and 3 for the others."""
    return 1 if network in CBR else 3


def keras_network(network: str) -> Any:
    """Returns the Keras model with three logits, from keras.applications if available."""
    import keras

    if network in KERAS:
        plain = {"include_preprocessing": False} if network in ("efficientnetv2_s", "convnext_tiny") else {}
        make = getattr(keras.applications, KERAS[network])
        return make(weights=None, input_shape=(SIDE, SIDE, 3), classes=CLASSES, classifier_activation=None, **plain)
    return build(network, SIDE, channels=1, outputs=CLASSES)


def torch_network(network: str) -> Any:
    """Returns the torch module with three logits, from timm if it has the same layers."""
    import torch

    if network == "resnet50v2":
        return torch_resnet50v2()
    if network in TIMM:
        from tests.parity import cpu_torchvision  # noqa: F401, I001 (before timm, which imports torchvision)
        import timm

        drop = {"drop_rate": 0.2, "drop_path_rate": 0.2} if network.startswith("efficientnet") else {}
        return timm.create_model(TIMM[network], pretrained=False, num_classes=CLASSES, **drop)
    kernel, widths, last_pool = CBR[network]
    stack: list[Any] = []
    for into, width in zip((1, *widths), widths, strict=False):
        norm = torch.nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)
        stack += [torch.nn.Conv2d(into, width, kernel), norm, torch.nn.ReLU(inplace=True), torch.nn.MaxPool2d(3, 2)]
    ends = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(widths[-1], CLASSES)]
    return torch.nn.Sequential(*(stack if last_pool else stack[:-1]), *ends)


def torch_resnet50v2() -> Any:
    """Returns Keras's ResNet50V2, where the last block of a stage has its stride, with three logits."""
    from torch import nn

    def norm(width: int) -> Any:
        return nn.Sequential(nn.BatchNorm2d(width, eps=1.001e-5, momentum=0.01), nn.ReLU(inplace=True))

    class Block(nn.Module):
        def __init__(self, inputs: int, width: int, stride: int) -> None:
            super().__init__()
            self.norm = norm(inputs)
            self.shortcut = nn.Conv2d(inputs, 4 * width, 1) if inputs != 4 * width else None
            self.pool = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()
            self.body = nn.Sequential(
                nn.Conv2d(inputs, width, 1, bias=False), norm(width),
                nn.Conv2d(width, width, 3, stride, padding=1, bias=False), norm(width), nn.Conv2d(width, 4 * width, 1),
            )  # fmt: skip

        def forward(self, x: Any) -> Any:
            active = self.norm(x)
            return (self.shortcut(active) if self.shortcut else self.pool(x)) + self.body(active)

    layers, inputs = [nn.Conv2d(3, 64, 7, 2, padding=3), nn.MaxPool2d(3, 2, padding=1)], 64
    for width, blocks, stride in ((64, 3, 2), (128, 4, 2), (256, 6, 2), (512, 3, 1)):
        for number in range(blocks):
            layers.append(Block(inputs, width, stride if number == blocks - 1 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, norm(inputs), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def normalized(network: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the data of the peers: float32 images [BATCH, SIDE, SIDE, channels] and int32 labels."""
    images = np.random.default_rng(0).normal(size=(BATCH, SIDE, SIDE, channels(network))).astype(np.float32)
    return images, (np.arange(BATCH) % CLASSES).astype(np.int32)


# A function that trains one step and returns its loss on the device, and facts.
Framework = tuple[Callable[[], Any], dict[str, Any]]


def jax_framework(step: Any, shapes: Any, state: Any, data: Any, unpack: Callable, **facts: Any) -> Framework:
    """Compiles a jitted function of state and data; `unpack` maps its result to the new state and the loss."""
    start = time.perf_counter()
    program = step.lower(*shapes).compile()
    facts["compile_seconds"] = time.perf_counter() - start

    def advance() -> Any:
        nonlocal state
        state, loss = unpack(program(state, data))
        return loss

    return advance, facts


def ours(network: str) -> Framework:
    """Returns the training step of lungjax, compiled as in `lungjax.training.train`."""
    harness.keep_freed_memory()
    import flax
    import jax
    import optax

    from lungjax.config import Config, InputSpec, ModelConfig, OptimConfig, TrainConfig
    from lungjax.models import trees
    from lungjax.runtime import mesh as meshes
    from lungjax.training import program

    config = Config(
        input=InputSpec(size=(SIDE, SIDE), channels=channels(network), mean=(0.5,), std=(0.25,)),
        # Keras's and timm's ConvNeXt drop no paths by default.
        model=ModelConfig(name=network, drop_path=0.0 if "convnext" in network else None),
        optim=OptimConfig(name="adam", lr=LR),
        train=TrainConfig(batch_size=BATCH, steps=10**6),
    )
    mesh, labels = meshes.make_mesh(1), normalized(network)[1]
    built = program.build(config, tuple("abc"), labels, mesh)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, channels(network)), np.uint8)
    examples = {"image": images, "label": labels, "place": np.arange(BATCH, dtype=np.uint32)}
    data, state = meshes.to_devices(examples, mesh), built.new_state({})
    return jax_framework(
        built.train_step, (built.abstract_state, data), state, data, lambda out: (out[0], out[1]["loss"]),
        versions=f"lungjax, jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}",
        parameters=sum(int(np.prod(leaf.shape)) for leaf in trees.flatten(built.abstract_state.params).values()),
    )  # fmt: skip


def keras(network: str) -> Framework:
    """Returns the training step of Keras 3 on jax as `fit` compiles it: under jit, with donated state.

    The batch is on the device; the loop, callbacks and iterator of `fit`, which could slow the step down, are not used.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras

    model = keras_network(network)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(LR), loss=loss)
    model.optimizer.build(model.trainable_variables)
    groups = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables)
    state = tuple([variable.value for variable in group] for group in (*groups, model.metrics_variables))
    data = tuple(jax.device_put(array) for array in normalized(network))
    return jax_framework(
        jax.jit(model.train_step, donate_argnums=0), (state, data), state, data, lambda out: (out[1], out[0]["loss"]),
        versions=f"keras {keras.__version__}, jax {jax.__version__}",
        parameters=sum(int(np.prod(variable.shape)) for variable in model.trainable_variables),
    )  # fmt: skip


def torch(network: str) -> Framework:
    """Returns the training step of a timm network in eager torch, with channels_last and fused Adam."""
    import torch

    torch.set_num_threads(harness.cores())
    torch.manual_seed(0)
    model = torch_network(network).to(memory_format=torch.channels_last).train()
    images, labels = normalized(network)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(memory_format=torch.channels_last)
    y = torch.from_numpy(labels.astype(np.int64))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)

    def advance() -> Any:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    seconds = harness.timed(lambda: advance().item())
    versions = f"torch {torch.__version__}"
    if network in TIMM:
        versions += f", timm {sys.modules['timm'].__version__}"
    count = sum(p.numel() for p in model.parameters())
    return advance, {"versions": versions, "parameters": count, "compile_seconds": seconds}


def contender(name: str, network: str) -> tuple[dict[str, Any], Callable[[], dict[str, float]]]:
    """Compiles and warms up a training step; returns facts about it, and a function that times one turn."""
    advance, facts = {"ours": ours, "keras": keras, "torch": torch}[name](network)
    if name == "ours":
        from lungjax.runtime import environment

        PROCESS.enter_context(environment.trimming())  # as `lungjax.training.train` does

    def run(steps: int) -> None:
        for _ in range(steps):
            float(advance())  # waits for the step, as `lungjax.training.train` and the progress bar of Keras do

    run(1)
    steps = max(1, round(TURN_SECONDS * WARM_STEPS / harness.timed(lambda: run(WARM_STEPS))))

    def turn() -> dict[str, float]:
        watch = harness.Watch()
        run(steps)
        wall, _, others = watch.read()
        return {"seconds": wall / steps, "others": others, "peak_bytes": harness.peak_bytes()}

    return facts, turn
