"""The reference networks: built with random weights, run, and written to files in the released formats."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported: the reference needs no TensorFlow

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity import studies
from tests.parity.cases import Case
from tests.parity.released import released
from tests.random_weights import draw


def make(case: Case, side: int, double: bool = False, state: list[np.ndarray] | None = None) -> Any:
    """Returns the reference network in evaluation mode for images of `side` pixels.

    `state` is what `values` gave of another build; without it weights are drawn and running statistics settled.
    """
    model = (_keras if case.library == "keras" else _torch)(case, side, double)
    if state is None:
        names = [name for name, _ in tensors(case, model)]
        shift = 1.0 if _norms(names) else 0.0
        state = [
            draw(name, shape, case.gain, shift) if shape else np.zeros(())
            for name, shape in ((name, tuple(np.shape(v))) for name, v in tensors(case, model))
        ]
        state = [_input_norm(n, v) for n, v in zip(names, state, strict=True)]
        assign(case, model, state)
        assign(case, model, settled(case, model, side))
    else:
        assign(case, model, state)
    return model


def _input_norm(name: str, value: np.ndarray) -> np.ndarray:
    if not name.startswith("normalization"):  # Keras's EfficientNet, whose input is normalised already
        return value
    return np.ones_like(value) if "variance" in name else np.zeros_like(value)


def tensors(case: Case, model: Any) -> list[tuple[str, Any]]:
    """Returns the reference's arrays with its own names, in its own order."""
    if case.library == "keras":
        return [(_path(v), v.value) for v in model.weights if "seed_generator" not in v.path]
    return [(name, value.numpy()) for name, value in model.state_dict().items()]


def _path(variable: Any) -> str:
    return re.sub(r"^sequential(_\d+)?/", "", variable.path)


def values(case: Case, model: Any) -> list[np.ndarray]:
    """Returns copies of the reference's arrays in its own order."""
    return [np.array(value) for _, value in tensors(case, model)]


def assign(case: Case, model: Any, state: list[np.ndarray]) -> None:
    """Sets all arrays, in the reference's order."""
    if case.library == "keras":
        for variable, value in zip([v for v in model.weights if "seed_generator" not in v.path], state, strict=True):
            variable.assign(value)
        return
    import torch

    old = model.state_dict()
    new = {name: torch.from_numpy(np.asarray(v)).to(old[name].dtype) for name, v in zip(old, state, strict=True)}
    model.load_state_dict(new)


def _norms(names: list[str]) -> bool:
    return any(re.search(r"(moving|running)_var", name) for name in names)


def settled(case: Case, model: Any, side: int) -> list[np.ndarray]:
    """Returns the arrays with running statistics of random images, then moved at random by half their size.

    Wholly random statistics would make the images' maps fade into one another through a deep network.
    """
    names = [name for name, _ in tensors(case, model)]
    start = values(case, model)
    if not _norms(names):
        return start
    images = np.random.default_rng(0).normal(size=(4, side, side, 3)).astype(start[-1].dtype)
    if case.library == "keras":
        import jax

        zero = [v * 0 if re.search(r"moving_(mean|variance)$", n) else v for n, v in zip(names, start, strict=True)]
        assign(case, model, zero)
        parts = ([v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables])
        _, fixed = jax.jit(lambda t, n, x: model.stateless_call(t, n, x, training=True))(*parts, feed(case, images))
        decay = {layer.name: layer.momentum for layer in model.layers if hasattr(layer, "momentum")}
        new = {_path(v): np.asarray(x) for v, x in zip(model.non_trainable_variables, fixed, strict=True)}
        now = [
            new[n] / (1 - decay[n.split("/")[0]]) if re.search(r"moving_(mean|variance)$", n) else v
            for n, v in zip(names, start, strict=True)
        ]
    else:
        import torch

        for layer in model.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                layer.momentum = 1.0
        model.train()
        with torch.no_grad():
            model(torch.from_numpy(feed(case, images)))
        model.eval()
        now = values(case, model)
    moved = []
    for name, value in zip(names, now, strict=True):
        if re.search(r"(moving_variance|running_var)$", name):
            value = value * draw(name, value.shape)  # 0.5..1.5
        elif re.search(r"(moving_mean|running_mean)$", name):
            value = value + draw(name, value.shape)
        moved.append(value)
    return moved


