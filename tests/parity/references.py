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


def build(case: Case, side: int, double: bool = False) -> Any:
    """Returns the reference network for images of `side` pixels with its initial weights."""
    return (_keras if case.library == "keras" else _torch)(case, side, double)


def make(case: Case, side: int, double: bool = False, state: list[np.ndarray] | None = None) -> Any:
    """Returns the reference network in evaluation mode for images of `side` pixels.

    `state` is from `values` of another build; without it weights are drawn, then running statistics computed.
    """
    model = build(case, side, double)
    if state is not None:
        assign(case, model, state)
        return model
    arrays = tensors(case, model)
    shift = 1.0 if _norms([name for name, _ in arrays]) else 0.0

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.startswith("normalization"):  # of the input, in Keras's EfficientNet; it is already normalized
            return np.full(shape, 1.0 if "variance" in name else 0.0)
        return draw(name, shape, case.gain, shift) if shape else np.zeros(())

    assign(case, model, [value(name, tuple(np.shape(v))) for name, v in arrays])
    assign(case, model, with_statistics(case, model, side))
    return model


def tensors(case: Case, model: Any) -> list[tuple[str, Any]]:
    """Returns the arrays of the reference with its own names, in its own order."""
    if case.library == "keras":
        return [(_path(v), v.value) for v in model.weights if "seed_generator" not in v.path]
    return [(name, value.numpy()) for name, value in model.state_dict().items()]


def _path(variable: Any) -> str:
    return re.sub(r"^sequential(_\d+)?/", "", variable.path)


def values(case: Case, model: Any) -> list[np.ndarray]:
    """Returns copies of the arrays of the reference, in its own order."""
    return [np.array(value) for _, value in tensors(case, model)]


def assign(case: Case, model: Any, state: list[np.ndarray]) -> None:
    """Sets all arrays, in the order of the reference."""
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


def with_statistics(case: Case, model: Any, side: int) -> list[np.ndarray]:
    """Returns the arrays with running statistics of random images, each changed at random by up to half its size.

    Completely random statistics would make a deep network's output independent of its input.
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
    scale, offset = re.compile(r"(moving_variance|running_var)$"), re.compile(r"(moving_mean|running_mean)$")
    return [
        value * draw(name, value.shape) if scale.search(name)  # 0.5..1.5
        else value + draw(name, value.shape) if offset.search(name) else value
        for name, value in zip(names, now, strict=True)
    ]  # fmt: skip


def _keras(case: Case, side: int, double: bool) -> Any:
    import keras

    keras.config.set_floatx("float64" if double else "float32")
    keras.config.set_dtype_policy("float64" if double else "float32")
    if double:
        # Keras's BatchNorm takes its dtype from this function, which never returns float64.
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
            layer.eps = 1e-10  # as in the released code; timm has 1e-8
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
        import_torchvision.library = library  # its definitions live as long as the object
    import torchvision

    return torchvision


def parameters(model: Any) -> int:
    """Returns the library's own count of trainable parameters."""
    if hasattr(model, "trainable_weights"):
        return sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    return sum(p.numel() for p in model.parameters())


def feed(case: Case, images: np.ndarray) -> np.ndarray:
    """Converts normalized RGB images to the input of the reference."""
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
    """Returns the logits in training mode and the gradients of their mean square, by the reference's own names.

    Dropout and stochastic depth are off.
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


def file_name(case: Case, name: str, shape: tuple[int, ...]) -> str:
    """Returns the name in the released file of a tensor of the reference."""
    if case.library != "keras":
        return _bit_name(name) if case.layout == "bit" else name
    layer = name.partition("/")[0]
    new, (weight,) = released(case.name, layer, {name: shape})
    return f"{new}/{weight.removesuffix(':0').removeprefix(new + '/')}"


def file_shapes(case: Case, model: Any, today: bool = False) -> dict[str, list[int]]:
    """Returns the shapes of the tensors of the released file by name; `today`: with the names of Keras 3."""
    shapes = {}
    for name, value in tensors(case, model):
        if not name.startswith("normalization"):
            array = _bit_array(value) if case.layout == "bit" else value
            shapes[name if today else file_name(case, name, np.shape(value))] = list(np.shape(array))
    return shapes


def tensor_facts(case: Case, model: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns facts and running statistics, both by the names of the file.

    Facts: {"shift": of `draw`, "tensors": {name in the file: [name for `draw`, shape, is it transposed there]}}.
    """
    arrays = [(name, np.asarray(value)) for name, value in tensors(case, model)]
    facts, stats = {}, {}
    for name, value in arrays:
        if not value.shape or name.startswith("normalization"):
            continue
        new = file_name(case, name, value.shape)
        facts[new] = [name, list(value.shape), case.layout == "bit" and value.ndim == 4]
        if _norms([name]) or re.search(r"(moving|running)_mean", name):
            stats[new] = value
    return {"shift": 1.0 if _norms([name for name, _ in arrays]) else 0.0, "tensors": facts}, stats


def write(case: Case, model: Any, path: Path) -> None:
    """Writes the weights of the reference in the format of the released file."""
    if case.layout == "ours":
        names = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}
        split = [(n.rpartition("/")[0].replace(".", "/"), n.rpartition("/")[2], v) for n, v in tensors(case, model)]
        np.savez(path, **{f"{layer}/{names.get(leaf, leaf)}": np.asarray(v) for layer, leaf, v in split})
    elif case.library == "keras":
        _write_h5(case, model, path)
    elif path.suffix == ".npz":
        np.savez(path, **{_bit_name(name): _bit_array(value.numpy()) for name, value in model.state_dict().items()})
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
    parts = [name] if name in group.attrs else [f"{name}{n}" for n in range(1000) if f"{name}{n}" in group.attrs]
    return [item for part in parts for item in group.attrs[part]]


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


def _bit_array(value: np.ndarray) -> np.ndarray:
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
