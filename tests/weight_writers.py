"""Files of weights for a tiny network in every format, by hand, and records that make it one of the zoo."""

from dataclasses import replace
from functools import partial

import numpy as np
from conftest import small_bn
from random_weights import draw
from test_torch_pickle import ordered, view_metadata, whole, write_stream, write_zip
from test_weight_files import h5_of, write_npz, write_safetensors

from lungjax import models
from lungjax.config import HeadConfig, ModelConfig
from lungjax.models import leaf_shapes
from lungjax.models.efficientnet import EfficientNet, Stage
from lungjax.models.transfusion import Transfusion
from lungjax.weights import catalogue
from lungjax.weights.catalogue.record import HALF, IMAGENET, PretrainedWeights, spec

CLASSES, SIDE = 5, 32


def tiny(width=8):
    """An EfficientNet of two blocks, with each kind of layer that the family has."""
    stages = (Stage(False, 1, 8, 1, 1, 3, 0.25), Stage(False, 1, width + 4, 6, 2, 5))
    return EfficientNet(stages, stem=8, top=2 * width, head=HeadConfig(dropout=0.2))


KERAS = PretrainedWeights(
    name="tiny.keras", model="tiny", layout="keras", url="", filename="tiny.h5", checksum="", classes=CLASSES,
    input=spec(SIDE, IMAGENET, "bicubic"), crop=0.9, top1=None, licence="apache-2.0", megabytes=1,
)  # fmt: skip
HALVED = replace(
    KERAS, name="tiny.half", layout="timm", filename="tiny_half.safetensors", input=spec(SIDE, HALF, "bicubic"),
    url="https://hub/half/model.safetensors",
)  # fmt: skip
TORCH = replace(
    HALVED, name="tiny.torch", filename="tiny_torch.safetensors", input=KERAS.input,
    network=(("epsilon", 1e-5), ("padding", "symmetric")), url="https://hub/torch/model.safetensors",
)  # fmt: skip
OWN = replace(HALVED, name="tiny.own", filename="tiny_own.pth", licence="cc-by-nc-4.0", layout="torchvision")
WIDE = replace(KERAS, name="wide.keras", model="wide", filename="wide.h5")


def install(monkeypatch):
    """Makes "tiny" and "wide" networks of the zoo, whose only other records are of two real ones; "small" has none."""
    for name, make in {"tiny": tiny, "wide": lambda: tiny(16)}.items():
        monkeypatch.setitem(models.MODELS, name, make)
        monkeypatch.setitem(models.FAMILIES["efficientnet"], name, make)
    for name, make in {"small": small_bn(), "small_wide": partial(Transfusion, 3, (4, 16))}.items():
        monkeypatch.setitem(models.MODELS, name, make)
        monkeypatch.setitem(models.FAMILIES["transfusion"], name, make)
    real = [*catalogue.records("mobilenetv2"), *catalogue.records("efficientnet_b0")]
    monkeypatch.setattr(catalogue, "RECORDS", (KERAS, HALVED, TORCH, OWN, WIDE, *real))


def leaves(model="tiny", classes=CLASSES, channels=3):
    """Random leaves of a network of the zoo by our paths."""
    module = models.build(ModelConfig(name=model), classes)
    return {path: draw(path, shape) for path, shape in leaf_shapes(module, (SIDE, SIDE, channels)).items()}


# Ours -> Keras's and timm's name of each layer.
LAYERS = {
    "stem_conv": ("stem_conv", "conv_stem"),
    "stem_bn": ("stem_bn", "bn1"),
    "stage1_block1/dwconv": ("block1a_dwconv", "blocks.0.0.conv_dw"),
    "stage1_block1/bn": ("block1a_bn", "blocks.0.0.bn1"),
    "stage1_block1/se/reduce": ("block1a_se_reduce", "blocks.0.0.se.conv_reduce"),
    "stage1_block1/se/expand": ("block1a_se_expand", "blocks.0.0.se.conv_expand"),
    "stage1_block1/project_conv": ("block1a_project_conv", "blocks.0.0.conv_pw"),
    "stage1_block1/project_bn": ("block1a_project_bn", "blocks.0.0.bn2"),
    "stage2_block1/expand_conv": ("block2a_expand_conv", "blocks.1.0.conv_pw"),
    "stage2_block1/expand_bn": ("block2a_expand_bn", "blocks.1.0.bn1"),
    "stage2_block1/dwconv": ("block2a_dwconv", "blocks.1.0.conv_dw"),
    "stage2_block1/bn": ("block2a_bn", "blocks.1.0.bn2"),
    "stage2_block1/project_conv": ("block2a_project_conv", "blocks.1.0.conv_pwl"),
    "stage2_block1/project_bn": ("block2a_project_bn", "blocks.1.0.bn3"),
    "top_conv": ("top_conv", "conv_head"),
    "top_bn": ("top_bn", "bn2"),
    "head/dense": ("predictions", "classifier"),
}
KERAS_LEAVES = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance", "kernel": "kernel"}
TORCH_LEAVES = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var", "kernel": "weight"}


def as_keras(ours):
    """Our leaves as Keras names and lays them out."""
    tensors = {}
    for path, array in ours.items():
        layer, _, leaf = path.rpartition("/")
        name = "bias" if leaf == "bias" and "bn" not in layer else KERAS_LEAVES[leaf]
        if layer.endswith("dwconv"):
            name, array = "depthwise_kernel", array.swapaxes(2, 3)
        tensors[f"{LAYERS[layer][0]}/{name}"] = np.ascontiguousarray(array)
    return tensors


def as_timm(ours):
    """Our leaves as timm names and PyTorch lays them out."""
    tensors = {}
    for path, array in ours.items():
        layer, _, leaf = path.rpartition("/")
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        tensors[f"{LAYERS[layer][1]}.{TORCH_LEAVES[leaf]}"] = np.ascontiguousarray(array)
    return tensors


def torch_writer(write):
    def writer(path, tensors):
        more = view_metadata(write)
        tree = ordered({name: whole(str(i), array, *more) for i, (name, array) in enumerate(tensors.items())})
        return write(path, tree, {str(i): array.tobytes() for i, array in enumerate(tensors.values())})

    return writer


# Format -> what writes it, how its tensors are named, and a file name by which the record is known.
FORMATS = {
    "h5": (h5_of, as_keras, "tiny.h5"),
    "npz": (write_npz, as_keras, "tiny.h5"),  # what a file is, its bytes say
    "safetensors": (write_safetensors, as_timm, "tiny_half.safetensors"),
    "pth": (torch_writer(write_zip), as_timm, "tiny_half.safetensors"),
    "pth stream": (torch_writer(write_stream), as_timm, "tiny_half.safetensors"),
}


def write(folder, form, ours, name=None):
    """Writes our leaves in a format; returns the path."""
    writer, named, known = FORMATS[form]
    folder.mkdir(parents=True, exist_ok=True)
    return writer(folder / (name or known), named(ours))
