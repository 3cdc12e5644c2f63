"""Writes weight files of every format for a tiny network, and adds it to the networks and the catalogue."""

import re
from dataclasses import replace

import h5py
import numpy as np
from random_weights import draw
from safetensors.numpy import save_file
from torch_writers import array_of, state_dict, write_stream, write_zip

from lungjax import models
from lungjax.config import HeadConfig, ModelConfig
from lungjax.models import leaf_shapes, trees
from lungjax.models.efficientnet import EfficientNet, Stage, expand
from lungjax.weights import catalogue

CLASSES, SIDE = 5, 32


def tiny(width=8):
    """Returns an EfficientNet of two blocks, with every kind of layer of the family."""
    stages = (Stage(False, 1, 8, 1, 1, 3, 0.25), Stage(False, 1, width + 4, 6, 2, 5))
    return EfficientNet(expand(stages, 8), stem=8, top=2 * width, head=HeadConfig(dropout=0.2))


KERAS = catalogue.from_row({
    "name": "tiny.keras", "layout": "keras", "url": "", "filename": "tiny.h5", "package": "", "checksum": "",
    "classes": str(CLASSES), "size": str(SIDE), "normalization": "imagenet", "interpolation": "bicubic", "crop": "0.9",
    "top1": "", "license": "apache-2.0", "megabytes": "1", "padding": "", "epsilon": "",
})  # fmt: skip
HALVED = replace(
    KERAS, name="tiny.half", layout="timm", filename="tiny_half.safetensors", url="https://hub/half/model.safetensors",
    input=replace(KERAS.input, mean=(0.5,) * 3, std=(0.5,) * 3),
)  # fmt: skip
TORCH = replace(
    HALVED, name="tiny.torch", filename="tiny_torch.safetensors", input=KERAS.input,
    network=(("epsilon", 1e-5), ("padding", "symmetric")), url="https://hub/torch/model.safetensors",
)  # fmt: skip
OWN = replace(HALVED, name="tiny.own", filename="tiny_own.pth", license="cc-by-nc-4.0", layout="torchvision")
WIDE = replace(KERAS, name="wide.keras", filename="wide.h5")


def install(monkeypatch, folder):
    """Adds "tiny" and "wide" to the networks, with records of these two and two real networks; the cache is empty."""
    for name, make in {"tiny": tiny, "wide": lambda: tiny(16)}.items():
        monkeypatch.setitem(models.MODELS, name, make)
        monkeypatch.setitem(models.FAMILIES["efficientnet"], name, make)
    real = [*catalogue.records("mobilenetv2"), *catalogue.records("efficientnet_b0")]
    monkeypatch.setattr(catalogue, "RECORDS", (KERAS, HALVED, TORCH, OWN, WIDE, *real))
    monkeypatch.setenv("LUNGJAX_WEIGHTS", str(folder / "cache"))
    return folder


def flat(variables):
    return {path: np.asarray(leaf) for tree in variables.values() for path, leaf in trees.flatten(tree).items()}


def leaves(model="tiny", classes=CLASSES, channels=3):
    """Returns random parameters of a network, keyed by our paths."""
    module = models.build(ModelConfig(name=model), classes)
    return {path: draw(path, shape) for path, shape in leaf_shapes(module, (SIDE, SIDE, channels)).items()}


# Our layer -> timm's name.
TIMM = {
    "stem_conv": "conv_stem", "stem_bn": "bn1", "top_conv": "conv_head", "top_bn": "bn2", "head/dense": "classifier",
    "stage1_block1/dwconv": "blocks.0.0.conv_dw", "stage1_block1/bn": "blocks.0.0.bn1",
    "stage1_block1/se/reduce": "blocks.0.0.se.conv_reduce", "stage1_block1/se/expand": "blocks.0.0.se.conv_expand",
    "stage1_block1/project_conv": "blocks.0.0.conv_pw", "stage1_block1/project_bn": "blocks.0.0.bn2",
    "stage2_block1/expand_conv": "blocks.1.0.conv_pw", "stage2_block1/expand_bn": "blocks.1.0.bn1",
    "stage2_block1/dwconv": "blocks.1.0.conv_dw", "stage2_block1/bn": "blocks.1.0.bn2",
    "stage2_block1/project_conv": "blocks.1.0.conv_pwl", "stage2_block1/project_bn": "blocks.1.0.bn3",
}  # fmt: skip
KERAS_LEAVES = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance", "kernel": "kernel"}
TORCH_LEAVES = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var", "kernel": "weight"}


def as_keras(ours):
    """Returns our leaves with Keras's names and layout."""
    tensors = {}
    for path, array in ours.items():
        layer, _, leaf = path.rpartition("/")
        name = "bias" if leaf == "bias" and "bn" not in layer else KERAS_LEAVES[leaf]
        if layer.endswith("dwconv"):
            name, array = "depthwise_kernel", array.swapaxes(2, 3)
        layer = re.sub(r"stage(\d)_block1/", r"block\1a_", layer.replace("head/dense", "predictions")).replace("/", "_")
        tensors[f"{layer}/{name}"] = np.ascontiguousarray(array)
    return tensors


def as_timm(ours):
    """Returns our leaves with timm's names and the layout of PyTorch."""
    tensors = {}
    for path, array in ours.items():
        layer, _, leaf = path.rpartition("/")
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        tensors[f"{TIMM[layer]}.{TORCH_LEAVES[leaf]}"] = np.ascontiguousarray(array)
    return tensors


def write_safetensors(path, arrays):
    save_file(arrays, path, {"format": "pt"})
    return path


def write_npz(path, arrays):
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return path


def write_layers(path, layers, root="", chunks=0):
    """Writes Keras's legacy HDF5 format: {layer: {weight: array}}; `chunks` > 0 splits each name list."""

    def set_names(group, name, values):
        values = [value.encode() for value in values]
        for i in range(chunks):
            group.attrs[f"{name}{i}"] = values[i * len(values) // chunks : (i + 1) * len(values) // chunks]
        if not chunks:
            group.attrs[name] = values

    with h5py.File(path, "w") as file:
        top = file.create_group(root) if root else file
        set_names(top, "layer_names", list(layers))
        for layer, weights in layers.items():
            group = top.require_group(layer)
            set_names(group, "weight_names", list(weights))
            for name, array in weights.items():
                group.create_dataset(name, data=array)
    return path


def write_h5(path, arrays):
    layers = {}
    for name, array in arrays.items():
        layers.setdefault(name.rpartition("/")[0] or "top", {})[f"{name}:0"] = array
    return write_layers(path, layers)


def torch_writer(write):
    def writer(path, tensors):
        tree = state_dict({name: array_of(str(i), array) for i, (name, array) in enumerate(tensors.items())})
        return write(path, tree, {str(i): array.tobytes() for i, array in enumerate(tensors.values())})

    return writer


# Format -> writer, naming of its tensors, and a file name by which the record is recognized.
FORMATS = {
    "h5": (write_h5, as_keras, "tiny.h5"),
    "npz": (write_npz, as_keras, "tiny.h5"),  # files are recognized by their bytes
    "safetensors": (write_safetensors, as_timm, "tiny_half.safetensors"),
    "pth": (torch_writer(write_zip), as_timm, "tiny_half.safetensors"),
    "pth stream": (torch_writer(write_stream), as_timm, "tiny_half.safetensors"),
}


def write(folder, form, ours, name=None):
    """Writes our leaves in a format; returns the path."""
    writer, named, known = FORMATS[form]
    folder.mkdir(parents=True, exist_ok=True)
    return writer(folder / (name or known), named(ours))
