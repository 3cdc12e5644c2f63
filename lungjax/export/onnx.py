"""Writes `model.onnx` with jax2onnx: the `predict` function in opset 23, for any number of images, with normalization.

    pixels uint8 [B, H, W, C] -> probabilities, logits float32 [B, classes], features float32 [B, F]

`metadata_props` contains model.json under the key "lungjax". Clients crop and resize images as its `input` specifies,
after rotating them by 180 degrees if its `orientation` is "rotated". The graph is corrected where jax2onnx 0.13 treats
all four axes of a max pool as spatial, which no runtime supports, and where onnxruntime 1.31 would compute wrong
values.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lungjax.export.functions import Check, Exportable
from lungjax.inference import artifacts
from lungjax.models.ops import conv
from lungjax.runtime.files import atomic_file

FILE = "model.onnx"
MAX_BYTES = 2**31 - 2**20  # limit of a protobuf
TINY = float(np.finfo(np.float32).tiny)
TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def write(functions: Exportable, folder: Path) -> tuple[Path, Check]:
    """Writes FILE, or nothing if it raises ValueError; returns its path and the result of `Functions.check`."""
    import onnx

    size = sum(array.nbytes for array in functions.weights.values())
    if size > MAX_BYTES:
        raise ValueError(f"{FILE}: weights of {size / 2**30:.1f} GiB exceed ONNX's limit of 2 GiB; use --format=jax")
    model = convert(functions)
    path = folder / FILE
    with atomic_file(path) as partial_file:
        onnx.save(model, str(partial_file))
        onnx.checker.check_model(str(partial_file), full_check=True)
        check = functions.check(artifacts.read_onnx(partial_file).outputs, FILE)
    return path, check


def convert(functions: Exportable) -> Any:
    """Returns the `onnx.ModelProto` of the `predict` function."""
    from jax2onnx import to_onnx

    for name in ("jax2onnx", "onnx_ir"):  # the packages warn about each missing plugin and each shape
        logging.getLogger(name).setLevel(logging.ERROR)
    weights = functions.weights  # outside of the trace, in which the arrays would be abstract

    def predict(pixels: jax.Array) -> tuple[jax.Array, ...]:
        with conv.plain_forms():
            outputs = functions.predict(weights, pixels)
        return tuple(outputs[name] for name in artifacts.OUTPUTS)

    pixels: Any = jax.ShapeDtypeStruct(("B", *artifacts.image_shape(functions.metadata)), np.uint8)
    names = list(artifacts.OUTPUTS)
    model = to_onnx(predict, [pixels], model_name="lungjax", input_names=["pixels"], output_names=names)
    fix_pools(model)
    fix_borders(model)
    entry = model.metadata_props.add()
    entry.key, entry.value = artifacts.METADATA_KEY, functions.metadata.to_json()
    model.producer_name = "lungjax"
    return model


def fix_pools(model: Any) -> None:
    """Replaces each max pool over four axes, with its two Unsqueeze nodes and one Squeeze node, by one over two."""
    from onnx import helper

    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    removed: set[str] = set()
    nodes = []
    for node in graph.node:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        window = list(options.get("kernel_shape", ()))
        if node.op_type != "MaxPool" or len(window) != 4:
            nodes.append(node)
            continue
        outer = producers[node.input[0]]
        inner = producers[outer.input[0]]
        after = [other for other in graph.node if node.output[0] in other.input]
        if (outer.op_type, inner.op_type, *(o.op_type for o in after)) != ("Unsqueeze", "Unsqueeze", "Squeeze"):
            raise ValueError(f"{FILE}: unknown form of the max pool {node.name}; please report the version of jax2onnx")
        pads, strides = options.get("pads", [0] * 8), options.get("strides", [1] * 4)
        assert window[0] == window[3] == strides[0] == strides[3] == 1 and not any(pads[::4] + pads[3::4])
        names = [f"{node.name}_{part}" for part in ("nchw", "pooled")]
        nodes += [
            helper.make_node("Transpose", [inner.input[0]], names[:1], f"{node.name}_in", perm=TO_NCHW),
            helper.make_node(
                "MaxPool", names[:1], names[1:], node.name, kernel_shape=window[1:3], strides=strides[1:3],
                pads=[pads[1], pads[2], pads[5], pads[6]],
            ),
            helper.make_node("Transpose", names[1:], list(after[0].output), f"{node.name}_out", perm=TO_NHWC),
        ]  # fmt: skip
        removed |= {outer.name, inner.name, after[0].name}
    del graph.value_info[:]  # optional, and wrong for the replaced nodes
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.name not in removed)


def fix_borders(model: Any) -> None:
    """Replaces zero borders by tiny numbers: onnxruntime 1.31 merges zeros into a max pool, which ignores padding."""
    from onnx import numpy_helper

    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        source = producers.get(node.input[0]) if node.op_type == "MaxPool" else None
        while source is not None and source.op_type == "Transpose":
            source = producers.get(source.input[0])
        if source is not None and source.op_type == "Pad" and len(source.input) > 2:
            values = [array for array in graph.initializer if array.name == source.input[2]]
            if values and not numpy_helper.to_array(values[0]).any():
                name = f"{source.name}_border"
                graph.initializer.append(numpy_helper.from_array(np.array(TINY, np.float32), name))
                source.input[2] = name
