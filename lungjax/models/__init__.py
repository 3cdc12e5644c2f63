"""All networks by name. `network(images, train=...)` returns (logits, features)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.config import ModelConfig, nearest
from lungjax.models import trees
from lungjax.models.convnext import CONVNEXT
from lungjax.models.densenet import DENSENET
from lungjax.models.efficientnet import EFFICIENTNET, EFFICIENTNETV2
from lungjax.models.head import output_count, with_defaults
from lungjax.models.mobilenet import MOBILENET, MOBILENETV2
from lungjax.models.mobilenetv3 import MOBILENETV3
from lungjax.models.ops.conv import plain_forms
from lungjax.models.resnet import BIT, RESNET
from lungjax.models.squeezenet import SQUEEZENET
from lungjax.models.transfusion import TRANSFUSION, XRAY_CNN
from lungjax.models.vgg import VGG

# Constructors by name; without arguments each returns the published network with 1000 classes. The name of a family is
# also that of its tables in weights/name_rules.toml.
FAMILIES: dict[str, Mapping[str, Callable[[], Any]]] = {
    "transfusion": TRANSFUSION,
    "xray_cnn": XRAY_CNN,
    "efficientnet": EFFICIENTNET,
    "efficientnetv2": EFFICIENTNETV2,
    "resnet": RESNET,
    "bit": BIT,
    "convnext": CONVNEXT,
    "densenet": DENSENET,
    "vgg": VGG,
    "squeezenet": SQUEEZENET,
    "mobilenet": MOBILENET,
    "mobilenetv2": MOBILENETV2,
    "mobilenetv3": MOBILENETV3,
}
MODELS: dict[str, Callable[[], Any]] = {name: make for family in FAMILIES.values() for name, make in family.items()}


def check_name(name: str) -> None:
    """Raises ValueError with the nearest names for an unknown network."""
    if name not in MODELS:
        raise ValueError(f"model.name={name!r}: unknown network; {nearest(name, MODELS)}")


def family_of(name: str) -> str:
    """Returns the family of a network. Raises ValueError for an unknown one."""
    check_name(name)
    return next(family for family, names in FAMILIES.items() if name in names)


def build(config: ModelConfig, classes: int, remat: bool = False, platform: str | None = None) -> nn.Module:
    """Returns the network of `config` (see `Network`) with one logit per class, or a single one for a sigmoid head.

    Fields of `config` that are None take the value published for the architecture. `remat` recomputes the activations
    of each block in the backward pass. `platform` ("cpu", "gpu", "tpu", None: the default) sets the default dtype.
    Raises ValueError for an unknown name, a padding, epsilon, drop_path or dropout that the network does not support,
    fewer than two classes, and a sigmoid with more than two.
    """
    check_name(config.name)
    platform = platform or jax.default_backend()
    dtype = config.dtype or ("float32" if platform == "cpu" else "bfloat16")  # accelerators support bfloat16
    network = MODELS[config.name]()
    options = {name: getattr(config, name) for name in ("padding", "epsilon", "drop_path", "dropout")}
    fields: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for name, value in fields.items():
        if not hasattr(network, name):
            raise ValueError(f"model.{name}={value!r}: {config.name} does not have this option; leave it unset (None)")
    if config.padding is not None and config.padding not in network.paddings:
        allowed = ", ".join(network.paddings)
        raise ValueError(f"model.padding={config.padding!r}: {config.name} allows {allowed}")
    if config.momentum is not None and hasattr(network, "momentum"):
        fields["momentum"] = config.momentum
    head = with_defaults(config.head, network.head)
    fields |= {"head": head, "outputs": output_count(head, classes), "remat": remat, "dtype": jnp.dtype(dtype)}
    return network.clone(**fields)


@partial(jax.jit, static_argnums=(0, 1))  # traced once, since that takes seconds for a deep network
def random_variables(module: nn.Module, image_shape: tuple[int, ...], key: jax.Array) -> dict[str, Any]:
    """Returns newly initialized parameters and statistics, for images of [height, width, channels]."""
    with plain_forms():  # the logits are not used
        return dict(module.init(key, jnp.zeros((1, *image_shape)), train=False))


def abstract_variables(module: nn.Module, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the same variables as `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(partial(random_variables, module, image_shape), jax.random.key(0))


def leaf_shapes(module: nn.Module, image_shape: tuple[int, ...]) -> Mapping[str, Any]:
    """Returns the shapes of all parameters and statistics by path, for images of [height, width, channels]."""
    variables = abstract_variables(module, image_shape)
    return {path: leaf.shape for tree in variables.values() for path, leaf in trees.flatten(tree).items()}
