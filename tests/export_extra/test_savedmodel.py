"""SavedModels in TensorFlow: python -m pytest tests/export_extra/test_savedmodel.py (pip install tensorflow-cpu)"""

from pathlib import Path

import numpy as np
import pytest
from test_onnx import make

from lungjax import models
from lungjax.config import metadata
from lungjax.export import savedmodel

tf = pytest.importorskip("tensorflow", reason="SavedModel needs TensorFlow: pip install tensorflow-cpu")


@pytest.mark.parametrize("name", ["cbr_tiny", "xray_cnn", "mobilenetv3_small"])
def test_file_against_network(name, tmp_path):
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