def _keras(case: Case, side: int, double: bool) -> Any:
    import keras

    keras.config.set_floatx("float64" if double else "float32")
    keras.config.set_dtype_policy("float64" if double else "float32")
    if double:
        # Keras's BatchNorm asks this function for its dtype, which knows no float64 as a result.
        keras.src.backend.result_type = lambda *types: "float64"
    if case.layout == "ours":
        return studies.build(case.name, side)
    constructor = getattr(keras.applications, case.name)
    return constructor(weights=None, input_shape=(side, side, 3), classifier_activation=None, **dict(case.options))


def _torch(case: Case, side: int, double: bool) -> Any:
    import torch

    torchvision = import_torchvision(torch)
    if case.library == "timm":
        import timm

        model = timm.create_model(case.name, pretrained=False, **dict(case.options))
    else:
        model = getattr(torchvision.models, case.name)(weights=None, **dict(case.options))
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
        if hasattr(layer, "drop_rate"):
            layer.drop_rate = 0.0
        if type(layer).__name__ in ("StdConv2d", "StdConv2dSame"):
            layer.eps = 1e-10  # of the released code; timm has 1e-8
    return (model.double() if double else model.float()).eval()


def import_torchvision(torch: Any) -> Any:
    """Declares the operators that a CPU-only torch lacks, and imports torchvision."""
    if not hasattr(import_torchvision, "library"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        pools = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
        for name in (*pools, *(f"_{pool}_backward" for pool in pools), "qroi_align", "qnms"):
            with contextlib.suppress(RuntimeError):  # a torchvision may bring it
                library.define(f"{name}(...) -> ...")
        import_torchvision.library = library  # kept: it goes away with its last reference
    import torchvision

    return torchvision


def parameters(model: Any) -> int:
    """Returns the reference's own count of what it trains."""
    if hasattr(model, "trainable_weights"):
        return sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    return sum(p.numel() for p in model.parameters())


def feed(case: Case, images: np.ndarray) -> np.ndarray:
    """Returns normalised RGB images as the reference takes them."""
    if case.library != "keras":
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if case.name.startswith("EfficientNetB"):
        return images * 255  # it divides by 255 itself
    if re.fullmatch(r"ResNet\d+|VGG\d+", case.name):
        return images[..., ::-1].copy()  # BGR
    return images


def logits(case: Case, model: Any, images: np.ndarray) -> np.ndarray:
    """Returns the reference's logits [B, classes] in evaluation mode."""
    if case.library == "keras":
        import jax

        parts = ([v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables])
        return np.asarray(
            jax.jit(lambda t, n, x: model.stateless_call(t, n, x, training=False)[0])(*parts, feed(case, images))
        )
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(feed(case, images))).numpy()


