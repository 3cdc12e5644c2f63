"""ONNX files and Triton's folder, with onnxruntime: python -m pytest tests/export_extra/test_onnx.py (extra `export`)

One network of every family is converted, with random weights and running statistics, which no trained network makes
easier. Triton itself is not here: its configuration is parsed, and the model is run as it says.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent.parent))
from random_weights import random_variables

from lungjax import models
from lungjax.config import HeadConfig, InputSpec, ModelConfig
from lungjax.config.metadata import Metadata
from lungjax.export import onnx as onnx_file
from lungjax.export import triton
from lungjax.export.functions import Programs
from lungjax.inference import artifacts, predictor

SIZES = {"cbr_tiny": 128}
# One of each family, and of ResNet and ConvNeXt both generations.
NETWORKS = (
    "cbr_tiny", "xray_cnn", "efficientnet_b0", "efficientnet_lite0", "efficientnetv2_b0", "resnet18", "resnet50v2",
    "bit_r50x1", "convnext_tiny", "convnextv2_atto", "densenet121", "vgg16", "mobilenet", "mobilenetv2",
    "mobilenetv3_small",
)  # fmt: skip
STD, MEAN = (0.2, 0.25, 0.3), (0.4, 0.5, 0.6)


def make(name, classes=3, positive=None, **fields):
    """A network of random weights for gray images that become three channels."""
    side = SIZES.get(name, 64)
    spec = InputSpec(size=(side, side), mean=MEAN, std=STD)
    module = models.build(ModelConfig(name=name, dtype="float32", **fields), classes)
    variables = jax.tree.map(jnp.asarray, random_variables(module, (side, side, 3)))
    told = Metadata(name, tuple("abc"[:classes]), spec, "folder", temperature=0.7, positive=positive)
    return Programs(told, module, {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})})


def test_a_network_of_every_family_is_tried():
    assert {models.family_of(name) for name in NETWORKS} == set(models.FAMILIES)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_is_equal_to_the_network_and_knows_its_metadata(name, tmp_path):
    programs = make(name)
    path, worst = onnx_file.write(programs, tmp_path)
    allowed = 1e-4 if name == "bit_r50x1" else 1e-5  # BiT's own float32 is 1e-5 away from its float64 here
    assert worst <= allowed
    session = artifacts.read_onnx(path)
    assert session.metadata == programs.metadata
    pixels = programs.sample(5)
    wanted, found = programs.reference(pixels), session.outputs(pixels)
    span = wanted["logits"].max() - wanted["logits"].min()
    assert np.abs(found["logits"] - wanted["logits"]).max() <= allowed * span
    np.testing.assert_allclose(found["probabilities"], wanted["probabilities"], atol=allowed)
    given = onnx.load(path).graph.input[0].type.tensor_type
    assert given.elem_type == onnx.TensorProto.UINT8 and given.shape.dim[0].dim_param == "B"


def test_a_sigmoid_gets_two_columns(tmp_path):
    programs = make("xray_cnn", classes=2, positive=0, head=HeadConfig(pool="flatten", output="sigmoid"))
    session = artifacts.read_onnx(onnx_file.write(programs, tmp_path)[0])
    pixels = programs.sample(2)
    found, wanted = session.outputs(pixels), programs.reference(pixels)
    np.testing.assert_allclose(found["logits"], wanted["logits"], atol=1e-5)
    assert not wanted["logits"][:, 1].any() and wanted["logits"][:, 0].any()


def test_a_predictor_reads_the_file(tmp_path):
    programs = make("xray_cnn")
    model = predictor.open_model(onnx_file.write(programs, tmp_path)[0])
    pixels = programs.sample(11)
    np.testing.assert_allclose(model(pixels), programs.reference(pixels)["probabilities"], atol=1e-6)
    assert model.metadata == programs.metadata and model.methods == ()


def test_max_pools_are_over_two_places_and_a_border_of_zeros_wins(tmp_path):
    """ResNetV2 pads with zeros before its pool, where everything may be negative; onnxruntime 1.31 forgets them."""
    programs = make("resnet50v2")
    graph = onnx_file.convert(programs).graph
    (pool,) = [node for node in graph.node if node.op_type == "MaxPool"]
    options = {a.name: helper.get_attribute_value(a) for a in pool.attribute}
    assert options["kernel_shape"] == [3, 3] and options["strides"] == [2, 2]
    (border,) = [node for node in graph.node if node.op_type == "Pad"]
    (value,) = [array for array in graph.initializer if array.name == border.input[2]]
    assert 0 < float(numpy_helper.to_array(value)) < 1e-37
    read = {name for node in graph.node for name in node.input}
    assert all(array.name in read for array in graph.initializer)


def test_foreign_and_damaged_files_are_named(tmp_path):
    path = onnx_file.write(make("xray_cnn"), tmp_path)[0]
    model = onnx.load(path)
    data = path.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(data[: len(data) // 2])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    for name, message in [("cut", "can't read it"), ("foreign", "not one of lungjax.export"), ("gone", "no such file")]:
        with pytest.raises(ValueError, match=message):
            artifacts.read_onnx(tmp_path / f"{name}.onnx")


def test_a_network_too_big_for_the_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "MOST", 1000)
    with pytest.raises(ValueError, match="ONNX holds 2 in a file; use --format=jax"):
        onnx_file.write(make("xray_cnn"), tmp_path)
    assert not list(tmp_path.iterdir())


def parse(text):
    """The protobuf text format, as far as config.pbtxt goes: messages, lists, strings, numbers and names."""
    tokens = re.findall(r'"[^"]*"|[\w.]+|[{}\[\],:]', text)

    def value():
        token = tokens.pop(0)
        if token == "[":
            found = []
            while True:
                found.append(message() if tokens[0] == "{" else value())
                if tokens.pop(0) == "]":
                    return found
        return token[1:-1] if token[0] == '"' else int(token) if token.isdigit() else token

    def message():
        fields = {}
        assert tokens.pop(0) == "{"
        while tokens[0] != "}":
            name = tokens.pop(0)
            if tokens[0] == ":":
                tokens.pop(0)
                fields[name] = value()
            else:
                fields[name] = message() if tokens[0] == "{" else value()
        tokens.pop(0)
        return fields

    tokens[:] = ["{", *tokens, "}"]
    return message()


# Of triton-inference-server/common, protobuf/model_config.proto.
TYPES = {"TYPE_UINT8": onnx.TensorProto.UINT8, "TYPE_FP32": onnx.TensorProto.FLOAT}


def test_tritons_configuration_is_of_the_model_beside_it(tmp_path):
    programs = make("xray_cnn")
    programs = replace(programs, metadata=replace(programs.metadata, name="x rays"))
    other = tmp_path / "triton/somebody_elses/1"
    other.mkdir(parents=True)
    folder, _ = triton.write(programs, tmp_path)
    assert other.is_dir() and folder == tmp_path / "triton/x_rays"
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "1/model.onnx", "README.md", "config.pbtxt", "labels.txt", "model.json",
    ]  # fmt: skip
    config = parse((folder / "config.pbtxt").read_text())
    assert config["name"] == folder.name and config["backend"] == "onnxruntime"
    graph = onnx.load(folder / "1/model.onnx").graph
    for said, has in ((config["input"], graph.input), (config["output"], graph.output)):
        assert sorted(one["name"] for one in said) == sorted(one.name for one in has)
        for one in said:
            tensor = next(value for value in has if value.name == one["name"]).type.tensor_type
            assert TYPES[one["data_type"]] == tensor.elem_type
            assert one["dims"] == [dim.dim_value for dim in tensor.shape.dim[1:]]  # without the batch
    batching = config["dynamic_batching"]
    assert max(batching["preferred_batch_size"]) <= config["max_batch_size"]
    assert set(batching) == {"preferred_batch_size", "max_queue_delay_microseconds"}
    assert (folder / "labels.txt").read_text().splitlines() == list(programs.metadata.classes)
    most = np.repeat(programs.sample(1), config["max_batch_size"], axis=0)
    assert artifacts.read_onnx(folder / "1/model.onnx").predict(most).shape == (config["max_batch_size"], 3)
