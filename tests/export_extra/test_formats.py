"""ONNX files, Triton's folder and SavedModels: python -m pytest tests/export_extra (`export` extra, tensorflow-cpu)

One network from every family is converted, with random weights and running statistics. Triton itself is not run: its
configuration is parsed and compared with the model.
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

sys.path.insert(0, str(Path(__file__).parent.parent))
from random_weights import random_variables

import lungjax
from lungjax import models
from lungjax.config import InputSpec, ModelConfig, metadata
from lungjax.config.metadata import Metadata
from lungjax.export import onnx as onnx_export
from lungjax.export import savedmodel, triton
from lungjax.export.functions import Functions
from lungjax.inference import artifacts

SIZES = {"cbr_tiny": 128}
# One per family, and both generations of ResNet and ConvNeXt. ResNetV2 pads with zeros before its max pool.
NETWORKS = (
    "cbr_tiny", "xray_cnn", "efficientnet_b0", "efficientnet_lite0", "efficientnetv2_b0", "resnet18", "resnet50v2",
    "bit_r50x1", "convnext_tiny", "convnextv2_atto", "densenet121", "vgg16", "mobilenet", "mobilenetv2",
    "mobilenetv3_small", "squeezenet1_1",
)  # fmt: skip
STD, MEAN = (0.2, 0.25, 0.3), (0.4, 0.5, 0.6)


def make(name, classes=3, positive=None, side=None, **fields):
    """A network with random weights whose grayscale input is repeated across three channels."""
    side = side or SIZES.get(name, 64)
    spec = InputSpec(size=(side, side), mean=MEAN, std=STD)
    config = ModelConfig(name=name, dtype="float32", **fields)
    module = models.build(config, classes)
    variables = jax.tree.map(jnp.asarray, random_variables(module, (side, side, 3)))
    metadata = Metadata(name, tuple("abc"[:classes]), spec, "folder", temperature=0.7, positive=positive)
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return Functions(metadata, config, module, variables)


@pytest.fixture(scope="module")
def small():
    return make("xray_cnn")


def test_every_family():
    assert {models.family_of(name) for name in NETWORKS} == set(models.FAMILIES)


@pytest.mark.parametrize("name", NETWORKS)
def test_file_against_network(name, tmp_path):
    functions = make(name)
    path, check = onnx_export.write(functions, tmp_path)
    allowed = 1e-4 if name == "bit_r50x1" else 1e-5  # here BiT's float32 and float64 differ by 1e-5
    assert check.difference <= allowed
    session = artifacts.read_onnx(path)
    assert session.metadata == functions.metadata
    pixels = functions.sample(5)
    expected, outputs = functions.reference(pixels), session.outputs(pixels)
    for key in ("logits", "features"):
        assert np.abs(outputs[key] - expected[key]).max() <= allowed * np.ptp(expected[key])
    np.testing.assert_allclose(outputs["probabilities"], expected["probabilities"], atol=allowed)
    tensor = onnx.load(path).graph.input[0].type.tensor_type
    assert tensor.elem_type == onnx.TensorProto.UINT8 and tensor.shape.dim[0].dim_param == "B"


def test_load_onnx(small, tmp_path):
    model, pixels = lungjax.load(onnx_export.write(small, tmp_path)[0]), small.sample(1)
    assert model.metadata == small.metadata and model.methods == ()
    expected = small.reference(pixels)["features"]
    np.testing.assert_allclose(model.features(pixels[0, ..., 0]), expected, atol=1e-5)
    with pytest.raises(ValueError, match="no saliency maps"):
        model.explain(pixels[0, ..., 0])


def test_damaged_foreign_and_large_files(small, tmp_path, monkeypatch):
    path = onnx_export.write(small, tmp_path)[0]
    model = onnx.load(path)
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:999])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    for name, word in (("cut", "can't read it"), ("foreign", "not from lungjax.export")):
        with pytest.raises(ValueError, match=word):
            artifacts.read_onnx(tmp_path / f"{name}.onnx")
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 1000)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="--format=jax"):
        onnx_export.write(small, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# From triton-inference-server/common, protobuf/model_config.proto.
TYPES = {"TYPE_UINT8": onnx.TensorProto.UINT8, "TYPE_FP32": onnx.TensorProto.FLOAT}


def test_triton_configuration_against_model(small, tmp_path):
    functions = replace(small, metadata=replace(small.metadata, name="x rays"))
    other = tmp_path / "triton/somebody_elses/1"
    other.mkdir(parents=True)
    folder, _ = triton.write(functions, tmp_path)
    assert other.is_dir() and folder == tmp_path / "triton/x_rays"
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "1/model.onnx", "README.md", "config.pbtxt", "labels.txt", "model.json",
    ]  # fmt: skip
    text, graph = (folder / "config.pbtxt").read_text(), onnx.load(folder / "1/model.onnx").graph
    assert f'name: "{folder.name}"' in text and 'backend: "onnxruntime"' in text
    fields = re.findall(r'name: "(\w+)"\s+data_type: (\w+)\s+dims: \[ ([\d, ]+) \]', text)
    tensors = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
    shapes = {name: [dim.dim_value for dim in tensor.shape.dim[1:]] for name, tensor in tensors.items()}
    assert shapes == {name: [int(side) for side in dims.split(",")] for name, _, dims in fields}  # without the batch
    assert all(TYPES[kind] == tensors[name].elem_type for name, kind, _ in fields)
    size = int(re.search(r"max_batch_size: (\d+)", text)[1])
    assert max(map(int, re.search(r"preferred_batch_size: \[ ([\d, ]+) \]", text)[1].split(","))) <= size
    assert (folder / "labels.txt").read_text().splitlines() == list(functions.metadata.classes)
    batch = np.repeat(functions.sample(1), size, axis=0)
    assert artifacts.read_onnx(folder / "1/model.onnx").outputs(batch)["logits"].shape == (size, 3)


@pytest.mark.parametrize("name", ["cbr_tiny", "xray_cnn", "mobilenetv3_small"])
def test_savedmodel_against_network(name, tmp_path):
    tf = pytest.importorskip("tensorflow", reason="SavedModel needs TensorFlow: pip install tensorflow-cpu")
    functions = make(name)
    path, check = savedmodel.write(functions, tmp_path)
    assert check.difference <= 1e-5
    loaded = tf.saved_model.load(str(path))
    for batch in (1, 3, 8):
        pixels = functions.sample(batch)
        expected = functions.reference(pixels)
        for outputs in (loaded.signatures["serving_default"](pixels=tf.constant(pixels)), loaded.predict(pixels)):
            for key in ("logits", "features"):
                assert np.abs(outputs[key].numpy() - expected[key]).max() <= 1e-5 * np.ptp(expected[key])
            np.testing.assert_allclose(outputs["probabilities"].numpy(), expected["probabilities"], atol=1e-5)
    assert metadata.read(path / "assets.extra/model.json") == functions.metadata
    assert str(Path(models.__file__).parent.parent).encode() not in (path / "saved_model.pb").read_bytes()