def gradients(case: Case, model: Any, images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the logits in training mode and the gradients of their mean square, by the names of the file.

    Random parts (dropout, stochastic depth) are off.
    """
    if case.library == "keras":
        import jax

        fixed = [v.value for v in model.non_trainable_variables]

        def loss(trained: Any) -> Any:
            out, _ = model.stateless_call(trained, fixed, feed(case, images), training=True)
            return (out**2).mean(), out

        grads, out = jax.jit(jax.grad(loss, has_aux=True))([v.value for v in model.trainable_variables])
        names = [_path(v) for v in model.trainable_variables]
        return np.asarray(out), {n: np.asarray(g) for n, g in zip(names, grads, strict=True)}
    import torch

    model.train()
    out = model(torch.from_numpy(feed(case, images)))
    (out**2).mean().backward()
    model.eval()
    return out.detach().numpy(), {n: p.grad.numpy() for n, p in model.named_parameters()}


def tensor_facts(case: Case, model: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns {"shift", "tensors": {name in the file: [name it was drawn by, its shape then, whether
    the file has it turned]}}, and what was not
    drawn, the running statistics, by the file's names.
    """
    listed = tensors(case, model)
    found, stats = {}, {}
    for name, value in listed:
        value = np.asarray(value)
        layer, _, leaf = name.rpartition("/")
        if case.library == "keras":
            new, (weight,) = released(case.name, layer, {f"{layer}/{leaf}": value.shape})
            file_name = f"{new}/{weight.removesuffix(':0').removeprefix(new + '/')}"
        else:
            file_name = _bit_name(name) if case.layout == "bit" else name
        if not value.shape or name.startswith("normalization"):
            continue
        found[file_name] = [name, list(value.shape), case.layout == "bit" and value.ndim == 4]
        if _norms([name]) or re.search(r"(moving|running)_mean", name):
            stats[file_name] = value
    return {"shift": 1.0 if _norms([n for n, _ in listed]) else 0.0, "tensors": found}, stats


def write(case: Case, model: Any, path: Path) -> None:
    """Writes the reference's weights as its publisher's files have them."""
    if case.layout == "ours":
        names = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}
        split = [(n.rpartition("/")[0].replace(".", "/"), n.rpartition("/")[2], v) for n, v in tensors(case, model)]
        np.savez(path, **{f"{layer}/{names.get(leaf, leaf)}": np.asarray(v) for layer, leaf, v in split})
    elif case.library == "keras":
        _write_h5(case, model, path)
    elif path.suffix == ".npz":
        np.savez(
            path, **{_bit_name(name): _bit_array(name, value.numpy()) for name, value in model.state_dict().items()}
        )
    elif path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    else:
        import torch

        torch.save(model.state_dict(), path)


def _write_h5(case: Case, model: Any, path: Path) -> None:
    import h5py
    from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

    with h5py.File("written.h5", "w", driver="core", backing_store=False) as today, h5py.File(path, "w") as file:
        save_weights_to_hdf5_group(today, model)
        layers = [name.decode() if isinstance(name, bytes) else name for name in _chunked(today, "layer_names")]
        names = []
        for layer in layers:
            weights = [w.decode() if isinstance(w, bytes) else w for w in _chunked(today[layer], "weight_names")]
            new, renamed = released(case.name, layer, {w: today[layer][w].shape for w in weights})
            names.append(new.encode())
            group = file.require_group(new)
            group.attrs["weight_names"] = np.array([w.encode() for w in renamed], dtype="S") if renamed else []
            for old, name in zip(weights, renamed, strict=True):
                group[name] = today[layer][old][()]
        for number, part in enumerate(np.array_split(np.array(names), -(-len(names) // 400))):
            file.attrs["layer_names" if len(names) <= 400 else f"layer_names{number}"] = part


def _chunked(group: Any, name: str) -> list[Any]:
    if name in group.attrs:
        return list(group.attrs[name])
    found, number = [], 0
    while f"{name}{number}" in group.attrs:
        found += list(group.attrs[f"{name}{number}"])
        number += 1
    return found


BIT = (
    (r"stem\.conv\.weight", r"resnet/root_block/standardized_conv2d/kernel"),
    (r"norm\.(weight|bias)", r"resnet/group_norm/\1"),
    (r"head\.fc\.(weight|bias)", r"resnet/head/conv2d/\1"),
)


def _bit_name(name: str) -> str:
    for pattern, replacement in BIT:
        if match := re.fullmatch(pattern, name):
            return _leaf(match.expand(replacement))
    stage, unit, rest = re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", name).groups()
    where = f"resnet/block{int(stage) + 1}/unit{int(unit) + 1:02}"
    if rest == "downsample.conv.weight":
        return f"{where}/a/proj/standardized_conv2d/kernel"
    kind, number, leaf = re.fullmatch(r"(norm|conv)(\d)\.(weight|bias)", rest).groups()
    branch = "abc"[int(number) - 1]
    return _leaf(f"{where}/{branch}/{'group_norm' if kind == 'norm' else 'standardized_conv2d'}/{leaf}")


def _leaf(name: str) -> str:
    names = {"weight": "gamma", "bias": "beta"} if "group_norm" in name else {"weight": "kernel"}
    start, _, leaf = name.rpartition("/")
    return f"{start}/{names.get(leaf, leaf)}"


def _bit_array(name: str, value: np.ndarray) -> np.ndarray:
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
