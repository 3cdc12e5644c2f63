"""Writes `triton/NAME`, a model of a repository for the Triton Inference Server, from the ONNX file.

    triton/NAME/config.pbtxt     backend, batching, inputs and outputs
    triton/NAME/1/model.onnx     version 1
    triton/NAME/labels.txt       the classes, so that a client may ask for the k best by name
    triton/NAME/model.json       `metadata.Metadata`
    triton/NAME/README.md             how to start the server and how to ask

Field names are those of Triton's model configuration (github.com/triton-inference-server/server, model_configuration).
"""

import json
import re
from pathlib import Path
from typing import Any

from lungjax.config.metadata import FILE, NOTICE, Metadata
from lungjax.export import onnx
from lungjax.export.functions import Programs
from lungjax.runtime.files import atomic_folder

FOLDER = "triton"
MAX_BATCH = 64
PREFERRED = (4, 8, 16)
DELAY = 2000  # microseconds that a request waits for others

CONFIG = """name: "{name}"
backend: "onnxruntime"
max_batch_size: {batch}
input [
  {{
    name: "pixels"
    data_type: TYPE_UINT8
    dims: [ {height}, {width}, {channels} ]
  }}
]
output [
  {{
    name: "probabilities"
    data_type: TYPE_FP32
    dims: [ {classes} ]
    label_filename: "labels.txt"
  }},
  {{
    name: "logits"
    data_type: TYPE_FP32
    dims: [ {classes} ]
  }}
]
dynamic_batching {{
  preferred_batch_size: [ {preferred} ]
  max_queue_delay_microseconds: {delay}
}}
"""

README = """# {name} on the Triton Inference Server

{notice}

    docker run --rm -p 8000:8000 -v "$PWD":/models nvcr.io/nvidia/tritonserver:RELEASE-py3 \\
        tritonserver --model-repository=/models

RELEASE is a version of the server whose onnxruntime reads ONNX opset 23, such as 25.08. With -p 127.0.0.1:8000:8000
only this machine can ask it. Then

    curl localhost:8000/v2/models/{name}/config

and, in Python (pip install tritonclient[http] numpy):

    import numpy as np
    import tritonclient.http as triton

    client = triton.InferenceServerClient("localhost:8000")
    pixels = np.zeros((1, {height}, {width}, {channels}), np.uint8)   # B images, {kind}, 0..255
    wanted = triton.InferInput("pixels", pixels.shape, "UINT8")
    wanted.set_data_from_numpy(pixels)
    answer = client.infer("{name}", [wanted])
    print(answer.as_numpy("probabilities"))            # [B, {classes}]: {names}

Images are cropped and resized by the client, as `input` of model.json says (size {height} x {width}, crop "{crop}",
{interpolation}, antialias {antialias}); normalisation and calibration are inside the model. With lungjax installed,
`lungjax.inference.predictor.open_model("{name}/1/model.onnx").picture(image).pixels` does it.
"""


def write(programs: Programs, folder: Path) -> tuple[Path, float]:
    """Writes FOLDER/NAME into `folder`; its model.onnx is checked as `onnx.write` does.

    Returns its path, and the largest difference of the logits by their range. Raises ValueError as that does.
    """
    path, told = folder / FOLDER, programs.metadata
    path.mkdir(exist_ok=True)
    with atomic_folder(path / model_name(told), FILE) as model:  # other models of the repository stay
        (model / "1").mkdir()
        _, found = onnx.write(programs, model / "1")
        (model / "config.pbtxt").write_text(config(told), "utf-8")
        (model / "labels.txt").write_text("".join(f"{name}\n" for name in told.classes), "utf-8")
        (model / FILE).write_text(told.to_json(), "utf-8")
        (model / "README.md").write_text(readme(told), "utf-8")
    return path / model_name(told), found


def load_packages() -> Any:
    """As `onnx.load_packages`: the server itself is not needed to write for it."""
    return onnx.load_packages()


def model_name(told: Metadata) -> str:
    """Returns the model's name as a folder and in a URL: letters, digits, `_`, `-` and `.` of the experiment's."""
    return re.sub(r"[^\w.-]+", "_", told.name, flags=re.ASCII).strip("._") or "model"


def config(told: Metadata) -> str:
    """Returns config.pbtxt. Dimensions leave out the batch, as Triton wants where max_batch_size is above zero."""
    height, width = told.input.size
    return CONFIG.format(
        name=model_name(told), batch=MAX_BATCH, height=height, width=width, channels=told.input.channels,
        classes=len(told.classes), preferred=", ".join(map(str, PREFERRED)), delay=DELAY,
    )  # fmt: skip


def readme(told: Metadata) -> str:
    """Returns README.md: how the server is started and asked."""
    height, width = told.input.size
    return README.format(
        name=model_name(told), notice=NOTICE, height=height, width=width, channels=told.input.channels,
        kind="gray" if told.input.channels == 1 else "RGB", classes=len(told.classes),
        names=json.dumps(list(told.classes), ensure_ascii=False), crop=told.input.crop,
        interpolation=told.input.interpolation, antialias=told.input.antialias,
    )  # fmt: skip
