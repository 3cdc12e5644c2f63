"""Writes `triton/NAME`, a model for a Triton Inference Server repository, from the ONNX file.

    triton/NAME/config.pbtxt     backend, batching, inputs and outputs
    triton/NAME/1/model.onnx     version 1
    triton/NAME/labels.txt       the classes, so that clients can request the top k by name
    triton/NAME/model.json       `metadata.Metadata`
    triton/NAME/README.md        how to start the server and send a request

Field names are from Triton's model configuration (github.com/triton-inference-server/server, model_configuration).
"""

import re
from pathlib import Path

from lungjax.config.metadata import FILE, NOTICE, Metadata
from lungjax.export import onnx
from lungjax.export.functions import Check, Exportable
from lungjax.inference import artifacts
from lungjax.runtime.files import atomic_folder

FOLDER = "triton"

CONFIG = """name: "{name}"
backend: "onnxruntime"
max_batch_size: 64
input [
  {{ name: "pixels" data_type: TYPE_UINT8 dims: [ {height}, {width}, {channels} ] }}
]
output [
  {{ name: "probabilities" data_type: TYPE_FP32 dims: [ {classes} ] label_filename: "labels.txt" }},
  {{ name: "logits" data_type: TYPE_FP32 dims: [ {classes} ] }},
  {{ name: "features" data_type: TYPE_FP32 dims: [ {features} ] }}
]
dynamic_batching {{
  preferred_batch_size: [ 4, 8, 16 ]
  max_queue_delay_microseconds: 2000
}}
"""

README = """# {name} on the Triton Inference Server

{notice}

    docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD":/models nvcr.io/nvidia/tritonserver:RELEASE-py3 \\
        tritonserver --model-repository=/models

RELEASE is a version of the server whose onnxruntime reads ONNX opset 23, such as 25.08. In Python
(`pip install tritonclient[http]`):

    import numpy as np
    import tritonclient.http as triton

    client = triton.InferenceServerClient("localhost:8000")
    pixels = np.zeros((1, {shape}), np.uint8)   # B images, {kind}, 0..255
    request = triton.InferInput("pixels", pixels.shape, "UINT8")
    request.set_data_from_numpy(pixels)
    print(client.infer("{name}", [request]).as_numpy("probabilities"))    # one column per class: {names}

The client rotates, crops and resizes images as `orientation` and `input` of model.json specify; normalization and
calibration are inside the model. With lungjax, `lungjax.load("{name}/1/model.onnx").prepare(image).pixels` does that.
"""


def write(functions: Exportable, folder: Path) -> tuple[Path, Check]:
    """Writes FOLDER/NAME into `folder`; returns and raises the same as `onnx.write`, which writes model.onnx."""
    path, metadata = folder / FOLDER, functions.metadata
    path.mkdir(exist_ok=True)
    with atomic_folder(path / model_name(metadata), FILE) as model:  # other models in the repository remain
        (model / "1").mkdir()
        _, check = onnx.write(functions, model / "1")
        features = functions.reference(functions.sample(1))["features"].shape[1]
        (model / "config.pbtxt").write_text(config(metadata, features), "utf-8")
        (model / "labels.txt").write_text("".join(f"{name}\n" for name in metadata.classes), "utf-8")
        (model / FILE).write_text(metadata.to_json(), "utf-8")
        (model / "README.md").write_text(readme(metadata), "utf-8")
    return path / model_name(metadata), check


def model_name(metadata: Metadata) -> str:
    """Returns the experiment's name for folders and URLs, with `_` for all but letters, digits, `_`, `-` and `.`."""
    return re.sub(r"[^\w.-]+", "_", metadata.name, flags=re.ASCII).strip("._") or "model"


def config(metadata: Metadata, features: int) -> str:
    """Returns config.pbtxt. Dimensions omit the batch, as Triton requires if max_batch_size is above zero."""
    height, width = metadata.input.size
    return CONFIG.format(
        name=model_name(metadata), height=height, width=width, channels=metadata.input.channels,
        classes=len(metadata.classes), features=features,
    )  # fmt: skip


def readme(metadata: Metadata) -> str:
    """Returns README.md."""
    return README.format(
        name=model_name(metadata), notice=NOTICE, shape=", ".join(map(str, artifacts.image_shape(metadata))),
        kind="gray" if metadata.input.channels == 1 else "RGB", names=", ".join(metadata.classes),
    )  # fmt: skip
